"""A generation thread that dies all the same: everything that waits ends, and health says so."""

import threading
import time

import pytest
from live_server import serve

from .raw import COMPLETIONS, chat, get, post, received, request, wire

#: A server whose generation thread dies at a request for temperature 0.125.
FRAGILE = """
import mlx_lm.server
make = mlx_lm.server._make_sampler

def fragile(args, tokenizer):
    if args.sampling.temperature == 0.125:
        raise KeyError("planned")
    return make(args, tokenizer)

mlx_lm.server._make_sampler = fragile
mlx_lm.server.main()
"""


# With adapters older releases serve one request at a time, where an error ends its request only.
@pytest.mark.parametrize("guarded", [False, pytest.param(True, marks=pytest.mark.newest)])
def test_after_the_generation_thread_died_nothing_waits(tiny, folder, tmp_path, guarded):
    updates = ("--optiq-allow-adapter-updates", "--optiq-adapter-dir", folder)
    options = (f"--optiq-adapter=a={folder / 'a'}", *updates) if guarded else ()
    with serve(tmp_path / "log", "--model", tiny, *options, code=FRAGILE) as server:
        assert post(server, COMPLETIONS, chat())[0] == 200
        ended = []

        def ask(body):
            start = time.monotonic()
            try:
                status = request(server, "POST", COMPLETIONS, body)[0]
            except OSError as error:
                status = type(error).__name__
            ended.append((status, time.monotonic() - start))

        long = chat(max_tokens=100_000, logit_bias={"0": -100})
        threads = [threading.Thread(target=ask, args=(long,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        ask(chat(temperature=0.125))
        for thread in threads:
            thread.join(20)
        assert len(ended) == 4
        assert max(seconds for _, seconds in ended) < 15
        assert get(server, "/health") == (503, {"status": "unavailable"})
        if guarded:
            assert {status for status, _ in ended} == {503}
            for path, body in (
                (COMPLETIONS, chat()),
                ("/v1/load_lora_adapter", {"lora_name": "b", "lora_path": "b"}),
                ("/v1/unload_lora_adapter", {"lora_name": "a"}),
            ):
                status, answer = post(server, path, body)
                assert (status, answer["error"]["code"]) == (503, "server_dead")
        else:
            assert post(server, COMPLETIONS, chat())[0] == 404
        with wire(server) as connection:
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert b" 503 " in received(connection).splitlines()[0]
