"""Adds our options to the stock commands.

Every stock command says ``import argparse`` and builds its parser itself, the server inside
``main``. So each command module gets its own view of argparse. The ``ArgumentParser`` there adds
our groups before parsing and takes our values out of the namespace after it.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, NoReturn

from mlx_optiq_ext._version import __version__
from mlx_optiq_ext.errors import InputError, OptiqError

from . import hub, interruption, session
from .command import PREFIX, Command, Run, grouped
from .patch import Patch
from .suggestion import START, suggestion


class Parser(argparse.ArgumentParser):
    """A stock command's parser with our option groups."""

    optiq_command: str = ""
    optiq_replaced: Mapping[str, str] = MappingProxyType({})
    optiq_environment: Mapping[str, str] = MappingProxyType({})
    optiq_groups: Mapping[str, Sequence[str]] = MappingProxyType({})
    _optiq_added = False

    def _add_optiq_arguments(self) -> None:
        if self._optiq_added:
            return
        self._optiq_added = True
        from ..installation import plugin_manager

        added = argparse._ArgumentGroup(self)
        try:
            add = plugin_manager().hook.optiq_add_arguments
            add(command=self.optiq_command, group=added)
        except argparse.ArgumentError as error:
            raise OptiqError(
                f"A plugin adds an option that mlx_lm.{self.optiq_command} has already: {error}"
            ) from error
        for action in added._group_actions:
            if not action.dest.startswith(PREFIX) or action.default is not None:
                raise OptiqError(
                    f"A plugin adds {'/'.join(action.option_strings)} to mlx_lm."
                    f"{self.optiq_command}: options must start with --optiq- and default to None."
                )
        for title, actions in grouped(added._group_actions, self.optiq_groups).items():
            group = self.add_argument_group(f"optiq {title} (mlx-optiq-ext {__version__})")
            group._group_actions.extend(actions)

    def _relax(self, words) -> None:
        """Make stock options optional where one of ours on the command line replaces them."""
        names = {str(word).partition("=")[0] for word in words}
        for action in self._actions:
            if self.optiq_replaced.get(action.dest) in names:
                action.required = False

    def format_help(self) -> str:
        """Help text with our groups."""
        self._add_optiq_arguments()
        return super().format_help()

    def parse_args(self, args=None, namespace=None):  # pyright: ignore
        """Parse, and refuse what no option takes before any value of ours is looked at."""
        namespace, values, rest = self._parsed(args, namespace)
        if rest:
            from ..installation import option_names

            said = suggestion(self.optiq_command, rest, option_names())
            self.error(said or f"unrecognized arguments: {' '.join(rest)}")
        self._use(values, namespace)
        return namespace

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore
        """Parse, then move our values from the namespace to the session."""
        namespace, values, rest = self._parsed(args, namespace)
        self._use(values, namespace)
        return namespace, rest

    def _parsed(self, args, namespace) -> tuple[argparse.Namespace, dict[str, Any], list[str]]:
        """The stock namespace, our values, and what no option takes."""
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
        for name, variable in self.optiq_environment.items():
            if values.get(name) is None and (text := os.environ.get(variable)) is not None:
                values[name] = [text]
        return namespace, values, rest

    def _use(self, values: Mapping[str, Any], namespace: argparse.Namespace) -> None:
        """Check our values, if there are any, and keep them for the running command."""
        if all(value is None for value in values.values()):
            return
        running = session.running()
        if running is None or running.command != self.optiq_command:
            self.error("--optiq-* options need the command's own main()")
        options = SimpleNamespace(**values)
        try:
            instead = _checked(running, options, namespace)
        except OptiqError as error:
            self._refuse(error)
        running.options = options
        if instead is not None:
            raise Instead(instead)

    def _refuse(self, error: OptiqError, *, usage: bool = False) -> NoReturn:
        """End the command; of several processes one prints the error."""
        from mlx_optiq_ext import distributed

        if distributed.told(error):
            raise SystemExit(2) from error
        if usage:
            super().error(str(error))
        self.exit(2, f"mlx_lm.{self.optiq_command}: error: {error}\n")

    def error(self, message: str) -> NoReturn:
        """End the command as stock does; in one line, and all processes alike, where it is ours."""
        from mlx_optiq_ext import distributed

        ours = START in message
        if ours or any(word.startswith(START) for word in sys.argv[1:]):
            try:
                distributed.size()
                with distributed.together():
                    raise InputError(message)
            except OptiqError as error:
                self._refuse(error, usage=not ours)
        super().error(message)


