"""What the patch tables promise, and what is recorded of the releases they are for."""

import pytest

from mlx_optiq_compat import feature, rows
from mlx_optiq_compat.signature import of_release
from mlx_optiq_hooks import tables
from mlx_optiq_hooks.engine.gate import FEATURES


@pytest.mark.parametrize("patch", tables(), ids=lambda patch: patch.target)
def test_a_patch_gives_its_reason_and_what_would_end_it(patch):
    assert patch.feature in FEATURES
    assert len(patch.why.split()) > 3
    assert "#" in patch.upstream or patch.upstream.startswith("none: ")
    assert (patch.wrapper is None) is not (patch.replace is None)


def test_no_feature_patches_an_attribute_twice():
    targets = [(patch.feature, patch.target) for patch in tables()]
    assert len(targets) == len(set(targets))


@pytest.mark.parametrize("version", [row.mlx_lm for row in rows() if row.verdict != "outside"])
def test_what_patches_replace_and_use_is_recorded_for_the_releases_of_its_feature(version):
    recorded = of_release(version)
    modules = {target.partition(":")[0] for target in recorded}
    carried = [p for p in tables() if p.feature == "flags" or feature(p.feature, version).on]
    wanted = [name for patch in carried for name in (patch.target, *patch.uses)]
    missing = [target for target in wanted if target not in recorded]
    assert [target for target in missing if target.partition(":")[0] in modules] == []
    assert {target.partition(":")[0] for target in missing} <= {"mlx_lm.cli"}
