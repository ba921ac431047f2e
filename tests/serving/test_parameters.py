"""Parameters that end mlx-lm's generation thread, or its process, are refused before that."""

import pytest
from live_server import serve
from mlx_lm import server as stock

from mlx_optiq_ext.serving import Refusal, check, check_prompt, vocabulary_of

from .raw import COMPLETIONS, chat, get, post

NAN, INFINITE = float("nan"), float("inf")
WARM = {"temperature": 0.7}
HUGE = 10**400

#: Fields that stock does not survive, or drops the connection for, and the one to name.
DEADLY = [
    ({"top_k": 100_000, **WARM}, "top_k"),
    ({"top_k": HUGE, **WARM}, "top_k"),
    ({"temperature": HUGE}, "temperature"),
    ({"temperature": 1e30}, "temperature"),
    ({"temperature": NAN}, "temperature"),
    ({"temperature": INFINITE}, "temperature"),
    ({"temperature": 1e-320}, "temperature"),
    ({"top_p": NAN, **WARM}, "top_p"),
    ({"min_p": NAN, **WARM}, "min_p"),
    ({"repetition_penalty": HUGE}, "repetition_penalty"),
    ({"repetition_penalty": NAN}, "repetition_penalty"),
    ({"repetition_penalty": 1.1, "repetition_context_size": 10**30}, "repetition_context_size"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"logit_bias": {str(10**30): 1}}, "logit_bias"),
    ({"logit_bias": {"-99999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": NAN}}, "logit_bias"),
    ({"logit_bias": {str(token): -INFINITE for token in range(2000)}}, "logit_bias"),
    ({"stop": True}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": 1.5}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": ["a", None]}, "stop"),
    ({"stop": [["a"]]}, "stop"),
    ({"stop": [{}]}, "stop"),
    ({"stop": "\ud800"}, "stop"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
]
#: Of mlx-lm from 0.31 on.
LATER = [
    ({"xtc_probability": 0.5, "xtc_threshold": NAN, **WARM}, "xtc_threshold"),
    ({"xtc_probability": NAN, **WARM}, "xtc_probability"),
    ({"presence_penalty": HUGE}, "presence_penalty"),
    ({"presence_penalty": 1e300}, "presence_penalty"),
    ({"frequency_penalty": -1e300}, "frequency_penalty"),
    ({"frequency_penalty": 1, "frequency_context_size": 10**30}, "frequency_context_size"),
    ({"xtc_probability": 0.5, "xtc_threshold": 0.9, **WARM}, "xtc_threshold"),
    ({"logprobs": True, "top_logprobs": True}, "top_logprobs"),
    ({"logit_bias": {"1": None}}, "logit_bias"),
    ({"logit_bias": {"1": HUGE}}, "logit_bias"),
    ({"stream": True, "stream_options": True}, "stream_options"),
    ({"stream": True, "stream_options": []}, "stream_options"),
]
NEW = hasattr(stock, "TimeBudget")

#: What stock takes.
HARMLESS = [
    {"top_k": 100_000, "temperature": 0},
    {"top_k": 10, "top_p": 0, "min_p": 0.1, **WARM},
    {"temperature": 5},
    {"repetition_penalty": 1.3, "repetition_context_size": 0},
    {"logit_bias": {"0": -100}},
    {"logit_bias": {"0": -1e9, "5": 100}},
    {"stop": []},
    {"stop": ""},
    {"stop": None},
    {"stop": ["x", "\u0000"]},
    {"seed": 2**64 - 1},
    {"seed": 0},
]


@pytest.fixture(scope="module")
def unflagged(tiny, tmp_path_factory):
    """A server with none of our options."""
    with serve(tmp_path_factory.mktemp("unflagged") / "log", "--model", tiny) as server:
        # The first request waits until the model is there.
        assert post(server, COMPLETIONS, chat())[0] == 200
        yield server


@pytest.mark.parametrize(("fields", "param"), DEADLY + (LATER if NEW else []), ids=str)
def test_a_deadly_parameter_is_refused_and_named(unflagged, fields, param):
    status, body = post(unflagged, COMPLETIONS, chat(**fields))
    assert (status, body["error"]["param"], body["error"]["code"]) == (400, param, "invalid_value")
    assert get(unflagged, "/health")[0] == 200
    assert post(unflagged, COMPLETIONS, chat())[0] == 200


@pytest.mark.parametrize("fields", HARMLESS, ids=str)
def test_what_stock_takes_is_taken(unflagged, fields):
    assert post(unflagged, COMPLETIONS, chat(**fields))[0] == 200


@pytest.mark.parametrize("prompt", ["", [], ["a"], ["a", "b"], [1, 2], None, 7, "\ud800", [[]]])
def test_a_prompt_that_is_no_text_ends_its_request_only(unflagged, prompt):
    status, _ = post(unflagged, "/v1/completions", {"prompt": prompt, "max_tokens": 2})
    assert status in (400, 404)
    assert post(unflagged, COMPLETIONS, chat())[0] == 200


@pytest.mark.newest
@pytest.mark.parametrize(
    "options",
    [{"return_tensors": "np"}, {"chat_template": ""}, {"max_length": 0, "truncation": True}],
)
def test_template_options_that_leave_no_tokens_end_their_request_only(unflagged, options):
    assert post(unflagged, COMPLETIONS, chat(chat_template_kwargs=options))[0] == 404
    assert post(unflagged, COMPLETIONS, chat())[0] == 200


@pytest.mark.newest
def test_what_stock_refuses_itself_keeps_its_words(unflagged):
    status, body = post(unflagged, COMPLETIONS, chat(top_p=2))
    assert (status, body) == (400, {"error": "top_p must be at most 1"})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": []}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": "x"}, "seed"),
        ({"logit_bias": []}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stream": 1}, "stream"),
        ({"repetition_penalty": -1}, "repetition_penalty"),
        *DEADLY[:3],
    ],
    ids=str,
)
def test_with_our_options_every_refusal_names_its_field(server, fields, param):
    status, body = post(server, COMPLETIONS, chat(**fields))
    assert (status, body["error"]["param"]) == (400, param)
    assert body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[]", b"7", b"null", b"[" * 90_000, b'{"messages": 1}', b"{}"]
)
def test_with_our_options_a_bad_body_is_answered_in_json(server, body):
    status, answer = post(server, COMPLETIONS, body)
    assert status == 400
    assert answer["error"]["message"]


class Model:
    def __init__(self, **args):
        self.args = type("Args", (), args)()


def test_the_vocabulary_is_the_models_own():
    assert vocabulary_of(Model(vocab_size=5)) == 5
    assert vocabulary_of(Model(text_config={"vocab_size": 7})) == 7
    assert vocabulary_of(Model()) is None
    assert vocabulary_of(None) is None


def test_bounds_are_the_vocabularys():
    check({"top_k": 4, "temperature": 1, "logit_bias": {4: 1.0}}, 5)
    for fields in ({"top_k": 5, "temperature": 1}, {"logit_bias": {5: 1.0}}):
        with pytest.raises(Refusal):
            check(fields, 5)
    check({"logit_bias": dict.fromkeys(range(4), -1e9)}, 5)
    with pytest.raises(Refusal, match="all tokens"):
        check({"logit_bias": dict.fromkeys(range(5), -1e9)}, 5)


@pytest.mark.parametrize("prompt", [[], [[1]], {"a": 1}, "text", None])
def test_a_prompt_is_a_list_of_tokens(prompt):
    check_prompt([1, 2])
    with pytest.raises(ValueError, match="the prompt is"):
        check_prompt(prompt)
