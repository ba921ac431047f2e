"""``/metrics``, read by Prometheus' own parser, beside what was asked."""

import threading

import pytest
from live_server import serve
from prometheus_client.parser import text_string_to_metric_families

from mlx_optiq_ext.serving import Metrics, Row

from .raw import COMPLETIONS, chat, get, post, request

LOAD = "/v1/load_lora_adapter"


def parsed(text: bytes | str) -> dict[tuple[str, ...], float]:
    """Samples by name and values of labels."""
    text = text.decode() if isinstance(text, bytes) else text
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation and family.type != "unknown" for family in families)
    found = [each for family in families for each in family.samples]
    return {
        (each.name.removeprefix("mlx_optiq_"), *each.labels.values()): each.value for each in found
    }


@pytest.fixture(scope="module")
def measured(tiny, folder, tmp_path_factory):
    words = (f"--optiq-adapter=a={folder / 'a'}", "--optiq-adapter-dir", folder)
    more = ("--optiq-allow-adapter-updates", "--optiq-metrics", "--optiq-api-key", "key")
    log = tmp_path_factory.mktemp("metrics") / "log"
    with serve(log, "--model", tiny, *words, *more) as server:
        yield server


KEY = {"Authorization": "Bearer key"}


def test_what_was_asked_is_counted(measured):
    status, headers, text = request(measured, "GET", "/metrics", headers=KEY)
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    before = parsed(text)
    prompt = completion = cached = 0
    for model in ("default_model", "default_model", "a"):
        status, answer = post(measured, COMPLETIONS, chat(model=model), KEY)
        assert status == 200
        usage = answer["usage"]
        prompt, completion = (
            prompt + usage["prompt_tokens"],
            completion + usage["completion_tokens"],
        )
        cached += (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    assert post(measured, COMPLETIONS, chat(model="b"), KEY)[0] == 404
    assert post(measured, COMPLETIONS, chat())[0] == 401
    assert post(measured, LOAD, {"lora_name": "x", "lora_path": "damaged"}, KEY)[0] == 400
    assert get(measured, "/v1/models/a", KEY)[0] == get(measured, "/v1/models?x", KEY)[0] == 200
    assert get(measured, '/"\\\n'.strip(), KEY)[0] == 404
    found = parsed(get(measured, "/metrics", KEY)[1])

    def more(*key: str) -> float:
        return found[key] - before.get(key, 0)

    assert more("requests_total", COMPLETIONS, "200") == 3
    assert more("requests_total", COMPLETIONS, "404") == 1
    assert more("requests_total", COMPLETIONS, "401") == 1
    assert more("requests_total", LOAD, "400") == 1
    assert more("requests_total", "/v1/models", "200") == 2
    assert more("requests_total", "other", "404") == 1
    assert more("requests_total", "/metrics", "200") == 1
    assert more("prompt_tokens_total") == prompt
    assert more("completion_tokens_total") == completion
    assert more("prompt_cache_tokens_total") == cached
    assert more("time_to_first_token_seconds_count") == 3
    assert more("time_to_first_token_seconds_bucket", "+Inf") == 3
    assert found["batch_size",] == 0
    assert found["adapters", "mounted"] == 1
    assert found["adapter_uses", "a"] == 0


def test_metrics_want_a_key_and_the_option(measured, server):
    assert get(measured, "/metrics")[0] == 401
    assert get(server, "/metrics")[0] == 404


def test_names_in_labels_are_escaped():
    metrics = Metrics()
    name = 'a "quoted"\\ \n name'
    assert (
        parsed(metrics.text({("adapter_uses", (("adapter", name),)): 3}))["adapter_uses", name] == 3
    )


def test_a_request_that_ends_before_it_is_known_to_be_served_does_not_count_as_served():
    metrics = Metrics()
    early, row = Row(metrics), Row(metrics)
    early.end()
    early.serve(3)
    row.serve(4)
    row.token(2)
    row.token(2)
    found = parsed(metrics.text())
    assert found["batch_size",] == 1
    row.end()
    row.end()
    found = parsed(metrics.text())
    assert (found["batch_size",], found["prompt_tokens_total",]) == (0, 7)
    assert (found["prompt_cache_hits_total",], found["prompt_cache_tokens_total",]) == (1, 2)
    assert found["completion_tokens_total",] == 2
    assert found["time_to_first_token_seconds_count",] == 1


def test_threads_count_together():
    metrics = Metrics()

    def count():
        for _ in range(2000):
            metrics.add("completion_tokens_total")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert parsed(metrics.text())["completion_tokens_total",] == 8000
