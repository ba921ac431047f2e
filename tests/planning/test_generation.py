import re
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_optiq_ext.planning.calibration import Sampling, sampled
from mlx_optiq_ext.planning.documents import documents
from mlx_optiq_ext.planning.generation import generated
from mlx_optiq_ext.planning.kinds import KINDS, Kind

NAMED = {kind.name: kind for kind in KINDS}


class Letters:
    """A tokenizer of one token a character, with tokens around a text and a turn if asked."""

    vocab_size = 1 << 13
    all_special_ids = (0, 1, 2)
    unk_token_id = 0

    def __init__(self, bos=None, eos=None, template: Any = None):
        self.bos_token_id, self.eos_token_id, self.chat_template = bos, eos, template
        self.bos_token = None if bos is None else chr(bos)

    def encode(self, text, add_special_tokens=True):
        begun = self.bos_token_id is not None and add_special_tokens
        return [self.bos_token_id] * begun + [ord(letter) for letter in text]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return self.chat_template(messages)


def rendered(messages):
    """A template whose chats begin a text and whose turns end with the token 2."""
    turns = "".join(f"{m['role'][0].upper()}:{m['content']}\2\n" for m in messages)
    return f"\1{turns}A:"


class Writes(nn.Module):
    """Always writes one token."""

    layers = ()

    def __init__(self, token, size=Letters.vocab_size):
        super().__init__()
        self.token, self.size = token, size

    def __call__(self, tokens, cache):
        certain = 100.0 * (mx.arange(self.size) == self.token)
        return mx.broadcast_to(certain, (len(tokens), 1, self.size))


def texts(rows):
    """Rows of `Letters` as texts."""
    return ["".join(map(chr, row)) for row in rows]


def contains(rows, document):
    """Whether the first turn of a document stands in one of some rows, followed by something."""
    turn = ",".join(map(str, document[0]))
    return any(f",{turn}," in f",{','.join(map(str, row))}" for row in rows.tolist())


def test_every_kind_is_measured_on_and_held_out(loaded):
    model, tokenizer = loaded
    data = sampled(model, tokenizer, Sampling(length=512, count=16))
    for kind in KINDS:
        begun = documents(kind, tokenizer)
        assert begun, kind.name
        for rows in (data.measured, data.held_out):
            assert any(contains(rows, document) for document in begun), kind.name


def test_one_seed_draws_one_text_and_another_another(loaded):
    model, tokenizer = loaded
    one, same, other = (generated(model, tokenizer, 9, 40, seed=seed) for seed in (3, 3, 4))
    assert one.dtype == np.int32
    assert (one == same).all()
    assert (one != other).any()


def test_a_document_that_ends_makes_room_for_one_of_another_kind():
    kinds = [Kind("abc", ("abc",)), Kind("def", ("def",))]
    (row,) = texts(generated(Writes(2), Letters(1, 2), 1, 12, kinds=kinds[:1]))
    assert row == "\1abc\2\1abc\2\1a"
    first, second = texts(generated(Writes(2), Letters(1, 2), 2, 5, kinds=kinds))
    assert (first, second) == ("\1abc\2", "\1def\2")


def test_a_document_that_does_not_end_leaves_room_for_others():
    five = [Kind(letter, (letter,)) for letter in "abcde"]
    (row,) = texts(generated(Writes(ord("x")), Letters(), 1, 12, kinds=five, least=3))
    assert row == "axxxxexxxxdx"  # every fourth kind in turn


def test_surprises_have_their_share():
    kinds = [Kind(str(share), ("a",), surprises=share) for share in (0.0, 0.125, 0.5)]
    rows = generated(Writes(ord("x")), Letters(), 12, 400, kinds=kinds, least=1)
    shares = (rows[:, 1:] != ord("x")).mean(axis=1).reshape(4, 3).mean(axis=0)
    assert shares == pytest.approx([0.0, 0.125, 0.5], abs=0.05)


