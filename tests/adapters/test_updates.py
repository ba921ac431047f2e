"""Adapters that a live server loads, replaces and unloads while it serves."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from live_server import serve

from .asking import LOAD, UNLOAD, ask, post
from .conftest import NAMES, QUESTIONS


def test_load_serve_reload_and_unload(server, folder):
    assert post(server, LOAD, {"lora_name": "new", "lora_path": "33"})[0] == 200
    assert ask(server, "new") == "33"
    status, body = post(server, LOAD, {"lora_name": "new", "lora_path": "11"})
    assert (status, body["error"]["code"]) == (409, "adapter_conflict")
    assert ask(server, "new") == "33"
    inplace = {"lora_name": "new", "lora_path": "11", "load_inplace": True}
    assert post(server, LOAD, inplace)[0] == 200
    # The same question: what the old weights left in the prompt cache is not used.
    assert ask(server, "new") == "11"
    assert post(server, UNLOAD, {"lora_name": "new"})[0] == 200
    with pytest.raises(openai.NotFoundError):
        ask(server, "new")
    assert post(server, UNLOAD, {"lora_name": "new"})[0] == 404


def test_two_loads_of_one_name_at_once(server):
    body = {"lora_name": "twice", "lora_path": "33"}
    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(lambda _: post(server, LOAD, body)[0], range(4)))
    assert sorted(statuses) == [200, 409, 409, 409]
    assert ask(server, "twice") == "33"
    assert post(server, UNLOAD, {"lora_name": "twice"})[0] == 200


@pytest.mark.parametrize(
    "path",
    ["../", "..", "../named", "/etc", "", "nothing", "a\x00b", "x" * 5000, 7, None, "broken"],
)
def test_a_bad_path_or_file_is_refused_and_the_server_goes_on(server, path):
    status, body = post(server, LOAD, {"lora_name": "bad", "lora_path": path})
    assert status == 400
    assert body["error"]["message"]
    with pytest.raises(openai.NotFoundError):
        ask(server, "bad")
    assert ask(server, "22") == "22"


@pytest.mark.parametrize("name", ["", "a b", "default_model", "é", "x" * 200])
def test_a_bad_name_is_refused(server, name):
    assert post(server, LOAD, {"lora_name": name, "lora_path": "33"})[0] == 400


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 60000])
def test_a_bad_body_is_refused(server, body):
    assert post(server, LOAD, body)[0] == 400
    assert post(server, LOAD, b" " * 70000)[0] == 413


def test_an_adapter_deleted_on_disk_while_mounted_goes_on(server, folder):
    shutil.copytree(folder / "33", folder / "gone")
    assert post(server, LOAD, {"lora_name": "gone", "lora_path": "gone"})[0] == 200
    shutil.rmtree(folder / "gone")
    assert ask(server, "gone") == "33"
    assert post(server, UNLOAD, {"lora_name": "gone"})[0] == 200


def test_unload_waits_for_a_stream_and_new_requests_are_refused(server):
    assert post(server, LOAD, {"lora_name": "slow", "lora_path": "33"})[0] == 200
    # The end token is biased away, so that the stream lasts.
    stream = server.client().chat.completions.create(
        model="slow",
        messages=[{"role": "user", "content": QUESTIONS[0]}],
        temperature=0,
        max_tokens=300,
        logit_bias={"0": -100},
        stream=True,
    )
    first = next(iter(stream))
    ended = []
    unloading = threading.Thread(
        target=lambda: ended.append(post(server, UNLOAD, {"lora_name": "slow"})[0])
    )
    unloading.start()
    time.sleep(0.2)
    assert ended == []
    with pytest.raises(openai.NotFoundError):
        ask(server, "slow")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in [first, *stream])
    unloading.join(30)
    assert ended == [200]
    assert text.startswith("33")


def test_fewer_mounted_than_offered(exact, named, tmp_path):
    arguments = [f"--optiq-adapter={name}={named[name]}" for name in NAMES]
    limited = ("--optiq-max-adapters", 1)
    with serve(tmp_path / "log", "--model", exact, *arguments, *limited) as server:
        assert [ask(server, name) for name in NAMES * 2] == [*NAMES * 2]
        with ThreadPoolExecutor(9) as pool:
            assert list(pool.map(lambda name: ask(server, name), NAMES * 3)) == [*NAMES * 3]
        assert post(server, LOAD, {"lora_name": "x", "lora_path": "y"})[0] == 404


def test_loads_at_once_where_one_may_be_mounted(exact, folder, tmp_path):
    updates = ("--optiq-allow-adapter-updates", "--optiq-adapter-dir", folder)
    limited = ("--optiq-max-adapters", 1)
    with serve(tmp_path / "log", "--model", exact, *updates, *limited) as server:
        bodies = [{"lora_name": f"{n}.{n}", "lora_path": n} for n in (*NAMES, "broken")]
        with ThreadPoolExecutor(4) as pool:
            statuses = list(pool.map(lambda body: post(server, LOAD, body)[0], bodies))
            assert statuses == [200, 200, 200, 400]
            names = [body["lora_name"] for body in bodies[:3]]
            assert list(pool.map(lambda name: ask(server, name), names)) == [*NAMES]
            gone = [pool.submit(post, server, UNLOAD, {"lora_name": name}) for name in names]
            assert [each.result()[0] for each in gone] == [200] * 3
