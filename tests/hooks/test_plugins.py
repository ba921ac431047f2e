"""Installed plugins: their order, their failures, blocking and tracing."""

import pytest

from mlx_optiq_hooks.engine import spec

GOOD = """
from mlx_optiq_ext import hookimpl

@hookimpl
def optiq_status():
    return ["good: here"]

class Method:
    version, needs = 1, frozenset()
    def __init__(self, name):
        self.name = name
    def measure(self, problem):
        return {}

@hookimpl
def optiq_sensitivity_methods():
    return [Method("kl"), Method("mine")]

@hookimpl
def optiq_resolve_adapter(name):
    return "/adapters/good" if name == "good" else None

@hookimpl
def optiq_prompt_cache(model, max_kv_size):
    return [f"{model} {max_kv_size}"]
"""
BROKEN = {
    "misspelt": (
        "from mlx_optiq_ext import hookimpl\n\n@hookimpl\ndef optiq_statuss():\n    return []\n",
        "PluginValidationError: unknown hook 'optiq_statuss'",
    ),
    "argument": (
        "from mlx_optiq_ext import hookimpl\n\n@hookimpl\ndef optiq_status(more):\n    return []\n",
        "more",
    ),
    "raising": ("raise RuntimeError('cannot load')\n", "RuntimeError: cannot load"),
    "exiting": ("raise SystemExit(3)\n", "SystemExit: 3"),
    "wrapper": (
        "from mlx_optiq_ext import hookimpl\n\n@hookimpl(wrapper=True)\ndef optiq_status():\n"
        "    return (yield)\n",
        "TypeError: optiq_status is a hook wrapper",
    ),
    "missing": ("import no_such_module_anywhere\n", "ModuleNotFoundError: No module named"),
}
STATUS = "import mlx_optiq_ext; print(mlx_optiq_ext.status())"


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_left_out_and_the_others_go_on(run, fake_mlx_lm, plugin, kind):
    source, reason = BROKEN[kind]
    # Loaded before the good one: it stands first on the path.
    env = plugin(plugin(fake_mlx_lm(), "good", GOOD), "broken", source)
    done = run("python", "-c", STATUS, env=env, check=True)
    assert done.stderr.startswith("mlx_optiq_ext: plugin 'broken' left out (")
    assert reason in done.stderr
    assert "good: here" in done.stdout
    assert "plugins: optiq, good\n" in done.stdout
    assert "  left out: broken (" in done.stdout
    asked = run("python", "-m", "mlx_lm", "convert", "--optiq-budget", "0", env=env)
    assert asked.returncode == 2
    assert "argument --optiq-budget: '0' is not" in asked.stderr


@pytest.mark.parametrize("kind", ["misspelt", "raising"])
def test_a_broken_plugin_is_one_line_on_stderr(run, fake_mlx_lm, plugin, kind):
    env = plugin(fake_mlx_lm(), "broken", BROKEN[kind][0])
    assert run("python", "-c", STATUS, env=env, check=True).stderr.count("\n") == 1


FAILING = """
from mlx_optiq_ext import hookimpl

@hookimpl
def optiq_add_arguments(command, group):
    raise RuntimeError("no options today")

@hookimpl
def optiq_status():
    return 1 / 0
"""


def test_a_plugin_that_raises_is_named_and_the_command_goes_on(run, fake_mlx_lm, plugin):
    env = plugin(plugin(fake_mlx_lm(), "good", GOOD), "failing", FAILING)
    named = "mlx_optiq_ext: plugin 'failing' failed in "
    plain = run("python", "-m", "mlx_lm", "convert", env=env, check=True)
    assert plain.stderr == f"{named}optiq_add_arguments (RuntimeError: no options today)\n"
    asked = run("python", "-m", "mlx_lm", "convert", "--optiq-budget", "0", env=env)
    assert asked.returncode == 2
    assert "argument --optiq-budget: '0' is not" in asked.stderr
    done = run("python", "-c", STATUS, env=env, check=True)
    assert done.stderr == f"{named}optiq_status (ZeroDivisionError: division by zero)\n"
    assert "good: here" in done.stdout


ENDINGS = {
    "raises": ("raise RuntimeError('not today')", "RuntimeError: not today"),
    "exits": ("sys.exit(3)", "SystemExit: 3"),
    "returns nonsense": ("return 3.5", "TypeError: it returned 3.5, not "),
}


