"""Decides, per feature, whether the installed mlx-lm can carry it, and whether its patches work."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import mlx_optiq_compat as compat
from mlx_optiq_ext import plugins
from mlx_optiq_ext.errors import UnsupportedError

from .patch import Engine, Patch

#: The capabilities that patches belong to. compat/ knows all of them except ``flags``.
FEATURES = (
    "flags",
    "weights",
    "kv",
    "kv_batched",
    "adapters",
    "adapters_batched",
    "lora",
    "modalities",
    "latency",
    "evaluation",
    "yolo",
    "sharded",
    "serving",
    "prompts",
    "plugins",
)

#: Feature -> features that it needs: packed caches are made where plugins make theirs.
NEEDS = {
    "prompts": ("plugins",),
    "kv": ("plugins",),
    "kv_batched": ("kv", "plugins"),
    "adapters_batched": ("adapters",),
}

#: Feature -> features whose patches must work too where mlx-lm supports them: otherwise rows of a
#: batch would get another request's adapter.
BESIDE = {"adapters": ("adapters_batched",)}


@dataclass(frozen=True)
class State:
    """Whether a feature is on, and why."""

    on: bool
    reason: str


@dataclass(frozen=True)
class Gate:
    """The verdict on an mlx-lm release with an MLX, and the state of the patches.

    Attributes:
        version: mlx-lm's version, or None if it is not installed.
        verdict: ``"pinned"``, ``"untested"`` or ``"outside"``.
        reason: A sentence that says why.
        states: Feature -> what the release allows.
        patches: Every patch.
        engine: Returns the engine that applies the patches of the features that are on.
    """

    version: str | None
    verdict: str
    reason: str
    states: Mapping[str, State]
    patches: tuple[Patch, ...]
    engine: Callable[[], Engine]

    def state(self, feature: str) -> State:
        """Whether a feature is on, as far as its patches' modules are loaded."""
        for each in self._wanted(feature):
            state = self.states[each]
            if not state.on:
                return state
            if problem := self.engine().problem(each):
                return State(False, problem)
        return self.states[feature]

    def checked(self, feature: str) -> State:
        """Like `state`, but also compares mlx-lm's source with the recorded signatures."""
        state = self.state(feature)
        if feature == "flags" or not state.on:
            return state
        for each in self._wanted(feature):
            if wrong := _differing(names(self.patches, each)):
                return State(
                    False,
                    f"mlx-lm {self.version} is not what was released under that number where "
                    f"{each} needs it ({wrong}): install it anew",
                )
        return state

    def _wanted(self, feature: str) -> tuple[str, ...]:
        """A feature and all features that must be on for it."""
        beside = (each for each in BESIDE.get(feature, ()) if self.states[each].on)
        return (feature, *NEEDS.get(feature, ()), *beside)

    def require(self, feature: str) -> None:
        """Make sure that a feature works before anything is done with it.

        Its patches' modules are imported, so that every patch can be proved live.

        Raises:
            UnsupportedError: The feature is off, with the reason and the remedy.
        """
        wanted = self._wanted(feature)
        for each in wanted:
            _refuse_if_off(self.states[each])
        self.engine().load(wanted)
        _refuse_if_off(self.checked(feature))

    @classmethod
    def for_installed(cls, patches: Iterable[Patch], engine: Callable[[], Engine]) -> "Gate":
        """Judge the mlx-lm that is, or would be, imported."""
        patches, version = tuple(patches), compat.installed_version()
        if version is None:
            off = State(False, "mlx-lm is not installed: pip install mlx-lm")
            states = dict.fromkeys(FEATURES, off)
            return cls(None, "outside", off.reason, states, patches, engine)
        mlx = compat.installed_mlx()
        verdict, unknown = compat.verdict(version, mlx), compat.verdict(version).kind == "untested"
        blocked = plugins.blocked()
        states: dict[str, State] = {}
        for feature in FEATURES:
            if feature in blocked:
                states[feature] = State(False, f"{feature} is in MLX_OPTIQ_EXT_BLOCK: remove it")
            elif feature == "flags":
                # The flags stay even if nothing else works: they give the user the reason.
                states[feature] = State(True, "options are parsed and refused if off")
            elif not (known := compat.feature(feature, version, mlx)).on:
                states[feature] = State(False, known.reason)
            elif unknown and (wrong := _differing(names(patches, feature))):
                states[feature] = State(
                    False,
                    f"mlx-lm {version} is untested and differs where {feature} needs it "
                    f"({wrong}): install a release from the compat table",
                )
            else:
                states[feature] = State(True, verdict.reason)
        for feature, needs in NEEDS.items():
            off = (states[need] for need in needs if not states[need].on)
            states[feature] = next(off, states[feature]) if states[feature].on else states[feature]
        return cls(version, verdict.kind, verdict.reason, states, patches, engine)


def names(patches: Iterable[Patch], feature: str) -> tuple[str, ...]:
    """Names that a feature's patches replace, then names that they use."""
    own = [patch for patch in patches if patch.feature == feature]
    targets = (patch.target for patch in own)
    return tuple(dict.fromkeys([*targets, *(use for patch in own for use in patch.uses)]))


@functools.cache
def _differing(names: tuple[str, ...]) -> str | None:
    """The first of these names whose source matches no recorded release, or None."""
    return next(iter(compat.matching(names)), None)


def _refuse_if_off(state: State) -> None:
    if not state.on:
        raise UnsupportedError(state.reason)
