"""Options and run state: typed, one a feature, and gone with the command."""

from dataclasses import FrozenInstanceError, dataclass
from types import SimpleNamespace

import pytest

from mlx_optiq_ext.planning import Budget
from mlx_optiq_hooks.commands.convert.options import Options, Speed, speed
from mlx_optiq_hooks.commands.table import COMMANDS
from mlx_optiq_hooks.engine import session
from mlx_optiq_hooks.engine.options import given, read, spelled

BUDGET = (Budget(4.5),)


@dataclass
class First:
    value: int = 0


@dataclass
class Second:
    value: int = 0


def test_a_command_has_one_state_of_each_feature():
    with session.opened("convert") as running:
        session.keep(First(1))
        running.keep(Second(2))
        running.keep(First(3))
        assert session.state(First) == First(3)
        assert session.state(Second) == Second(2)


def test_a_command_inside_another_sees_its_own_state_only():
    with session.opened("convert"):
        session.keep(First(1))
        with session.opened("lora"):
            assert session.state(First) is None
        assert session.state(First) == First(1)


def test_state_is_gone_after_the_command_and_kept_for_none():
    with session.opened("convert"):
        session.keep(First())
    session.keep(First())
    assert session.state(First) is None
    assert session.running() is None


def test_options_that_were_not_given_have_their_defaults():
    parsed = SimpleNamespace(budget=BUDGET, effort="refine", protect=None, example_bits=8)
    options = read(Options, parsed)
    assert options == Options(budget=BUDGET, effort="refine")
    assert given(options) == ["budget", "effort"]
    assert spelled(["kv_only", "budget"]) == "--optiq-kv-only, --optiq-budget"
    with pytest.raises(FrozenInstanceError):
        options.budget = 3.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("options", "planned", "text_only"),
    [
        (Options(), False, False),
        (Options(kv_budget=4.5), False, False),
        (Options(budget=BUDGET), True, True),
        (Options(min_tps=Speed(40)), True, True),
        (Options(max_kl=0.1), True, True),
        (Options(budget=BUDGET, keep_unused_modalities=True), True, False),
    ],
)
def test_what_a_conversion_was_asked_for(options, planned, text_only):
    assert (options.planned, options.text_only) == (planned, text_only)


def test_a_speed_is_for_this_machine_unless_a_chip_is_named():
    assert speed("40") == Speed(40.0, "auto")
    assert speed("40@m4-max-40") == Speed(40.0, "m4-max-40")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_stands_in_its_options(name):
    """A parsed value that no dataclass reads would be lost in silence."""
    import argparse
    import importlib

    group = argparse.ArgumentParser().add_argument_group()
    COMMANDS[name].add_arguments(group)
    own = {action.dest.removeprefix("optiq_") for action in group._group_actions}
    beside = (f"mlx_optiq_hooks.commands.{each}" for each in ("kv", "prompts", "serving"))
    modules = {COMMANDS[name].add_arguments.__module__, *beside}
    kinds = [getattr(importlib.import_module(each), "Options", None) for each in modules]
    fields = {field for kind in kinds if kind for field in kind.__dataclass_fields__}
    assert own <= fields
