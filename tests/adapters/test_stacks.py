"""A live server whose requests weigh and add up adapters, asked by the real OpenAI client."""

import random
from concurrent.futures import ThreadPoolExecutor

import mlx_lm
import openai
import pytest
from live_server import serve
from toy_adapters import QUESTIONS, prompt

from mlx_optiq_ext.adapters import (
    AdapterActivation,
    Offer,
    Wanted,
    mount_adapter_on_model,
    requests,
)
from mlx_optiq_ext.serving import Refusal

from .asking import ask, chat, post

#: Scales by name of each kind of row.
MIXES = (
    {},
    {"11": 1},
    {"22": 1},
    {"11": 1, "22": 1},
    {"11": 0.5},
    {"11": -0.5, "22": 0.25},
    {"11": 1, "22": -1},
)


def lora(scales):
    return [{"id": name, "scale": scale} for name, scale in scales.items()]


@pytest.fixture(scope="module")
def alone(exact, named):
    """What the library answers with a sum of adapters: by its place in `MIXES`, and question."""
    model, tokenizer = mlx_lm.load(str(exact))[:2]
    for name in ("11", "22"):
        mount_adapter_on_model(model, name, named[name])
    answers = {}
    for number, scales in enumerate(MIXES):
        for question in QUESTIONS:
            with AdapterActivation(scales):
                text = mlx_lm.generate(model, tokenizer, prompt(tokenizer, question), max_tokens=24)
            answers[number, question] = text
    return answers


def test_each_sum_answers_as_alone_in_one_batch_and_from_the_prompt_cache(server, alone):
    asked = list(alone) * 2  # the second time from the prompt cache
    random.Random(2).shuffle(asked)

    def given(each):
        number, question = each
        return ask(server, None, question, extra_body={"lora": lora(MIXES[number])})

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(given, asked))
    assert [each for each, text in zip(asked, answers, strict=True) if text != alone[each]] == []
    # Half of an adapter says the same as all of it, less surely: see the next test.
    told = {tuple(alone[number, q] for q in QUESTIONS) for number in range(len(MIXES))}
    assert len(told) == len(MIXES) - 1


@pytest.mark.newest
def test_prompt_caches_of_the_same_adapters_with_other_scales_are_apart(server):
    def likely(scales):
        done = server.client().chat.completions.create(
            model="default_model",
            messages=[{"role": "user", "content": QUESTIONS[0]}],
            temperature=0,
            max_tokens=2,
            logprobs=True,
            extra_body={"lora": lora(scales)},
        )
        return [each.logprob for each in done.choices[0].logprobs.content]

    first, less, both, again, last = (
        likely(scales)
        for scales in (
            {"11": 1},
            {"11": 0.05},
            {"11": 1, "22": 1},
            {"11": 0.05},
            {"11": 1, "22": 0},
        )
    )
    assert again == pytest.approx(less, abs=2e-5)
    assert last == pytest.approx(first, abs=2e-5)
    assert abs(first[0] - less[0]) > 2e-4
    assert abs(first[0] - both[0]) > 2e-4


def test_a_sum_of_adapters_is_a_model_in_any_order(server, alone):
    for question in QUESTIONS:
        expected = alone[3, question]
        assert ask(server, "11+22", question) == expected
        assert ask(server, "22+11", question) == expected
        both = lora({"22": 1, "11": 1.0})
        assert ask(server, None, question, extra_body={"lora": both}) == expected
        assert ask(server, "22+11", question, extra_body={"lora": both}) == expected
        assert ask(server, None, question, extra_headers={"X-OptIQ-Adapter": "11+22"}) == expected


def test_an_adapter_with_scale_0_is_absent(server, plain):
    for scales in ({}, {"11": 0}, {"11": 0, "22": 0.0}):
        assert ask(server, None, extra_body={"lora": lora(scales)}) == plain[QUESTIONS[0]]
    assert ask(server, None, extra_body={"lora": lora({"11": 0, "22": 1})}) == "22"
    assert ask(server, "22", extra_body={"lora": lora({"11": 0, "22": 1})}) == "22"


