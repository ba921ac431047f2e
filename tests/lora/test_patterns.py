"""PEFT's patterns: the same answers as regular expressions give, without running one."""

import itertools
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.lora.forms import patterns

MODULES = (
    "self_attn.q_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.experts.12.down_proj",
    "linear_attn.in_proj_qkv",
)
PATHS = [
    *(f"model.layers.{layer}.{module}" for layer in (0, 1, 10, 23) for module in MODULES),
    *(f"language_model.model.layers.{layer}.mlp.up_proj" for layer in (1, 2)),
    "model.embed_tokens",
    "lm_head",
    "visual.blocks.3.attn.qkv",
]


def by_re(keys, paths):
    """As PEFT does it."""
    found = {}
    for path in paths:
        for number, key in enumerate(keys):
            if re.match(rf"(.*\.)?({key})$", path):
                found[path] = number
                break
    return found


WRITTEN = [
    r"q_proj",
    r"model.layers.1.self_attn.q_proj",
    r"model\.layers\.1\.self_attn\.q_proj",
    r".*\.q_proj",
    r".*\.q_proj$",
    r"^model\.layers\.\d+\.self_attn\.(q|v)_proj$",
    r"^model.layers.\d+.mlp.(gate|up)_proj$",
    r"layers\.[01]\.self_attn\.v_proj",
    r"layers\.[0-9]+\.mlp\.(?:gate_proj|experts\.\d+\.down_proj)",
    r"model\.layers\.(0|1|23)\..*",
    r".*layers\.(?:1[0-9]|2[0-3])\.self_attn.*",
    r".*self_attn.*q_proj",
    r"^.*mlp.+",
    r"model\.layers\.\d+\..+\.down_proj",
    r"(language_model\.)?model\.layers\.1\.mlp\.up_proj",
    r"^(language_model\.)?model\.layers\.1\.mlp\.up_proj",
    r"in_proj_(qkvz?|ba)",
    r"lm_head|embed_tokens",
    r"^lm_head|^model.embed_tokens",
    r".*?(?:visual|vision).*?(?:qkv|proj).*?",
    r".*",
    r"proj",
    r"^layers\.1\.self_attn\.q_proj",
    r"layers\.\d\.mlp\.gate_proj",
    r"model\.layers\.\d+\.mlp\.experts\.12\.down_proj",
    r"model\.layers\.10\.mlp\.experts\.\d+\.down_proj",
]


@pytest.mark.parametrize("key", WRITTEN)
def test_what_people_write_fits_what_it_fits_in_peft(key):
    assert patterns.first_fits([key], PATHS, "a file") == by_re([key], PATHS)


def test_the_first_pattern_that_fits_counts():
    for keys in itertools.permutations(WRITTEN[:8], 3):
        assert patterns.first_fits(keys, PATHS, "a file") == by_re(keys, PATHS)


words = st.sampled_from(["a", "b", "ab", "0", "12", "q_proj"])
parts = st.one_of(
    words,
    st.lists(words, min_size=1, max_size=3).map(lambda found: f"({'|'.join(found)})"),
    st.sampled_from([r"\d+", "[0-9]+", "[ab]", "[0-3]", "(?:a|b)?"]),
)
keys = st.tuples(
    st.sampled_from(["", "^", r".*\.", ".*", "^.*"]),
    st.lists(st.tuples(parts, st.sampled_from([r"\.", r"\..*\.", r"\..+", ".*"])), max_size=3),
    parts,
    st.sampled_from(["", "$"]),
).map(lambda k: k[0] + "".join(itertools.chain(*k[1])) + k[2] + k[3])
paths = st.lists(words, min_size=1, max_size=5).map(".".join)


@given(st.lists(keys, max_size=3), st.lists(paths, min_size=1, max_size=4))
def test_every_pattern_that_is_taken_fits_as_a_regular_expression_does(written, found):
    try:
        fits = patterns.first_fits(written, found, "a file")
    except InputError as error:
        fits = str(error)
    if isinstance(fits, str):
        assert "not between dots" in fits or "are more than names" in fits
    else:
        assert fits == by_re(written, found)


@pytest.mark.parametrize(
    "key",
    [
        "(a+)+b",
        "(.*a){20}b",
        "(a|a)*b",
        r"(?=a)b",
        r"(a)\1",
        "[^.]+",
        "a{1000000}",
        "(" * 200 + "a" + ")" * 200,
        "(",
        ")",
        "a)(b",
        "[",
        "[]a]",
        "a**",
        "?",
        r"\w+",
        r"block\d+",
        "a$b^c",
        "(a|b)" * 50,
        "a b",
        "a\n",
        "\0",
        "\x01",
        r"\Z",
        "a" * 301 + "?",
    ],
)
def test_anything_else_is_refused_in_one_sentence(key):
    with pytest.raises(InputError, match=r"^a file: pattern .* are not run as regular") as raised:
        patterns.first_fits([key], PATHS, "a file")
    assert len(str(raised.value)) < 400


TABLES = {
    "names": [f"model.layers.{n}.q_proj" for n in range(200_000)],
    "escaped names": [rf"^model\.layers\.{n}\.q_proj$" for n in range(200_000)],
    "groups": [f"({n}|b)_proj" for n in range(200_000)],
    "wildcards": [f".*a.*{n}.*_proj" for n in range(200_000)],
    "alternatives": [f"(a|b|c|d|e|f)(a|b|c|d|e|f)(a|b|c|d|e|f){n}" for n in range(200_000)],
    "optional parts": ["a?b?c?d?e?f?g?h?" * 8] * 200_000,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_200000_patterns_takes_no_time_or_is_refused(name):
    begin = time.process_time()
    try:
        found = patterns.first_fits(TABLES[name], PATHS * 20, "a file")
        assert name in ("names", "escaped names")
        assert not found
    except InputError:
        assert name not in ("names", "escaped names")
    assert time.process_time() - begin < 2


def test_many_modules_take_no_time_or_are_refused():
    wild = [f"a.*{n}" for n in range(60)] + [r"b\.\d+\.c"]
    modules = ["a.1.2.3." * 30 + f"{n}z" for n in range(200_000)]
    begin = time.process_time()
    assert not patterns.first_fits(wild, modules[:2_000], "a file")
    with pytest.raises(InputError, match="too many to compare"):
        patterns.first_fits(wild, modules, "a file")
    assert time.process_time() - begin < 3
    with pytest.raises(InputError, match="longer than any"):
        patterns.first_fits(wild, ["a" * 301], "a file")
