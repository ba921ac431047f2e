"""The methods of ``--optiq-sensitivity`` by name.

To add one, write a class as `Method` describes it and hand an instance to `register`, or return it
from the plugin hook ``optiq_sensitivity_methods``.
"""

import re

from ...errors import InputError
from .kl import KL
from .method import Method
from .taylor import Taylor

#: Name of the default method.
DEFAULT = "taylor"

_methods: dict[str, Method] = {}


def register(method: Method) -> None:
    """Offer a method under its name, in place of one that has the same name.

    Raises:
        InputError: It lacks something that `Method` asks for.
    """
    what = type(method).__name__
    name, version = getattr(method, "name", None), getattr(method, "version", None)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise InputError(
            f"the sensitivity method {what} has the name {name!r}: give it one of lower-case "
            "letters, digits and hyphens"
        )
    if not isinstance(version, int) or not isinstance(getattr(method, "needs", None), frozenset):
        raise InputError(
            f"the sensitivity method {name!r} does not say what it needs (a frozenset) and which "
            "version its measurements have (a whole number): add needs and version"
        )
    if not callable(getattr(method, "measure", None)):
        raise InputError(f"the sensitivity method {name!r} cannot measure: add measure(problem)")
    _methods[name] = method


def unregister(name: str) -> None:
    """Remove a method; an unknown name is ignored."""
    _methods.pop(name, None)


def find(name: str) -> Method:
    """The method of a name.

    Raises:
        InputError: There is no such method; the message lists all methods.
    """
    if name not in _methods:
        raise InputError(
            f"there is no sensitivity method {name!r}: give one of {', '.join(names())}"
        )
    return _methods[name]


def names() -> tuple[str, ...]:
    """The names of all methods, sorted."""
    return tuple(sorted(_methods))


def summary(name: str) -> str:
    """A method's name, the first line of its docstring and what it needs, in one line."""
    method = find(name)
    line = (type(method).__doc__ or "").strip().partition("\n")[0].rstrip(".")
    needs = " and ".join(sorted(need.value for need in method.needs))
    return f"{name}: {line or 'no description'}" + (f" (needs {needs})" if needs else "")


register(Taylor())
register(KL())
