"""What a patched call and a plugin hook cost, against a plain call.

    python tests/benchmarks/hooks/wrapper_cost.py [--loops 200000]

The best of several repeats, in nanoseconds a call. No mlx-lm entry point that we wrap is called
more than once a load, request or conversion.
"""

import argparse
import os
import timeit
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ["MLX_OPTIQ_EXT"] = "0"  # the real patches stay off; the engine is measured by itself

from mlx_optiq_hooks import plugin_manager
from mlx_optiq_hooks.engine import session
from mlx_optiq_hooks.engine.patch import Engine, Patch, bind
from mlx_optiq_hooks.patches import utils

REPEATS = 7


def target(model, config, group_size=64, bits=4, mode="affine", quant_predicate=None):
    """Stands for ``mlx_lm.utils.quantize_model``."""
    return model


def through(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    """The least a wrapper can do."""
    return wrapped(*args, **kwargs)


def patched(wrapper: Any) -> Callable:
    """The target behind a wrapper, as the engine puts it there."""
    plain = target
    engine = Engine((Patch(f"{__name__}:target", "weights", "measure", "none: here", wrapper),))
    engine.apply()
    stand_in, globals()["target"] = target, plain
    return stand_in


def options_given(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call inside a command that was given options."""

    def inside() -> float:
        with session.opened("convert") as running:
            running.options = SimpleNamespace()
            return nanoseconds(call)

    return inside


def nanoseconds(call: Callable[[], Any]) -> float:
    """Time of one call."""
    return min(timeit.repeat(call, number=LOOPS, repeat=REPEATS)) / LOOPS * 1e9


def main() -> None:
    """Print the table."""
    bare, real = patched(through), patched(utils.quantize_model)
    hook = plugin_manager().hook
    rows: list[tuple[str, Callable[[], float]]] = [
        ("plain call", lambda: nanoseconds(lambda: target("model", {}))),
        ("wrapped, passes through", lambda: nanoseconds(lambda: bare("model", {}))),
        ("quantize_model, no option given", lambda: nanoseconds(lambda: real("model", {}))),
        ("quantize_model, options given", options_given(lambda: real("model", {}))),
        ("bind arguments by name", lambda: nanoseconds(lambda: bind(target, ("model", {}), {}))),
        (
            "hook without an implementation",
            lambda: nanoseconds(lambda: hook.optiq_resolve_adapter(name="x")),
        ),
        (
            "hook with one implementation",
            lambda: nanoseconds(
                lambda: hook.optiq_quant_predicate(model=None, config=None, options=None)
            ),
        ),
    ]
    print(f"{'':<34}{'ns a call':>10}")
    for name, measure in rows:
        print(f"{name:<34}{measure():>10.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loops", type=int, default=200_000, help="Calls a repeat.")
    LOOPS = parser.parse_args().loops
    main()