def test_text_completions_and_streams_take_sums(server, alone):
    def complete(**options):
        done = server.client().completions.create(
            model="default_model", prompt="Say it.", max_tokens=4, temperature=0, **options
        )
        return done.choices[0].text

    whole, half = (complete(extra_body={"lora": lora({"11": s})}) for s in (1, 0.5))
    assert len({complete(), whole, half}) == 3
    chunks = server.client().chat.completions.create(
        model="11+22",
        messages=[{"role": "user", "content": QUESTIONS[1]}],
        temperature=0,
        max_tokens=24,
        stream=True,
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == alone[3, QUESTIONS[1]]
    seeded = ask(server, None, extra_body={"lora": lora({"11": 0.5})}, seed=3)  # served alone
    assert seeded == alone[4, QUESTIONS[0]]


@pytest.mark.parametrize(
    ("status", "param", "fields", "message"),
    [
        (404, "lora", {"lora": lora({"nobody": 0.5})}, "'nobody' is not served"),
        (404, "lora", {"lora": lora({"nobody": 0})}, "'nobody' is not served"),
        (404, "lora", {"lora": lora({"11+22": 1})}, "is not served"),
        (404, "model", {"model": "11+nobody"}, "'11+nobody' is not served"),
        (404, "model", {"model": "11+"}, "is not served"),
        (404, "model", {"model": "+" * 100_000}, "is not served"),
        (404, "model", {"model": "11+default_model"}, "is not served"),
        (400, "model", {"model": "11+11"}, "model names an adapter twice"),
        (400, "lora", {"lora": lora({"11": 1}) * 2}, "lora names an adapter twice"),
        (400, "lora", {"lora": lora({"11": "1"})}, "scale of an adapter must be a number"),
        (400, "lora", {"lora": lora({"11": None})}, "scale of an adapter must be a number"),
        (400, "lora", {"lora": lora({"11": True})}, "scale of an adapter must be a number"),
        (400, "lora", {"lora": lora({"11": float("nan")})}, "scale of an adapter must be"),
        (400, "lora", {"lora": lora({"11": float("inf")})}, "scale of an adapter must be"),
        (400, "lora", {"lora": lora({"11": 1e30})}, "number from -10 to 10"),
        (400, "lora", {"lora": lora({"11": 10**400})}, "number from -10 to 10"),
        (400, "lora", {"lora": [{"id": 0, "scale": 1}]}, "name of an adapter"),
        (400, "lora", {"lora": [{"id": "11"}]}, "with id and scale"),
        (400, "lora", {"lora": [{"id": "11", "scale": 1, "path": "/"}]}, "with id and scale"),
        (400, "lora", {"lora": ["11"]}, "with id and scale"),
        (400, "lora", {"lora": {"11": 1}}, "lora must be a list"),
        (400, "lora", {"lora": "11"}, "lora must be a list"),
        (400, "lora", {"lora": lora({"11": 1}) * 100}, "lora names more than 16 adapters"),
        (400, None, {"model": "22", "lora": lora({"11": 1})}, "model '22', lora '11'"),
        (400, None, {"model": "11", "lora": lora({"11": 0.5})}, "model '11', lora '0.5*11'"),
        (400, None, {"model": "11", "lora": []}, "names two adapters"),
    ],
)
def test_sums_that_cannot_be_served_are_refused(server, status, param, fields, message):
    found, body = post(server, "/v1/chat/completions", chat(**fields))
    assert (found, body["error"]["param"]) == (status, param)
    assert message in body["error"]["message"]
    assert len(body["error"]["message"]) < 400


def test_the_openai_client_raises_its_own_errors(server):
    with pytest.raises(openai.NotFoundError, match="nobody"):
        ask(server, None, extra_body={"lora": lora({"nobody": 1})})
    with pytest.raises(openai.BadRequestError, match="names two adapters"):
        ask(server, "22", extra_body={"lora": lora({"11": 1})})
    assert ask(server, "11") == "11"


def test_a_server_mounts_the_adapters_of_a_sum_together(exact, named, alone, tmp_path):
    words = [f"--optiq-adapter={name}={folder}" for name, folder in named.items()]
    with serve(tmp_path / "two", "--model", exact, *words, "--optiq-max-adapters", "2") as server:
        who = ["11+22", "33", "22+11", "11", "33", None] * 2
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda name: ask(server, name), who))
        both, base = alone[3, QUESTIONS[0]], alone[0, QUESTIONS[0]]
        assert answers == [both, "33", both, "11", "33", base] * 2
        three = chat(lora=lora({"11": 1, "22": 1, "33": 1}))
        status, body = post(server, "/v1/chat/completions", three)
        assert (status, body["error"]["param"]) == (400, "lora")
        assert "names 3 adapters, and at most 2 may be mounted" in body["error"]["message"]
    with serve(tmp_path / "one", "--model", exact, *words, "--optiq-max-adapters", "1") as server:
        status, body = post(server, "/v1/chat/completions", chat(model="11+22"))
        assert (status, body["error"]["param"]) == (400, "model")
        assert ask(server, "22", extra_body={"lora": lora({"11": 0, "22": 1})}) == "22"


