"""Where a KV plan comes from: a width, a file, or the file beside a model."""

import hashlib
from contextlib import suppress
from pathlib import Path

from .. import files
from ..errors import InputError
from ..model.config import layer_count
from ..model.hub import find_file
from . import transform_file
from .plan import FILE, KVPlan, check_layers, parse_spec, read_plan

#: Stands for the plan beside the model.
AUTO = "auto"


def find_plan(text: str, model: str | None = None) -> KVPlan:
    """The plan for a text such as ``k8v4``, ``auto`` or ``kv_config.json``.

    Args:
        text: A width as for `parse_spec`, ``auto``, or the name of a file.
        model: The model's folder or Hub repository, which ``auto`` looks in. The plan's layers are
            checked against the config of a folder.

    Raises:
        InputError: There is no such plan, it is wrong, or it names layers that the model lacks.
    """
    plan = _found(text, model)
    count = _layer_count(model)
    if count is not None:
        check_layers(plan, count)
    return plan


def plan_digest(plan: KVPlan) -> str:
    """Digest of a plan's content."""
    content = repr((sorted(plan.layers.items()), plan.everywhere))
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _found(text: str, model: str | None) -> KVPlan:
    spec = parse_spec(text)
    if spec is not None:
        return spec
    if text != AUTO:
        if not text or not Path(text).exists():
            raise InputError(
                f"--optiq-kv {text}: no such file, and no width such as 4, k8v4 or k8v4g32"
            )
        return read_plan(Path(text))
    if model is None:
        raise InputError("--optiq-kv auto looks beside the model: name it with --model")
    try:
        path = find_file(model, FILE)
    except InputError as error:
        raise InputError(
            f"{error}: write one with mlx_lm.convert --optiq-kv-budget, or name a width such as "
            "--optiq-kv 4"
        ) from error
    with suppress(InputError):  # a plan need not have any
        find_file(model, transform_file.FILE)
    return read_plan(path)


def _layer_count(model: str | None) -> int | None:
    """Decoder layers by the config of a folder; None if it is no folder or does not say."""
    path = Path(model or "") / "config.json"
    try:
        config = files.read_json(path, files.MODEL_CONFIG)
    except InputError:
        return None  # mlx-lm reports a damaged config better
    if not isinstance(config, dict):
        return None
    return layer_count(config)
