"""Answers are strict JSON where logits overflow."""

import json
import shutil

import mlx.core as mx
import mlx_lm
import pytest
from live_server import serve
from mlx_lm.utils import save_model

from mlx_optiq_ext.serving import finite

from .raw import COMPLETIONS, chat, wire


@pytest.fixture(scope="module")
def overflowing(tiny, tmp_path_factory):
    """A server of a model in float16 whose logits are infinite."""
    folder = tmp_path_factory.mktemp("overflowing")
    shutil.copytree(tiny, folder / "model")
    model = mlx_lm.load(str(tiny))[0]
    model.set_dtype(mx.float16)
    norm = dict(model.named_modules())["model.norm"]
    norm["weight"] = mx.full(norm["weight"].shape, 6e4, mx.float16)
    save_model(folder / "model", model)
    with serve(folder / "log", "--model", folder / "model", "--optiq-metrics") as server:
        yield server


@pytest.mark.newest
@pytest.mark.parametrize("more", [{}, {"top_logprobs": 3}], ids=["tokens", "top"])
def test_log_probabilities_that_are_not_numbers_are_null(overflowing, more):
    body = json.dumps(chat(logprobs=True, **more)).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with wire(overflowing) as connection:
        connection.sendall(head.encode() + body)
        text = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")[2]

    def refuse(constant):
        raise AssertionError(f"{constant} in {text[:500]}")

    answer = json.loads(text, parse_constant=refuse)
    assert answer["choices"][0]["logprobs"]["content"][0]["logprob"] is None


def test_only_numbers_that_json_lacks_are_null():
    nan, infinite = float("nan"), float("inf")
    given = {"a": [nan, 1.5, -infinite], "b": ({"c": infinite, "d": "NaN"}, 7, True, None)}
    assert finite(given) == {"a": [None, 1.5, None], "b": [{"c": None, "d": "NaN"}, 7, True, None]}
