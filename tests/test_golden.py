"""Plans, bytes, KV plans, LoRA ranks and reports stay what they were recorded as."""

import json
import re

import pytest
from golden import FAMILIES, RECORDS, measure, source

pytestmark = pytest.mark.newest

NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)")
#: Choices and bytes; the rest are sums of floating-point products, which processors order their
#: own way.
EXACT = ("weights", "plan", "quantization", "kv_config", "ranks")
MODELS = ["tiny-qwen3", *(pytest.param(name, marks=pytest.mark.shared) for name in FAMILIES)]


@pytest.mark.parametrize("name", MODELS)
def test_a_conversion_is_what_it_was(command, shared, tmp_path, name, monkeypatch):
    monkeypatch.setenv("MLX_OPTIQ_EXT_CACHE", str(tmp_path / "cache"))

    def run(*words):
        done = command(*words)
        assert done.status == 0, done.err

    recorded = json.loads((RECORDS / f"{name}.json").read_text())
    found = json.loads(json.dumps(measure(run, source(name, shared), tmp_path)))
    for part in EXACT:
        assert found[part] == recorded[part], part
    assert found["kl"] == pytest.approx(recorded["kl"], rel=1e-2, abs=1e-6)
    assert found["kv_kl"] == pytest.approx(recorded["kv_kl"], rel=0.1, abs=1e-6)
    kl, variant, uniform = found["judged"]
    assert [variant, kl] == [recorded["judged"][1], pytest.approx(recorded["judged"][0], rel=1e-2)]
    assert uniform == pytest.approx(recorded["judged"][2], rel=1e-2)
    # Every other part is a number; the last digit that is shown may turn.
    texts = NUMBER.split(found["report"]), NUMBER.split(recorded["report"])
    assert texts[0][::2] == texts[1][::2]
    for one, other in zip(texts[0][1::2], texts[1][1::2], strict=True):
        digit = 10.0 ** -len(other.partition(".")[2].partition("e")[0])
        assert float(one) == pytest.approx(float(other), rel=0.02, abs=max(digit, 0.02))
