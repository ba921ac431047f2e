"""The patch engine, on a stand-in mlx_lm whose modules the real patches do not know."""

import importlib
import itertools
import sys
from textwrap import dedent
from typing import Any

import pytest
import wrapt

from mlx_optiq_hooks.engine.patch import Engine, Patch, bind


def marked(wrapped, instance, args, kwargs):
    return f"{wrapped(*args, **kwargs)}+ours"


def other(wrapped, instance, args, kwargs):
    return f"{wrapped(*args, **kwargs)}+other"


def patch(target, feature="feature", wrapper=marked, replace=None):
    if replace is not None:
        wrapper = None
    return Patch(target, feature, "for the test", "none: a test", wrapper, replace)


def consumer(module, name):
    return module(f"from {name} import f\n\ndef call():\n    return f()\n")


ORDERS = [
    order
    for length in range(1, 6)
    for order in itertools.product(("import", "apply", "undo"), repeat=length)
    if order.count("import") == 1
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_any_order_of_import_apply_and_undo(module, order):
    name = module()
    using = consumer(module, name)
    patches = (patch(f"{name}:f"), patch(f"{name}:Child.method"))
    engine = Engine(patches)
    target = user = None
    applied = False
    for step in order:
        if step == "import":
            target, user = importlib.import_module(name), importlib.import_module(using)
        else:
            getattr(engine, step)()
            applied = step == "apply"
        if target is None or user is None:
            assert name not in sys.modules, "the engine must not import its targets"
            assert [engine.live(each) for each in patches] == [None, None]
            continue
        suffix = "+ours" if applied else ""
        assert (target.f(), user.call(), target.Child().method()) == (
            f"f{suffix}",
            f"f{suffix}",
            f"method{suffix}",
        )
        assert target.Parent().method() == "method"
        assert [engine.live(each) for each in patches] == [applied, applied]
        if not applied:
            assert type(target.f) is type(dedent), "undo restores the function itself"
            assert target.f is user.f
            assert "method" not in vars(target.Child)
    assert engine.failures == {}


def test_undo_restores_the_very_objects(module):
    name = module()
    target = importlib.import_module(name)
    before = {"f": target.f, **vars(target.Parent)}
    names = ("f", "Parent.method", "Parent.static", "Parent.create")
    engine = Engine(tuple(patch(f"{name}:{each}") for each in names))
    engine.apply()
    assert target.Parent.static() == "static+ours"
    assert target.Parent.create() == "Parent+ours"
    assert target.Child.create() == "Child+ours"
    assert target.Parent().method() == "method+ours"
    engine.undo()
    assert target.f is before["f"]
    for each in ("method", "static", "create"):
        assert vars(target.Parent)[each] is before[each]


def test_late_apply_rebinds_names_inside_mlx_lm_only(module):
    name = module()
    using, target = importlib.import_module(consumer(module, name)), importlib.import_module(name)
    outside = target.f
    engine = Engine((patch(f"{name}:f"),))
    engine.apply()
    assert using.f is target.f
    assert using.call() == "f+ours"
    assert outside() == "f"
    engine.undo()
    assert using.f is target.f is outside


def test_a_name_that_still_means_the_original_is_not_live(module):
    name = module()
    target = importlib.import_module(name)
    engine = Engine((patch(f"{name}:f"),))
    original = target.f
    engine.apply()
    assert engine.live(engine.patches[0])
    vars(importlib.import_module(consumer(module, name)))["f"] = original
    assert engine.live(engine.patches[0]) is False


def test_another_wrapper_above_ours_stays_when_ours_is_undone(module):
    name = module()
    engine = Engine((patch(f"{name}:f"),))
    engine.apply()
    target = importlib.import_module(name)
    wrapt.wrap_function_wrapper(target, "f", other)
    theirs = target.f
    assert target.f() == "f+ours+other"
    assert engine.live(engine.patches[0])
    engine.undo()
    assert target.f is theirs
    assert target.f() == "f+other"
    engine.apply()
    assert target.f() == "f+other+ours"
    engine.undo()
    assert target.f is theirs


def test_another_wrapper_below_ours_stays_when_ours_is_undone(module):
    name = module()
    target = importlib.import_module(name)
    wrapt.wrap_function_wrapper(target, "f", other)
    theirs = target.f
    engine = Engine((patch(f"{name}:f"),))
    engine.apply()
    assert target.f() == "f+other+ours"
    engine.undo()
    assert target.f is theirs


def test_a_feature_with_a_missing_target_is_off_as_a_whole_and_others_stay_on(module):
    name, lacking = module(), module("x = 1\n")
    engine = Engine(
        (patch(f"{name}:f"), patch(f"{lacking}:g"), patch(f"{name}:Parent.method", "b"))
    )
    engine.apply()
    target = importlib.import_module(name)
    assert target.f() == "f+ours"
    assert importlib.import_module(lacking).x == 1
    assert target.f() == "f"
    assert type(target.f) is type(dedent)
    assert target.Parent().method() == "method+ours"
    assert list(engine.failures) == ["feature"]
    assert engine.failures["feature"].startswith(f"{lacking}:g: AttributeError: ")
    assert str(engine.problem("feature")).startswith(
        f"feature needs a patch that failed ({lacking}:g: AttributeError: "
    )
    assert engine.problem("b") is None
    engine.apply()
    assert target.f() == "f", "a feature that failed stays off"


@pytest.mark.parametrize("missing", [None, "first", "second"])
@pytest.mark.parametrize("attribute", ["f", "Parent.method", "Child.method"])
def test_two_features_share_an_attribute_and_either_may_go(module, attribute, missing):
    name = module()
    engine = Engine(
        (
            patch(f"{name}:{attribute}", feature="first"),
            patch(f"{name}:{attribute}", feature="second", wrapper=other),
            *([patch(f"{name}:absent", feature=missing)] if missing else []),
        )
    )
    target = importlib.import_module(name)
    *path, last = attribute.split(".")
    parent: Any = getattr(target, path[0]) if path else target
    before = vars(parent).get(last)

    def call():
        return getattr(parent() if path else parent, last)()

    engine.apply()
    assert call() == last + {None: "+ours+other", "first": "+other", "second": "+ours"}[missing]
    states = {each.feature: engine.live(each) for each in engine.patches[:2]}
    assert states == {"first": missing != "first", "second": missing != "second"}
    engine.undo()
    assert vars(parent).get(last) is before
    assert call() == last


def test_a_failure_does_not_reach_the_import(module):
    def broken(original):
        raise RuntimeError("broken stand-in")

    name = module()
    engine = Engine((patch(f"{name}:f", replace=broken),))
    engine.apply()
    assert importlib.import_module(name).f() == "f"
    assert engine.failures == {"feature": f"{name}:f: RuntimeError: broken stand-in"}


def test_a_module_whose_import_raises_is_patched_when_it_imports(module, tmp_path):
    name = module("raise ImportError('no lm_eval here')\n")
    engine = Engine((patch(f"{name}:f"),))
    engine.apply()
    with pytest.raises(ImportError, match="no lm_eval here"):
        importlib.import_module(name)
    assert engine.failures == {}
    assert engine.live(engine.patches[0]) is None
    tmp_path.joinpath(*name.split(".")).with_suffix(".py").write_text("def f():\n    return 'f'\n")
    importlib.invalidate_caches()
    assert importlib.import_module(name).f() == "f+ours"


def test_replacing_a_module_attribute_leaves_that_module_alone(module):
    name = module("import argparse\n")
    view = object()
    engine = Engine((patch(f"{name}:argparse", replace=lambda original: view),))
    engine.apply()
    target = importlib.import_module(name)
    assert target.argparse is view
    assert engine.live(engine.patches[0])
    engine.undo()
    assert target.argparse is sys.modules["argparse"]


def test_two_engines_undo_in_either_order(module):
    name = module()
    first, second = (Engine((patch(f"{name}:f", wrapper=w),)) for w in (marked, other))
    first.apply()
    second.apply()
    target = importlib.import_module(name)
    assert sorted(target.f().split("+")) == ["f", "other", "ours"]
    first.undo()
    assert target.f() == "f+other"
    second.undo()
    assert target.f() == "f"


def test_bind_names_positional_arguments_and_unfolds_keywords():
    def quantize(model, config, bits=4, **others):
        raise AssertionError("bind does not call")

    assert bind(quantize, ("m", "c"), {"bits": 3, "mode": "affine"}) == {
        "model": "m",
        "config": "c",
        "bits": 3,
        "mode": "affine",
    }
    with pytest.raises(TypeError, match="config"):
        bind(quantize, ("m",), {})