def hooks():
    return [name for name in vars(spec) if name.startswith("optiq_")]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_plugin_that_fails_is_named_in_every_hook(run, fake_mlx_lm, plugin, ending):
    code, reason = ENDINGS[ending]
    functions = "".join(f"@hookimpl\ndef {hook}():\n    {code}\n" for hook in hooks())
    failing = f"import sys\nfrom mlx_optiq_ext import hookimpl\n{functions}"
    others = "from mlx_optiq_ext import hookimpl\n@hookimpl(trylast=True)\ndef optiq_status():\n"
    env = plugin(fake_mlx_lm(), "failing", failing)
    env = plugin(env, "others", others + "    return ['others: here']\n")
    ask = (
        "import mlx_lm, mlx_optiq_hooks, mlx_optiq_ext\n"
        "manager = mlx_optiq_hooks.plugin_manager()\n"
        "manager.unregister(name='optiq')\n"
        f"for name in {hooks()} * 2:\n"
        "    hook = getattr(manager.hook, name)\n"
        "    try:\n"
        "        hook(**dict.fromkeys(hook.spec.argnames))\n"
        "    except mlx_optiq_ext.OptiqError as error:\n"
        "        print(f'refused: {error}')\n"
        "print(mlx_optiq_ext.status())"
    )
    done = run("python", "-c", ask, env=env, check=True)
    lines = done.stderr.splitlines()
    assert len(lines) == len(spec.OPTIONAL)  # each is named once
    for hook, line in zip(spec.OPTIONAL, lines, strict=True):
        assert line.startswith(f"mlx_optiq_ext: plugin 'failing' failed in {hook} ({reason}")
    for hook in set(hooks()) - set(spec.OPTIONAL):
        assert done.stdout.count(f"refused: plugin 'failing' failed in {hook} ({reason}") == 2
    for hook in hooks():
        assert f"\n  failed: failing in {hook} ({reason}" in done.stdout
    assert "others: here" in done.stdout


def test_ctrl_c_and_refusals_pass_through_a_plugin(run, fake_mlx_lm, plugin):
    source = (
        "from mlx_optiq_ext import OptiqError, hookimpl\n@hookimpl\n"
        "def optiq_resolve_adapter(name):\n"
        "    raise KeyboardInterrupt if name == 'slow' else OptiqError('no such adapter')\n"
    )
    env = plugin(fake_mlx_lm(), "demo", source)
    ask = "import mlx_lm.tuner.utils as utils; utils.load_adapters('model', {!r})"
    slow = run("python", "-c", ask.format("slow"), env=env)
    assert slow.stderr.endswith("KeyboardInterrupt\n")
    assert run("python", "-c", ask.format("a"), env=env).stderr.endswith(": no such adapter\n")


@pytest.mark.parametrize("source", [GOOD, BROKEN["raising"][0]], ids=["good", "raising"])
def test_a_blocked_plugin_is_not_even_imported(run, fake_mlx_lm, plugin, source):
    env = plugin(fake_mlx_lm(), "good", source)
    code = f"import sys; {STATUS}; print('good' in sys.modules)"
    done = run("python", "-c", code, env={**env, "MLX_OPTIQ_EXT_BLOCK": "good"}, check=True)
    assert done.stdout.endswith("plugins: optiq\nFalse\n")
    assert done.stderr == ""


def test_an_installed_plugin_wins_over_the_built_in_one(run, fake_mlx_lm, plugin):
    code = """
import mlx_lm, mlx_optiq_hooks
from mlx_optiq_ext.weights.sensitivity import registry
print(*mlx_optiq_hooks.sensitivity_methods())
print(type(registry.find("kl")).__module__)
manager = mlx_optiq_hooks.plugin_manager()
implementations = manager.hook.optiq_status.get_hookimpls()
print([each.plugin_name for each in reversed(implementations)])
"""
    env = plugin(fake_mlx_lm(), "good", GOOD)
    done = run("python", "-c", code, env=env, check=True)
    assert done.stdout == "kl mine taylor\ngood\n['good']\n"


def test_a_sensitivity_method_that_lacks_something_is_left_out(run, fake_mlx_lm, plugin):
    env = plugin(fake_mlx_lm(), "bad", GOOD.replace('"mine"', '"not a name"'))
    code = "import mlx_lm, mlx_optiq_hooks; print(*mlx_optiq_hooks.sensitivity_methods())"
    done = run("python", "-c", code, env=env, check=True)
    assert done.stdout == "kl taylor\n"
    assert "left out: the sensitivity method Method has the name 'not a name'" in done.stderr


TARGETS = """
import mlx_lm.models.cache, mlx_lm.tuner.utils
print(mlx_lm.models.cache.make_prompt_cache("model", max_kv_size=8))
print(mlx_lm.tuner.utils.load_adapters("model", "good"))
print(mlx_lm.tuner.utils.load_adapters("model", adapter_path="other"))
"""


def test_hooks_answer_for_mlx_lm_and_none_leaves_it_as_given(run, fake_mlx_lm, plugin):
    env = plugin(fake_mlx_lm(), "good", GOOD)
    done = run("python", "-c", TARGETS, env=env, check=True)
    assert done.stdout == "['model 8']\n/adapters/good\nother\n"


def test_without_a_plugin_the_same_calls_are_stock(run, fake_mlx_lm):
    done = run("python", "-c", TARGETS, env=fake_mlx_lm(), check=True)
    assert done.stdout == "['stock']\ngood\nother\n"


def test_tracing_prints_each_call_with_its_arguments(run, fake_mlx_lm, plugin):
    env = {**plugin(fake_mlx_lm(), "good", GOOD), "MLX_OPTIQ_EXT_TRACE": "1"}
    done = run("python", "-c", TARGETS, env=env, check=True)
    assert "optiq_resolve_adapter [hook]" in done.stderr
    assert "name: good" in done.stderr
    assert "finish optiq_resolve_adapter --> /adapters/good" in done.stderr
    assert done.stdout == "['model 8']\n/adapters/good\nother\n"