def _checked(
    running: session.Session, options: SimpleNamespace, args: argparse.Namespace
) -> Run | None:
    """Check the options in every process; returns what runs in place of the command, if anything.

    Raises:
        OptiqError: One process refuses the options, or the processes were given different ones.
    """
    from mlx_optiq_ext import distributed

    distributed.size()
    with distributed.together():
        instead = check(running.command, options, args)
        distributed.agree(**{"command line": shlex.join(sys.argv[1:])}, **running.facts)
    return instead


def check(command: str, options: SimpleNamespace, args: argparse.Namespace) -> Run | None:
    """Ask all plugins whether these options can work, before anything is loaded.

    Returns:
        What is to run in place of the command, or None.

    Raises:
        OptiqError: A plugin refuses the options.
    """
    from ..installation import plugin_manager

    hook = plugin_manager().hook.optiq_check_options
    return next(iter(hook(command=command, options=options, args=args)), None)


class Instead(Exception):
    """Leaves a stock command's ``main`` for what runs in its place."""

    def __init__(self, run: Run):
        super().__init__()
        self.run = run


class _View(ModuleType):
    """argparse as one command module sees it."""

    def __init__(self, name: str, command: Command):
        super().__init__("argparse", argparse.__doc__)
        own = {
            "optiq_command": name,
            "optiq_replaced": command.replaced,
            "optiq_environment": command.environment,
            "optiq_groups": command.groups,
        }
        self.ArgumentParser = type("ArgumentParser", (Parser,), own)

    def __getattr__(self, name: str) -> Any:
        return getattr(argparse, name)


def _run(wrapped: Any, args: tuple, kwargs: dict) -> Any:
    try:
        return wrapped(*args, **kwargs)
    except Instead as raised:
        run = raised.run
    from mlx_optiq_ext import distributed

    # Outside the handler, so that errors of the run do not name Instead as their cause.
    return distributed.led(run)


def main(command: str, interrupted: Callable[[], str] | None = str):
    """Wrapper for a command's ``main``: opens the session and turns our errors into exit 2.

    Args:
        command: Name after ``mlx_lm.``.
        interrupted: As in `Command`.
    """

    def main(wrapped, instance, args, kwargs):
        with session.opened(command) as running, interruption.handled(command, message):
            from mlx_optiq_ext import distributed

            try:
                with distributed.together(), hub.named():
                    result = _run(wrapped, args, kwargs)
                    if running.failure is not None:
                        raise running.failure
                    distributed.finish()
                    return result
            except (OptiqError, KeyboardInterrupt) as raised:
                error = running.failure or raised
                if not isinstance(error, OptiqError):
                    raise
                if not distributed.told(error):
                    print(f"mlx_lm.{command}: error: {error}", file=sys.stderr)
                raise SystemExit(2) from error

    def message() -> str | None:
        running = session.running()
        if interrupted is None or running is None:
            return None
        if running.options is None:
            return interruption.NOTHING_DONE if interruption.requested() else None
        return f"interrupted{interrupted()}"

    return main


def patches(name: str, command: Command) -> tuple[Patch, Patch]:
    """The patches that give a stock command our options."""
    why = f"mlx_lm.{name} has no way to add an option"
    upstream = "mlx-lm #1578 (plugin registration)"
    return (
        Patch(
            f"mlx_lm.{name}:argparse",
            feature="flags",
            why=why,
            upstream=upstream,
            replace=lambda original: _View(name, command),
        ),
        Patch(
            f"mlx_lm.{name}:main",
            feature="flags",
            why="scopes the options to one run and prints our errors as the command's own",
            upstream=upstream,
            wrapper=main(name, command.interrupted),
        ),
    )
