"""What the catalogue's state machine is made of: names, copies of weights, and loads."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from ...errors import OptiqError


class UnknownAdapterError(OptiqError):
    """No adapter of that name is offered."""


class AdapterConflictError(OptiqError):
    """An adapter of that name is offered, loaded or unloaded already."""


class AdaptersBusyError(OptiqError):
    """The server did not get to it: all adapters that may be mounted are in use, or it is busy."""


class State(Enum):
    """Where a copy of an adapter's weights is."""

    ABSENT = "absent"
    LOADING = "loading"
    MOUNTED = "mounted"
    DRAINING = "draining"


@dataclass(eq=False)
class Copy:
    """Weights on the model, shared by all names that have the same.

    Attributes:
        digest: Digest of the weights.
        state: Where they are.
        adapter: What `States.finish` was given.
        used: When it was last acquired; larger is later.
        heir: The copy that takes its slot.
        held: Whether it is mounted again if its heir fails.
    """

    digest: str
    state: State = State.LOADING
    adapter: Any = None
    used: int = 0
    heir: "Copy | None" = None
    held: bool = False


@dataclass(eq=False)
class Entry:
    """A name. A new one is offered only after its first load.

    Attributes:
        offer: What the name stands for; None before the first load has finished.
        copy: Its weights.
        pin: What its weights were read from.
        owner: The load in progress.
    """

    offer: Any = None
    pin: Any = None
    copy: Copy | None = None
    owner: "Ticket | None" = None


@dataclass(eq=False)
class Ticket:
    """One load, from its beginning until its caller leaves it.

    Attributes:
        name: The adapter's name.
        entry: What the name was when the load began.
        offer: What the name is to stand for; None for a load by a request.
        number: Earlier loads have smaller ones.
        started: Whether its files may be read.
        taken: Whether the generation thread has taken it over.
        copy: Its copy, once it was placed.
        victim: The copy whose slot it takes.
        pin: What its weights were read from.
    """

    name: str
    entry: Entry
    offer: Any
    number: int
    started: bool = False
    taken: bool = False
    copy: Copy | None = None
    victim: Copy | None = None
    pin: Any = None
