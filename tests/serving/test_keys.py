"""Keys: asked for everywhere but at /health, by the real OpenAI client and raw."""

import openai
import pytest
from live_server import serve

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.serving import Keys, Refusal

from .conftest import BEARER, KEY, OTHER
from .raw import COMPLETIONS, chat, get, post, request


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_each_key_opens_the_server(keyed, key):
    client = keyed.client().with_options(api_key=key)
    (model,) = client.models.list().data
    done = client.chat.completions.create(model=model.id, **chat())
    assert done.usage
    assert done.usage.completion_tokens
    chunks = list(client.chat.completions.create(model="default_model", stream=True, **chat()))
    assert chunks[-1].choices[0].finish_reason


@pytest.mark.parametrize("key", ["none", f"{KEY}x", KEY[:-1], f"{KEY},{OTHER}", "# of the team"])
def test_another_key_is_refused_as_openai_does(keyed, key):
    client = keyed.client().with_options(api_key=key)
    for ask in (
        client.models.list,
        lambda: client.chat.completions.create(model="default_model", **chat()),
        lambda: client.completions.create(model="default_model", prompt="1", max_tokens=1),
    ):
        with pytest.raises(openai.AuthenticationError) as raised:
            ask()
        assert raised.value.status_code == 401
        assert raised.value.code == "invalid_api_key"
        assert raised.value.type == "invalid_request_error"
        assert raised.value.response.headers["www-authenticate"] == "Bearer"
        assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": KEY}, {"Authorization": "Basic Zmlyc3Q="}, {"Authorization": "Bearer "}],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny-qwen3"),
        ("GET", "/nothing"),
        ("GET", "/health/"),
        ("POST", COMPLETIONS),
        ("POST", "/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/load_lora_adapter"),
    ],
)
def test_every_endpoint_asks_for_a_key(keyed, method, path, headers):
    status, answered, body = request(keyed, method, path, chat(), headers)
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    assert answered["WWW-Authenticate"] == "Bearer"


def test_health_and_a_browsers_question_ask_for_none(keyed):
    assert get(keyed, "/health") == get(keyed, "/health?x=1") == (200, {"status": "ok"})
    assert request(keyed, "OPTIONS", COMPLETIONS)[0] == 204


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/modelsx", "/", "/v1/embeddings"])
def test_unknown_paths_are_not_found_in_json(keyed, path):
    for method in ("GET", "POST"):
        status, _, body = request(keyed, method, path, {}, BEARER)
        assert (status, body["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "BREW", "HEAD"])
def test_an_unknown_method_is_answered_in_json(keyed, method):
    status, headers, body = request(keyed, method, COMPLETIONS, {}, BEARER)
    assert status == 501
    assert headers["Content-Type"] == "application/json"
    assert method == "HEAD" or body["error"]["code"] == "501"


@pytest.mark.parametrize("given", [KEY, "@keys"])
def test_a_key_from_the_environment(tiny, tmp_path, monkeypatch, given):
    (tmp_path / "keys").write_text(f"{KEY}\r\n")
    monkeypatch.setenv("MLX_OPTIQ_EXT_API_KEY", given.replace("keys", str(tmp_path / "keys")))
    with serve(tmp_path / "log", "--model", tiny) as server:
        assert get(server, "/v1/models")[0] == 401
        assert get(server, "/v1/models", BEARER)[0] == 200
        assert post(server, COMPLETIONS, chat(), BEARER)[0] == 200
    assert KEY not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optiq-api-key", ""], "a key is 1 to 1000 visible ASCII characters"),
        (["--optiq-api-key", "two words"], "a key is 1 to 1000 visible ASCII characters"),
        (["--optiq-api-key", "@nowhere"], "cannot read nowhere"),
        (["--optiq-api-key", "@empty"], "gives 0 keys"),
        (["--optiq-max-connections", "0"], "--optiq-max-connections must be more than 0"),
        (["--optiq-max-body", "-1"], "--optiq-max-body must be more than 0"),
        (["--optiq-client-timeout", "nan"], "--optiq-client-timeout must be more than 0"),
    ],
)
def test_bad_options_are_refused(run, tiny, tmp_path, words, message):
    (tmp_path / "empty").write_text("\n# nothing\n")
    done = run("mlx_lm.server", "--model", tiny, "--port", "0", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_guarded_server_needs_its_model(run):
    done = run("mlx_lm.server", "--port", "0", "--optiq-api-key", KEY)
    assert done.returncode == 2
    assert "name it with --model" in done.stderr


def test_keys_are_compared_as_bytes_and_never_shown():
    keys = Keys.read(["a" * 8, "b" * 8, "a" * 8])
    assert "aaaa" not in repr(keys)
    keys.check("bearer " + "b" * 8)
    for wrong in (None, "", "Bearer", "Bearer \udcff", "Bearer " + "b" * 9, "x" * 8):
        with pytest.raises(Refusal):
            keys.check(wrong)
    with pytest.raises(InputError):
        Keys.read([])


@pytest.mark.parametrize("content", ["one\r\n\r\ntwo\r\n", "\ufeffone\n# three\ntwo", "one\rtwo\r"])
def test_lines_end_as_editors_write_them(tmp_path, content):
    (tmp_path / "keys").write_bytes(content.encode())
    keys = Keys.read([f"@{tmp_path / 'keys'}"])
    assert len(keys) == 2
    assert [keys.number(f"Bearer {key}") for key in ("one", "two")] == [1, 2]


@pytest.mark.parametrize("mark", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\0"])
def test_no_odd_character_cuts_a_key_in_two(tmp_path, mark):
    (tmp_path / "keys").write_text(f"good\none{mark}two\n")
    with pytest.raises(InputError, match="keys, line 2: a key is") as raised:
        Keys.read([f"@{tmp_path / 'keys'}"])
    assert "two" not in str(raised.value)
