"""What a request may name: without options of ours what stock takes, and never more."""

from pathlib import Path

import pytest
from live_server import serve

from .raw import chat, post

DATA = Path(__file__).parents[1] / "data"


def answers(log, tiny):
    """Status and body of requests that name adapters in their bodies."""
    found = []
    with serve(log, "--model", tiny) as server:
        for adapter in ("someone/an-adapter", "no such folder", str(DATA / "peft" / "mixed")):
            body = chat(model=str(tiny), adapters=adapter)
            found.append(post(server, "/v1/completions", {**body, "prompt": "1"}))
        assert post(server, "/v1/chat/completions", chat())[0] == 200
    return found


@pytest.mark.newest
def test_without_our_options_stock_decides_which_adapters_a_request_may_name(
    tiny, tmp_path, monkeypatch
):
    ours = answers(tmp_path / "ours", tiny)
    monkeypatch.setenv("MLX_OPTIQ_EXT", "0")
    assert ours == answers(tmp_path / "stock", tiny)
    assert ours[0] == (404, {"error": "The adapter path does not exist: someone/an-adapter"})
