"""A plugin that fails where its answer counts refuses the command, which writes nothing."""

import pytest
from toy_fixtures import PLAIN

pytestmark = pytest.mark.newest

OPTION = """
import sys
from mlx_optiq_ext import hookimpl

@hookimpl
def optiq_add_arguments(command, group):
    if command == "convert":
        group.add_argument("--optiq-probe", action="store_true", default=None)
"""

CONVERT = ("convert", "--hf-path", "MODEL", "--mlx-path", "out")
PLUGIN_OPTION = (*CONVERT, "-q", "--optiq-probe")
CACHE = ("cache_prompt", "--model", "MODEL", "--prompt", "a", "--prompt-cache-file", "out")
TRAIN = ("lora", "--model", "MODEL", "--train", "--data", "DATA", "--num-layers", "1")
ADAPTER = ("generate", "--model", "MODEL", "--prompt", "a", "--adapter-path", "out")

#: Hook -> a command whose result its answer changes.
COMMANDS = {
    "optiq_check_options": PLUGIN_OPTION,
    "optiq_quant_predicate": PLUGIN_OPTION,
    "optiq_sensitivity_methods": (*CONVERT, *PLAIN, "--optiq-budget", "4.5"),
    "optiq_prompt_cache": CACHE,
    "optiq_attention_backends": (*CACHE, "--optiq-kv", "4"),
    "optiq_lora_rank": (*TRAIN, "--adapter-path", "out", "--optiq-rank-scaling", "by_bits"),
    "optiq_resolve_adapter": ADAPTER,
}

#: What a quantization predicate may do instead of choosing a precision -> the reason.
PREDICATES = {
    "exits": ("sys.exit(0)", "SystemExit: 0"),
    "returns another type": ("return 4", "TypeError: it returned 4, not "),
    "raises at a module": ("return lambda path, module: 1 / 0", "ZeroDivisionError: division by"),
    "exits at a module": ("return lambda path, module: sys.exit(0)", "SystemExit: 0"),
    "chooses nonsense": ("return lambda path, module: '4 bits'", "TypeError: it returned '4 bits'"),
}


@pytest.fixture
def fails(run, plugin, tiny, tmp_path):
    """Runs a command with a plugin whose hook does this; nothing may be written."""

    def fails(hook, code, *command):
        data = tmp_path / "data"
        data.mkdir()
        for name in ("train", "valid"):
            (data / f"{name}.jsonl").write_text('{"text": "Mia buys 7 boxes of apples."}\n' * 4)
        working = tmp_path / "working"
        working.mkdir()
        env = plugin({}, "failing", f"{OPTION}\n@hookimpl\ndef {hook}():\n    {code}\n")
        places = {"MODEL": tiny, "DATA": data}
        words = [str(places.get(word, word)) for word in command]
        done = run("python", "-m", "mlx_lm", *words, cwd=working, env=env)
        assert list(working.iterdir()) == []
        return done

    return fails


@pytest.mark.parametrize("hook", COMMANDS)
def test_a_hook_that_raises_refuses_the_command(fails, hook):
    done = fails(hook, "raise RuntimeError('not today')", *COMMANDS[hook])
    assert done.returncode == 2
    assert done.stderr.endswith(
        f": error: plugin 'failing' failed in {hook} (RuntimeError: not today): correct it, or set "
        "MLX_OPTIQ_EXT_BLOCK=failing to run without it\n"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("ending", PREDICATES)
def test_a_predicate_that_fails_in_another_way_refuses_the_conversion(fails, ending):
    code, reason = PREDICATES[ending]
    done = fails("optiq_quant_predicate", code, *PLUGIN_OPTION)
    assert done.returncode == 2
    refusal = done.stderr.splitlines()[-1]
    assert refusal.startswith(
        f"mlx_lm.convert: error: plugin 'failing' failed in optiq_quant_predicate ({reason}"
    )
    assert "Traceback" not in done.stderr
