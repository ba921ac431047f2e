"""Adds our options to the stock commands.

Every stock command says ``import argparse`` and builds its parser itself, the server inside
``main``. So each command module gets its own view of argparse, whose ``ArgumentParser`` adds one
group before parsing and takes our values out of the namespace after it.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

from mlx_optiq_ext import plugins
from mlx_optiq_ext._version import __version__
from mlx_optiq_ext.errors import InputError, OptiqError

from . import session
from .patch import Patch

PREFIX = "optiq_"

COMMANDS = (
    "benchmark",
    "cache_prompt",
    "chat",
    "convert",
    "evaluate",
    "fuse",
    "generate",
    "lora",
    "perplexity",
    "server",
)


#: Command -> destination of a required stock option -> the option of ours that replaces it.
REPLACED = {"evaluate": {"tasks": "--optiq-task"}}


class Parser(argparse.ArgumentParser):
    """A stock command's parser with our option group."""

    optiq_command: str = ""
    _optiq_added = False

    def _add_optiq_arguments(self) -> None:
        if self._optiq_added:
            return
        self._optiq_added = True
        from ..installation import plugin_manager

        group = self.add_argument_group(f"optiq (mlx-optiq-ext {__version__})")
        try:
            arguments = {"command": self.optiq_command, "group": group}
            refusals = (OptiqError, argparse.ArgumentError)
            plugins.answers(plugin_manager(), "optiq_add_arguments", arguments, refusals)
        except argparse.ArgumentError as error:
            raise OptiqError(
                f"A plugin adds an option that mlx_lm.{self.optiq_command} has already: {error}"
            ) from error
        for action in group._group_actions:
            if not action.dest.startswith(PREFIX) or action.default is not None:
                raise OptiqError(
                    f"A plugin adds {'/'.join(action.option_strings)} to mlx_lm."
                    f"{self.optiq_command}: options must start with --optiq- and default to None."
                )

    def _relax(self, given) -> None:
        """Do not require what an option on the command line replaces."""
        names = {str(argument).partition("=")[0] for argument in given}
        for action in self._actions:
            if REPLACED.get(self.optiq_command, {}).get(action.dest) in names:
                action.required = False

    def format_help(self) -> str:
        """Help text with our group."""
        self._add_optiq_arguments()
        return super().format_help()

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore
        """Parse, then move our values from the namespace to the session."""
        try:
            self._add_optiq_arguments()
        except OptiqError as error:
            self.error(str(error))
        self._relax(sys.argv[1:] if args is None else args)
        namespace, rest = super().parse_known_args(args, namespace)
        assert namespace is not None
        values = {
            key.removeprefix(PREFIX): namespace.__dict__.pop(key)
            for key in list(vars(namespace))
            if key.startswith(PREFIX)
        }
        running = session.running()
        if any(value is not None for value in values.values()):
            options = SimpleNamespace(**values)
            if running is None or running.command != self.optiq_command:
                self.error("--optiq-* options need the command's own main()")
            try:
                instead = self._checked(options, namespace)
            except OptiqError as error:
                self._refuse(error)
            running.options = options
            if instead:
                raise Instead(instead[0])
        return namespace, rest

    def _checked(self, options, namespace):
        """What `check` says, once no rank of ``mlx.launch`` refuses and all were asked the same."""
        from mlx_optiq_ext import distributed

        distributed.size()
        with distributed.together():
            instead = check(self.optiq_command, options, namespace)
            running = session.running()
            facts = {} if running is None else running.results.get("facts", {})
            distributed.agree(**{"command line": shlex.join(sys.argv[1:])}, **facts)
        return instead

    def _refuse(self, error: OptiqError) -> NoReturn:
        """As `error`, on the one rank that prints it."""
        from mlx_optiq_ext import distributed

        if distributed.told(error):
            raise SystemExit(2) from error
        super().error(str(error))

    def error(self, message: str) -> NoReturn:
        """Stock's refusal; where ``mlx.launch`` runs one of our options, once for all ranks."""
        from mlx_optiq_ext import distributed

        if any(word.startswith("--optiq-") for word in sys.argv[1:]):
            try:
                distributed.size()
                with distributed.together():
                    raise InputError(message)
            except OptiqError as error:
                self._refuse(error)
        super().error(message)


def check(
    command: str, options: SimpleNamespace, args: argparse.Namespace
) -> list[Callable[[], None]]:
    """Refuse what cannot work before anything is loaded; what is to run in place of the command."""
    from ..installation import plugin_manager

    return plugin_manager().hook.optiq_check_options(command=command, options=options, args=args)


class Instead(Exception):
    """Leaves a stock command's ``main`` for what runs in its place."""

    def __init__(self, run: Callable[[], None]):
        super().__init__()
        self.run = run


class _View(ModuleType):
    """argparse as one command module sees it."""

    def __init__(self, command: str):
        super().__init__("argparse", argparse.__doc__)
        self.ArgumentParser = type("ArgumentParser", (Parser,), {"optiq_command": command})

    def __getattr__(self, name: str) -> Any:
        return getattr(argparse, name)


def _run(wrapped: Any, args: tuple, kwargs: dict) -> Any:
    try:
        return wrapped(*args, **kwargs)
    except Instead as raised:
        run = raised.run
    from mlx_optiq_ext import distributed

    return distributed.led(
        run
    )  # outside the handler: its own errors have nothing to do with how it got here


def main(command: str):
    """Wrapper for a command's ``main``: opens the session and turns our errors into exit 2."""

    def main(wrapped, instance, args, kwargs):
        with session.session(command) as entry:
            from mlx_optiq_ext import distributed

            try:
                with distributed.together():
                    result = _run(wrapped, args, kwargs)
                    if "fatal" in entry.results:
                        raise entry.results["fatal"]
                    distributed.finish()
                    return result
            except (OptiqError, KeyboardInterrupt) as raised:
                error = entry.results.get("fatal", raised)
                if not isinstance(error, OptiqError):
                    raise
                if not distributed.told(error):
                    print(f"mlx_lm.{command}: error: {error}", file=sys.stderr)
                raise SystemExit(2) from error

    return main


def _patches(command: str) -> tuple[Patch, Patch]:
    why = f"mlx_lm.{command} has no way to add an option"
    upstream = "mlx-lm #1578 (plugin registration)"
    return (
        Patch(
            f"mlx_lm.{command}:argparse",
            feature="flags",
            why=why,
            upstream=upstream,
            replace=lambda original: _View(command),
        ),
        Patch(
            f"mlx_lm.{command}:main",
            feature="flags",
            why="scopes the options to one run and prints our errors as the command's own",
            upstream=upstream,
            wrapper=main(command),
        ),
    )


PATCHES = tuple(patch for command in COMMANDS for patch in _patches(command))
