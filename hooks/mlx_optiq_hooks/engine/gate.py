"""Decides, per feature, whether the installed mlx-lm can carry it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import mlx_optiq_compat as compat
from mlx_optiq_ext import plugins
from mlx_optiq_ext.errors import UnsupportedError

from .patch import Patch

#: The capabilities that patches belong to. ``flags`` is ours alone, compat/ knows the others.
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
    "plugins",
)


@dataclass(frozen=True)
class State:
    """Whether a feature is on, and why."""

    on: bool
    reason: str


@dataclass(frozen=True)
class Gate:
    """The verdict on one mlx-lm release.

    Attributes:
        version: Its version, or None if mlx-lm is not installed.
        verdict: ``"pinned"``, ``"untested"`` or ``"outside"``.
        reason: A sentence that says why.
        states: Feature -> state.
    """

    version: str | None
    verdict: str
    reason: str
    states: Mapping[str, State]

    def state(self, feature: str) -> State:
        """The state of one feature."""
        return self.states[feature]

    def require(self, feature: str) -> None:
        """Raise UnsupportedError with the reason unless the feature is on."""
        state = self.state(feature)
        if not state.on:
            raise UnsupportedError(state.reason)

    @classmethod
    def for_installed(cls, patches: Iterable[Patch]) -> "Gate":
        """Judge the mlx-lm that is, or would be, imported."""
        version = compat.installed_version()
        if version is None:
            off = State(False, "mlx-lm is not installed: pip install mlx-lm")
            return cls(None, "outside", off.reason, dict.fromkeys(FEATURES, off))
        verdict = compat.verdict(version)
        targets: dict[str, list[str]] = {feature: [] for feature in FEATURES}
        for patch in patches:
            targets[patch.feature].append(patch.target)
        blocked = plugins.blocked()
        states = {}
        for feature in FEATURES:
            if feature in blocked:
                states[feature] = State(False, f"{feature} is in MLX_OPTIQ_EXT_BLOCK: remove it")
            elif feature == "flags":
                # The flags stay even where nothing else works: they carry the reason to the user.
                states[feature] = State(True, "options are parsed and refused if off")
            elif not (known := compat.feature(feature, version)).on:
                states[feature] = State(False, known.reason)
            elif verdict.kind == "untested" and (wrong := compat.matching(targets[feature])):
                states[feature] = State(
                    False,
                    f"mlx-lm {version} is untested and differs where {feature} needs it "
                    f"({wrong[0]}): install a release from the compat table",
                )
            else:
                states[feature] = State(True, verdict.reason)
        return cls(version, verdict.kind, verdict.reason, states)
