"""A sensitivity method from outside, in one file through the public registry."""

import json

import pytest
from toy_fixtures import PLAIN, quiet

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.weights import Need, plan_folder, register_method
from mlx_optiq_ext.weights.sensitivity import registry

pytestmark = pytest.mark.newest

OUTSIDE = '''
from mlx_optiq_ext import hookimpl


class Depth:
    """Ranks tensors by how deep they are; takes no time and no memory."""

    name, version, needs = "depth", 1, frozenset()

    def measure(self, problem):
        return {
            tensor.path: {
                p: 0.0 if not p.quantized else (1 + number) * tensor.size * 4.0**-p.bits
                for p in tensor.precisions
            }
            for number, tensor in enumerate(problem.tensors)
        }


@hookimpl
def optiq_sensitivity_methods():
    return [Depth()]
'''


def test_a_method_from_outside_converts_by_the_stock_command(run, plugin, toy, text, tmp_path):
    env, out = plugin({}, "outside", OUTSIDE), tmp_path / "out"
    source = ("--hf-path", toy, "--mlx-path", out, "--optiq-calibration", text)
    words = (*PLAIN, "--optiq-budget", "4", "--optiq-sensitivity", "depth")
    done = run("mlx_lm.convert", *source, *words, env=env, check=True)
    assert "[optiq] Measuring 15 tensors with depth\n" in done.stdout
    metadata = json.loads((out / "optiq_metadata.json").read_text())
    assert metadata["method"] == "depth"
    assert metadata["achieved_bpw"] <= 4
    listed = run("mlx_lm.convert", "--help", env=env, check=True).stdout
    assert "{depth,kl,taylor}" in listed
    assert "depth: Ranks tensors by how deep they are; takes no time" in " ".join(listed.split())
    unknown = run("mlx_lm.convert", *source, "--optiq-sensitivity", "other", env=env)
    assert unknown.returncode == 2
    assert "invalid choice: 'other'" in unknown.stderr


class Even:
    """Takes every element for as sensitive as any other."""

    name, version, needs = "even", 1, frozenset()

    def measure(self, problem):
        return {t.path: {p: t.size * 4.0**-p.bits for p in t.precisions} for t in problem.tensors}


@pytest.fixture(autouse=True)
def own_registry():
    """What a test registers ends with it."""
    registered = {name: registry.find(name) for name in registry.names()}
    yield
    for name in set(registry.names()) - set(registered):
        registry.unregister(name)
    for method in registered.values():
        registry.register(method)


def test_a_registered_method_is_found_by_its_name(toy, text):
    request = quiet(budget=4.0, calibration=text, method="even")
    with pytest.raises(InputError, match="no sensitivity method 'even': give one of kl, taylor"):
        plan_folder(str(toy), request)
    register_method(Even())
    assert plan_folder(str(toy), request).method == "even"
    assert registry.summary("even") == "even: Takes every element for as sensitive as any other"


def test_what_a_method_needs_stands_in_its_summary():
    assert "needs calibration sequences and gradients of the model" in registry.summary("taylor")
    assert registry.find("kl").needs == {Need.CALIBRATION}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Even one"}, "has the name 'Even one'"),
        ({"needs": ()}, "'even' does not say what it needs"),
        ({"version": None}, "'even' does not say what it needs"),
        ({"measure": None}, "'even' cannot measure"),
    ],
)
def test_a_method_that_lacks_something_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        register_method(type("Changed", (Even,), change)())
