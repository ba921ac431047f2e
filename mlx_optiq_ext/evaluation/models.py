"""Models under evaluation: size and tokenizer; weights are loaded one model at a time."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import files
from ..errors import InputError
from ..kv import KVPlan, mount
from ..latency import read_layout
from ..model.hub import CONFIG, find_folder
from ..model.loading import load, model_digest, to_compute
from ..planning.generation import check_tokenizer


@dataclass(frozen=True)
class Subject:
    """A model under evaluation.

    Attributes:
        name: As the user gave it.
        folder: The folder with its files.
        kv_plan: Precision of its keys and values; None for unpacked.
    """

    name: str
    folder: Path
    kv_plan: KVPlan | None = None

    @property
    def label(self) -> str:
        """The name, and the KV plan if there is one."""
        return self.name if self.kv_plan is None else f"{self.name} (KV {self.kv_plan.source})"

    def key(self) -> dict[str, Any]:
        """Everything that decides the model's answers, as JSON."""
        plan = None if self.kv_plan is None else repr(self.kv_plan)
        # Weight files with other names than mlx-lm's, such as mlx-whisper's.
        others = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self._weights()
            if not path.name.startswith("model")
        }
        digest = {"model": model_digest(self.folder), **others}
        return {**digest, "kv": plan, "device": str(mx.default_device())}

    def config(self) -> Mapping[str, Any]:
        """The model's ``config.json``."""
        found = files.read_json(self.folder / "config.json", files.MODEL_CONFIG)
        return found if isinstance(found, dict) else {}

    def _weights(self) -> list[Path]:
        return sorted(p for p in self.folder.iterdir() if p.suffix in (".safetensors", ".npz"))

    def size(self) -> dict[str, float]:
        """``stored_bpw`` over the weights that generation uses, and ``file_bytes``."""
        stored = {"file_bytes": float(sum(path.stat().st_size for path in self._weights()))}
        if not any(path.suffix == ".safetensors" for path in self._weights()):
            return stored  # mlx-whisper's older form has no headers to count weights in
        layout = read_layout(str(self.folder))
        weights = sum(o.elements for o in layout.operators)
        return {"stored_bpw": 8 * layout.nbytes / max(weights, 1), **stored}

    def load(self) -> tuple[nn.Module, Any]:
        """The model in the dtype to compute in, its KV plan mounted, and its tokenizer."""
        model, tokenizer, _ = load(str(self.folder))
        model = to_compute(model)
        if self.kv_plan is not None:
            mount(model, self.kv_plan)
        return model, tokenizer


def subject(name: str, kv_plan: KVPlan | None = None) -> Subject:
    """The model in a folder, or in a Hub repository, which is downloaded.

    Raises:
        InputError: There is no such model.
    """
    folder = find_folder(name)
    if not (folder / CONFIG).exists():
        raise InputError(f"{name} is not a model folder: it has no {CONFIG}")
    return Subject(name, folder, kv_plan)


def tokenizer_of(model: Subject) -> Any:
    """A model's tokenizer, loaded without the weights.

    Raises:
        InputError: It has none.
    """
    from mlx_lm.utils import load_tokenizer

    found = load_tokenizer(model.folder)
    check_tokenizer(found)
    return found


def check_same_tokens(first: Subject, second: Subject, texts: Sequence[Any]) -> None:
    """Refuse to compare two models token by token if their tokens differ.

    Raises:
        InputError: The vocabularies or the tokens of a text differ.
    """
    one, two = tokenizer_of(first), tokenizer_of(second)
    start = f"{second.name} cannot be the baseline of {first.name}: "
    known, other = one.get_vocab(), two.get_vocab()
    if known != other:
        differing = len(set(known.items()) ^ set(other.items()))
        raise InputError(
            f"{start}their tokenizers have {len(known)} and {len(other)} tokens, {differing} of "
            "them different, and this task compares token by token"
        )
    for text in texts:
        if isinstance(text, str) and one.encode(text[:2000]) != two.encode(text[:2000]):
            raise InputError(f"{start}their tokenizers split the data into different tokens")
