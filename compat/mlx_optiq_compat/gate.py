"""Decides whether a release of mlx-lm is supported, and which features work on it."""

from __future__ import annotations

from dataclasses import dataclass

from .matrix import Kind, Row, features, rows, supported
from .version import release, within


@dataclass(frozen=True)
class Verdict:
    """The verdict on an mlx-lm version with an MLX version.

    Attributes:
        version: The version of mlx-lm asked about.
        kind: ``"pinned"`` (tested), ``"untested"`` (on where signatures match) or ``"outside"``
            (off; mlx-lm runs as stock).
        reason: A sentence for the user.
    """

    version: str
    kind: Kind
    reason: str


@dataclass(frozen=True)
class FeatureState:
    """The state of a feature on an mlx-lm version.

    Attributes:
        name: The feature, for example ``"kv_batched"``.
        on: Whether it works there. For an untested version also ask ``matching``.
        reason: A sentence for the user: why it is on or off, and what would turn it on.
    """

    name: str
    on: bool
    reason: str


def verdict(version: str, mlx: str | None = None) -> Verdict:
    """Judge an mlx-lm version, and the MLX installed with it.

    A row of the matrix decides for exactly its release. Everything else newer than the oldest
    supported release is untested: later releases, releases in between that have no row, and
    ``.dev``, ``rc``, ``.post`` or local builds of a tested one.

    An MLX that the release does not run with puts it outside; one that is newer than what it was
    tested with makes it untested. A version without a row has the range of the row before it.

    Args:
        version: For example ``"0.32.2"`` or ``"0.33.0.dev1"``.
        mlx: The version of MLX; None leaves it out of account.

    Returns:
        The verdict; never raises. A version that starts with no number is outside.
    """
    try:
        numbers = release(version)
    except ValueError:
        return Verdict(version, "outside", f"mlx-lm's version {version!r} cannot be read")
    row = next((row for row in reversed(rows()) if release(row.mlx_lm) <= numbers), None)
    if row is None or numbers < release(supported()[0].mlx_lm):
        return Verdict(version, "outside", _row_reason(version, "outside"))
    # A suffix makes it another build than the one that was tested.
    same = release(row.mlx_lm) == numbers and not version.lstrip("0123456789.")
    kind: Kind = row.verdict if same else "untested"
    return _beside(mlx, row, Verdict(version, kind, _row_reason(version, kind)))


def _beside(mlx: str | None, row: Row, alone: Verdict) -> Verdict:
    """The verdict on a release, once the MLX beside it counts too."""
    if mlx is None or alone.kind == "outside":
        return alone
    version = alone.version
    try:
        fits, newer = within(mlx, row.mlx), release(mlx) > release(row.tested_mlx)
    except ValueError:
        return Verdict(version, "untested", f"{alone.reason}; mlx's version {mlx!r} cannot be read")
    if not fits:
        why = f" ({row.beyond})" if row.beyond and release(mlx) >= release(row.tested_mlx) else ""
        return Verdict(
            version,
            "outside",
            f"mlx-lm {version} does not run with mlx {mlx}{why}: pip install 'mlx{row.mlx}', or a "
            f"release of mlx-lm from the compat table that does",
        )
    if newer and alone.kind == "pinned":
        return Verdict(version, "untested", f"{alone.reason}; mlx {mlx} is newer and untested")
    return alone


def feature(name: str, version: str, mlx: str | None = None) -> FeatureState:
    """The state of a feature on an mlx-lm version, with an MLX version.

    Args:
        name: A feature of ``matrix.toml``.
        version: For example ``"0.31.3"``.
        mlx: The version of MLX; None leaves it out of account.

    Returns:
        The state, with a sentence for the user.

    Raises:
        ValueError: The matrix has no such feature.
    """
    known = {each.name: each for each in features()}
    if name not in known:
        raise ValueError(f"unknown feature {name!r}; known: {', '.join(known)}")
    found, overall = known[name], verdict(version, mlx)
    if overall.kind == "outside":
        return FeatureState(name, False, overall.reason)
    if release(version) < release(found.since):
        instead = f"; below that, requests run {found.below}" if found.below else ""
        needs = f"needs {found.since} or newer{instead}"
        return FeatureState(name, False, f"mlx-lm {version} lacks {found.lacks}: {needs}")
    return FeatureState(name, True, overall.reason)


def _row_reason(version: str, kind: Kind) -> str:
    oldest, newest = supported()[0].mlx_lm, supported()[-1].mlx_lm
    if kind == "pinned":
        row = next(row for row in rows() if release(row.mlx_lm) == release(version))
        pins = f"mlx {row.tested_mlx} and transformers {row.tested_transformers}"
        return f"mlx-lm {version} is tested with {pins}"
    if kind == "untested":
        return f"mlx-lm {version} is untested (tested: {oldest} to {newest})"
    return f"mlx-lm {version} is older than {oldest}, the oldest release supported"
