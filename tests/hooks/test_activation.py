"""When and how the package arms itself, in processes that see a stand-in mlx-lm."""

import sys
from pathlib import Path

import pytest

import mlx_optiq_ext

LIBRARY = Path(mlx_optiq_ext.__path__[0]).parent
#: Makes everything importable in a process without site, where no .pth file runs.
WITHOUT_SITE = f"import sys; sys.path += {[path for path in sys.path if path]!r}\n"

#: Prints which names of the stand-in are ours.
LOOK = """
import sys, mlx_lm.convert, mlx_lm.server, mlx_lm.utils
convert = sys.modules["mlx_lm.convert"]
for value in (mlx_lm.utils.quantize_model, convert.quantize_model, convert.convert, mlx_lm.convert,
              convert.main, convert.argparse, mlx_lm.server.argparse):
    print(type(value).__name__, end=" ")
"""
OURS = "FunctionWrapper " * 5 + "_View " * 2
STOCK = "function " * 5 + "module " * 2


@pytest.mark.parametrize(
    "line",
    [
        "import mlx_optiq_ext",
        "import mlx_optiq_ext._activation; mlx_optiq_ext._activation.install()",
    ],
    ids=["import", "pth"],
)
def test_start_up_loads_the_package_and_its_trigger_and_nothing_else(run, line):
    code = (
        f"import sys; sys.path.insert(0, {str(LIBRARY)!r}); before = set(sys.modules)\n{line}\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = run("python", "-I", "-S", "-c", code, check=True)
    assert done.stdout.split() == ["mlx_optiq_ext", "mlx_optiq_ext._activation"]
    assert done.stderr == ""


def test_the_start_up_line_of_this_environment_has_run(run):
    code = "import sys; print('mlx_optiq_ext._activation' in sys.modules, 'wrapt' in sys.modules)"
    assert run("python", "-c", code, check=True).stdout.split() == ["True", "False"]


def test_importing_mlx_lm_arms(run, fake_mlx_lm):
    done = run("python", "-c", LOOK, env=fake_mlx_lm(), check=True)
    assert (done.stdout, done.stderr) == (OURS, "")


@pytest.mark.parametrize("first", ["mlx_lm", "mlx_lm.convert", "mlx_optiq_ext"])
def test_importing_the_package_activates_without_a_pth_in_either_order(run, fake_mlx_lm, first):
    path = fake_mlx_lm()["PYTHONPATH"]
    code = f"{WITHOUT_SITE}sys.path.insert(0, {path!r}); import {first}; import mlx_optiq_ext"
    done = run("python", "-S", "-c", code + LOOK, check=True)
    assert done.stdout == OURS


def test_flags_work_after_a_late_activation(run, fake_mlx_lm):
    code = (
        f"{WITHOUT_SITE}sys.path.insert(0, {fake_mlx_lm()['PYTHONPATH']!r})\n"
        "import mlx_lm.convert; stock = mlx_lm.convert\n"
        "import mlx_optiq_ext; assert mlx_lm.convert is not stock\n"
        "sys.argv = ['mlx_lm.convert', '--optiq-budget', '0']\n"
        "sys.modules['mlx_lm.convert'].main()"
    )
    done = run("python", "-S", "-c", code)
    assert done.returncode == 2
    assert "argument --optiq-budget: '0' is not a number of bits per weight" in done.stderr


@pytest.mark.parametrize("value", ["0", "off", " False ", "no"])
def test_the_kill_switch_leaves_every_name_stock(run, fake_mlx_lm, value):
    env = {**fake_mlx_lm(), "MLX_OPTIQ_EXT": value}
    code = f"{LOOK}\nimport mlx_optiq_ext\n{LOOK}\nprint('mlx_optiq_hooks' in sys.modules)"
    assert run("python", "-c", code, env=env, check=True).stdout == f"{STOCK}{STOCK}False\n"


def test_a_blocked_feature_leaves_its_targets_stock_and_the_others_ours(run, fake_mlx_lm):
    env = {**fake_mlx_lm(), "MLX_OPTIQ_EXT_BLOCK": "other, weights"}
    done = run("python", "-c", LOOK, env=env, check=True)
    assert done.stdout == "function " * 4 + "FunctionWrapper _View _View "


def test_a_blocked_feature_is_refused_when_asked_for(run, fake_mlx_lm):
    env = {**fake_mlx_lm(), "MLX_OPTIQ_EXT_BLOCK": "weights"}
    done = run("python", "-m", "mlx_lm", "convert", "--optiq-budget", "4", env=env)
    assert done.returncode == 2
    assert done.stderr.endswith("error: weights is in MLX_OPTIQ_EXT_BLOCK: remove it\n")


def test_an_error_while_arming_is_one_line_and_mlx_lm_runs_as_stock(run, fake_mlx_lm):
    code = (
        "import mlx_optiq_hooks, mlx_optiq_ext\n"
        "def arm(): raise RuntimeError('cannot arm')\n"
        f"mlx_optiq_hooks.arm = arm\n{LOOK}\nprint(mlx_optiq_ext.status())"
    )
    done = run("python", "-c", code, env=fake_mlx_lm(), check=True)
    assert done.stdout.startswith(STOCK)
    assert "\noff: arming failed with RuntimeError: cannot arm\n" in done.stdout
    assert done.stderr == ("mlx_optiq_ext: off, mlx-lm runs as stock (RuntimeError: cannot arm)\n")


def test_a_dependency_that_does_not_import_leaves_mlx_lm_stock(run, fake_mlx_lm):
    env = fake_mlx_lm()
    Path(env["PYTHONPATH"], "wrapt.py").write_text("raise ImportError('no wrapt here')\n")
    done = run("python", "-c", LOOK, env=env, check=True)
    assert done.stdout == STOCK
    assert done.stderr.count("\n") == 1
    assert "no wrapt here" in done.stderr


@pytest.mark.parametrize("switch", ["1", "0"])
def test_the_trigger_does_not_hide_the_finder_behind_it(run, fake_mlx_lm, switch):
    code = """
import sys, mlx_optiq_ext._activation as activation, wrapt
trigger = activation._trigger
sys.meta_path.remove(trigger)
wrapt.register_post_import_hook(lambda module: print("seen", module.__name__), "mlx_lm")
sys.meta_path.insert(0, trigger)
import mlx_lm
"""
    env = {**fake_mlx_lm(), "MLX_OPTIQ_EXT": switch}
    assert run("python", "-c", code, env=env, check=True).stdout == "seen mlx_lm\n"


def test_installing_and_arming_twice_changes_nothing(run, fake_mlx_lm):
    code = f"""
import sys, mlx_optiq_ext._activation as activation
activation.install(); activation.install("import")
print(sys.meta_path.count(activation._trigger), sorted(activation.sources))
import mlx_lm.utils, mlx_optiq_hooks
once = mlx_lm.utils.quantize_model
activation.arm(); mlx_optiq_hooks.arm(); mlx_optiq_hooks.arm()
assert mlx_lm.utils.quantize_model is once
mlx_optiq_hooks.disarm(); mlx_optiq_hooks.disarm()
{LOOK}
mlx_optiq_hooks.arm()
{LOOK}
"""
    done = run("python", "-c", code, env=fake_mlx_lm(), check=True)
    assert done.stdout == f"1 ['import', 'site']\n{STOCK}{OURS}"


def test_the_two_start_up_files_call_the_same_function():
    folder = Path(__file__).resolve().parents[2] / "hooks"
    module, _, function = (folder / "mlx_optiq_ext.start").read_text().strip().partition(":")
    assert (folder / "mlx_optiq_ext.pth").read_text() == (
        f"import {module}; {module}.{function}()\n"
    )
    assert callable(getattr(sys.modules[module], function))