def test_scales_of_names_that_share_weights_have_one_limit(exact, named, plain, tmp_path):
    words = [f"--optiq-adapter={name}={named['11']}" for name in ("11", "twin")]
    with serve(tmp_path / "log", "--model", exact, *words) as server:
        status, body = post(server, "/v1/chat/completions", chat(lora=lora({"11": 10, "twin": 1})))
        assert (status, body["error"]["param"]) == (400, "lora")
        assert "number from -10 to 10" in body["error"]["message"]
        assert ask(server, None, extra_body={"lora": lora({"11": 0.5, "twin": 0.5})}) == "11"
        none = lora({"11": 10, "twin": -10})
        assert ask(server, None, extra_body={"lora": none}) == plain[QUESTIONS[0]]


def test_a_server_without_adapters_refuses_sums_where_options_of_ours_are_on(exact, tmp_path):
    with serve(tmp_path / "log", "--model", exact, "--optiq-max-body", "100000") as server:
        status, body = post(server, "/v1/chat/completions", chat(lora=lora({"11": 1})))
        assert (status, body["error"]["param"]) == (404, "lora")


def test_an_adapter_whose_own_name_has_a_plus_comes_before_a_sum(tmp_path):
    offers = [Offer(name, name, tmp_path) for name in ("a", "b", "c", "a+b")]

    def selected(model):
        found = requests.select(offers, "base", Wanted(model=model))
        return found and dict(found.scales)

    assert selected("a+b") == {"a+b": 1.0}
    assert selected("b+a") == {"b": 1.0, "a": 1.0}
    assert selected("a+c") == {"a": 1.0, "c": 1.0}
    assert selected("base") is None
    by_field = Wanted(lora=[{"id": "a+b", "scale": 0.5}])
    found = requests.select(offers, "base", by_field)
    assert found is not None
    assert (dict(found.scales), found.field) == ({"a+b": 0.5}, "lora")
    with pytest.raises(Refusal, match="not served"):
        requests.select(offers, "base", Wanted(model="a+b+d"))


@pytest.mark.parametrize("name", ["default_model", "base"])
def test_every_field_takes_the_name_of_the_base(tmp_path, name):
    offers = [Offer("a", "a", tmp_path)]
    for wanted in (Wanted(model=name), Wanted(adapters=name), Wanted(header=f" {name}")):
        assert requests.select(offers, "base", wanted) is None
    with pytest.raises(Refusal, match="two adapters"):
        requests.select(offers, "base", Wanted(model="a", header=name))
