"""``mlx_lm.convert``: converts with our options."""

from ..commands import convert as command
from ..engine import session
from ..engine.patch import Patch, bind, of


def convert(wrapped, instance, args, kwargs):
    run = session.state(command.Run)
    if run is None:
        return wrapped(*args, **kwargs)
    return command.convert(run, wrapped, bind(wrapped, args, kwargs))


PATCHES = (
    Patch(
        "mlx_lm.convert:convert",
        feature="weights",
        why="measures the model and plans the precisions before stock quantizes",
        upstream="none: stock takes a predicate, but only from code",
        wrapper=convert,
        uses=(
            *of("mlx_lm.models.cache", "make_prompt_cache"),
            *of("mlx_lm.quant.utils", "load_data", "'.cache/mlx-lm/calibration_v5.txt'"),
            *of("mlx_lm.utils", "hf_repo_to_path", "upload_to_hub"),
        ),
    ),
)
