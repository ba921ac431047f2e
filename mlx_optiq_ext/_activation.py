"""Arms the hooks when ``mlx_lm`` is first imported.

This module runs at every interpreter start (``mlx_optiq_ext.pth``), so it imports ``sys`` only.
"""

import sys

TARGET = "mlx_lm"

#: Who called :func:`install`: ``"site"`` (the .pth or .start file) or ``"import"`` (the package).
sources: list[str] = []

#: Why arming failed, or None. Shown by ``mlx_optiq_ext.status()``.
failure: str | None = None

armed = False


class _Trigger:
    """A meta path finder that finds nothing; it only notices the first look-up of mlx_lm."""

    def find_spec(self, name, path=None, target=None):
        if name == TARGET:
            arm()
        return None


_trigger = _Trigger()


def install(source: str = "site") -> None:
    """Watch for ``import mlx_lm``, or arm at once if it is already imported. Idempotent."""
    if source not in sources:
        sources.append(source)
    if armed:
        return
    if TARGET in sys.modules:
        arm()
    elif _trigger not in sys.meta_path:
        sys.meta_path.insert(0, _trigger)  # pyright: ignore[reportArgumentType]


def switched_off() -> bool:
    """Whether ``MLX_OPTIQ_EXT=0`` is set."""
    import os

    return os.environ.get("MLX_OPTIQ_EXT", "1").strip().lower() in ("0", "off", "false", "no")


def arm() -> None:
    """Load the hooks package and let it register its patches. Idempotent, never raises."""
    global armed, failure
    # The trigger stays in sys.meta_path: removing it while the import system walks that list would
    # make it skip the next finder, which may be another tool's.
    if armed or switched_off():
        return
    armed = True
    try:
        import mlx_optiq_hooks  # noqa: TID251 - the one late-bound step from library to hooks

        mlx_optiq_hooks.arm()
    except Exception as error:
        # A raised error here would break `import mlx_lm` for people who never asked for us.
        failure = f"{type(error).__name__}: {error}"
        print(f"mlx_optiq_ext: off, mlx-lm runs as stock ({failure})", file=sys.stderr)