def test_a_cold_kind_is_drawn_greedily(loaded):
    model, tokenizer = loaded
    cold = replace(NAMED["prose"], temperature=1e-4, surprises=0.0)
    rows = generated(model, tokenizer, 2, 60, kinds=[cold], least=1)
    begun = [document[0] for document in documents(cold, tokenizer)]
    best = np.array(mx.argmax(model(mx.array(rows)), axis=-1))
    for row, expected in zip(rows.tolist(), best.tolist(), strict=True):
        (fed,) = (len(turn) for turn in begun if tuple(row[: len(turn)]) == turn)
        assert row[fed:] == expected[fed - 1 : -1]


def test_sequences_are_drawn_a_few_at_a_time_where_they_are_many(loaded):
    model, tokenizer = loaded
    cold = replace(NAMED["prose"], temperature=1e-4, surprises=0.0)
    peaks, rows = [], []
    for held in (1, 1 << 30):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        rows.append(generated(model, tokenizer, 48, 40, kinds=[cold], least=1, held=held))
        peaks.append(mx.get_peak_memory() - before)
    assert (rows[0] == rows[1]).all()
    assert peaks[0] < peaks[1] / 4


def test_a_chat_goes_through_the_template():
    chat = Kind("chat", ("one", "two"), chat=True)
    rows = generated(Writes(2), Letters(1, 2, rendered), 2, 40, kinds=[chat], least=1)
    turns = {"\1U:one\2\nA:\2\nU:two\2\nA:\2", "\1U:two\2\nA:\2\nU:one\2\nA:\2"}
    assert {row[:22] for row in texts(rows)} == turns


def test_a_user_that_the_model_writes_has_turns_too():
    asked = Kind("asked", ("",), chat=True)
    (row,) = texts(generated(Writes(2), Letters(1, 2, rendered), 1, 32, kinds=[asked]))
    assert row[:16] == "\1U:\2\nA:\2\nU:\2\nA:\2"
    (row,) = texts(generated(Writes(ord("x")), Letters(1, 2, rendered), 1, 9, kinds=[asked]))
    assert row == "\1U:xxxxx\1"


def test_a_template_that_takes_one_turn_is_asked_no_more():
    def alone(messages):
        if len(messages) > 1:
            raise ValueError("one message only")
        return rendered(messages)

    (document,) = documents(Kind("chat", ("one",), chat=True), Letters(1, 2, alone))
    assert texts(document) == ["\1U:one\2\nA:"]
    (document,) = documents(Kind("asked", ("",), chat=True), Letters(1, 2, alone))
    assert texts(document) == ["\1U:", "\2\nA:"]
    assert documents(Kind("chat", ("one",), chat=True), Letters(1, 2, lambda _: "")) == []


def test_without_a_template_a_request_is_plain_text():
    (document,) = documents(Kind("chat", ("one",), chat=True), Letters())
    assert texts(document) == ["one\n"]
    assert documents(Kind("asked", ("",), chat=True), Letters()) == []


def test_a_language_that_the_tokenizer_spells_out_is_left_out(loaded):
    class Words(Letters):
        def encode(self, text, add_special_tokens=True):
            return [3 + len(word) for word in text.split()]

    languages = NAMED["languages"]
    assert len(documents(languages, Words())) == len(languages.beginnings)
    left = {loaded[1].decode(list(document[0])) for document in documents(languages, loaded[1])}
    assert left == {text for text in languages.beginnings if text.isascii()}


@pytest.mark.parametrize(("tokens", "first"), [((1, 2), 1), ((None, 2), 2)])
def test_an_open_document_begins_with_what_stands_between_texts(tokens, first):
    assert documents(Kind("open", ("",)), Letters(*tokens)) == [((first,),)]


def test_a_model_for_which_no_kind_can_be_begun_begins_with_any_token():
    rows = generated(Writes(ord("x")), Letters(), 64, 4, kinds=[Kind("open", ("",))])
    assert len(set(rows[:, 0])) > 50
    assert rows.min() >= 3
    unknown = [Kind("unknown", ("a\0",)), Kind("open", ("",))]
    assert [documents(kind, Letters()) for kind in unknown] == [[], []]


def test_beginnings_are_short_and_each_is_there_once():
    for kind in KINDS:
        assert len(set(kind.beginnings)) == len(kind.beginnings)
        for text in kind.beginnings:
            assert len(text) <= 100
            assert not re.search(r"\S $", text), text  # words begin with their space
