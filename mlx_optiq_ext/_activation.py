"""Arms the hooks when ``mlx_lm`` is first imported.

This module runs at every interpreter start (``mlx_optiq_ext.pth``), so it imports ``sys`` only,
and what is built in for a command with our options.
"""

import sys

TARGET = "mlx_lm"

#: Who called :func:`install`: ``"site"`` (the .pth or .start file) or ``"import"`` (the package).
sources: list[str] = []

#: Why arming failed, or None. Shown by ``mlx_optiq_ext.status()``.
failure: str | None = None

armed = False


class _Trigger:
    """A meta path finder that finds no module; it only notices the first look-up of mlx_lm."""

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
    if source == "site":
        await_ctrl_c()
    if TARGET in sys.modules:
        arm()
    elif _trigger not in sys.meta_path:
        sys.meta_path.insert(0, _trigger)  # pyright: ignore[reportArgumentType]


def await_ctrl_c() -> None:
    """End a command with our options on Ctrl-C while mlx-lm is still being imported.

    The import takes seconds, and Python would print a long traceback.
    """
    name = sys.argv[0].rpartition("/")[2] if sys.argv else ""
    if name == "-m" and any("mlx_lm" in word for word in sys.orig_argv):
        name = TARGET
    if not name.startswith(TARGET) or not any(w.startswith("--optiq-") for w in sys.argv):
        return
    import _signal  # built in, unlike signal  # pyright: ignore[reportMissingImports]

    if not switched_off() and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, end)


def end(*_: object) -> None:
    """End this process before it has done anything."""
    import os

    try:
        os.write(2, b"mlx_lm: interrupted: nothing was done yet\n")
    finally:
        os._exit(130)


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
