"""Whether a patch is still what mlx-lm calls, on a stand-in mlx_lm."""

import importlib
import sys

import pytest

from mlx_optiq_hooks.engine.patch import Engine, Patch


def patch(target, feature="feature"):
    return Patch(target, feature, "for the test", "none: a test", wrapper)


def wrapper(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs)


def test_a_reload_puts_functions_and_classes_in_place_that_are_not_ours(module):
    name = module()
    engine = Engine((patch(f"{name}:f"), patch(f"{name}:Child.method", "b")))
    engine.apply()
    target = importlib.import_module(name)
    assert [engine.problem("feature"), engine.problem("b")] == [None, None]
    importlib.reload(target)
    assert [engine.live(each) for each in engine.patches] == [False, False]
    assert engine.problem("feature") == (
        f"feature needs a patch that is gone ({name}:f): {name} was reloaded, or another tool put "
        "its own in its place: start anew without that"
    )
    delattr(target, "Child")
    assert f"({name}:Child.method)" in str(engine.problem("b"))


def test_loading_imports_a_features_modules_and_no_others(module):
    name, another, absent = module(), module(), module("import not_installed_anywhere\n")
    engine = Engine((patch(f"{name}:f"), patch(f"{absent}:f"), patch(f"{another}:f", "b")))
    engine.apply()
    engine.load(["feature"])
    assert name in sys.modules
    assert another not in sys.modules
    assert engine.problem("feature") is None


@pytest.mark.newest  # older releases take the whole module
def test_a_name_that_another_module_took_and_lost_is_missed(command, tiny, monkeypatch):
    consumer = importlib.import_module("mlx_lm.generate")
    words = ("--model", tiny, "--prompt", "1 + 1", "--max-tokens", 2, "--optiq-kv", 4)
    assert command("generate", *words).status == 0
    original = consumer.make_prompt_cache.__wrapped__
    monkeypatch.setattr(consumer, "make_prompt_cache", lambda *args: original(*args))
    done = command("generate", *words)
    assert done.status == 2
    assert "needs a patch that is gone (mlx_lm.models.cache:make_prompt_cache)" in done.err
    assert done.out == ""
