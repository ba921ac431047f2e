"""Budgets as users write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.planning.budget import BPW, SHARE, SIZE, UNITS, Budget, size_text


@pytest.mark.parametrize(
    ("text", "amount", "kind"),
    [
        ("4.5", 4.5, BPW),
        (" 16 ", 16, BPW),
        ("8GB", 8_000_000_000, SIZE),
        ("7.5GiB", 7.5 * 1024**3, SIZE),
        ("7.5 gib", 7.5 * 1024**3, SIZE),
        ("500mb", 500_000_000, SIZE),
        (".5KiB", 512, SIZE),
        ("70%", 0.7, SHARE),
        ("100 %", 1, SHARE),
    ],
)
def test_a_budget_is_read(text, amount, kind):
    budget = Budget.parse(text)
    assert (budget.amount, budget.kind) == (pytest.approx(amount), kind)
    assert str(budget) == text.strip()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is not a number of bits per weight"),
        ("GB", "'GB' is not"),
        ("-8GB", "'-8GB' is not"),
        ("nan", "'nan' is not"),
        ("8GB GB", "'8GB GB' is not"),
        ("8e3GB", "'8e3GB' is not"),
        ("17", "above 0 and up to 16"),
        ("0", "'0' is not"),
        ("0.0KB", "'0.0KB' is not"),
        (".0001KB", "is not"),
        ("8Gb/s", "'8Gb/s' is not"),
        ("8XB", "unknown unit: give KB, MB, GB, TB, KiB, MiB, GiB, TiB, % of the 16-bit files"),
        ("4 bits", "unknown unit"),
        ("100.1%", "more than the original: give at most 100%"),
        ("9" * 400 + "GB", "is not"),
    ],
)
def test_what_is_no_budget_is_refused_in_one_sentence(text, said):
    with pytest.raises(InputError) as raised:
        Budget.parse(text)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_list_has_each_budget_once_and_one_kind():
    assert [b.amount for b in Budget.parse_list("4.5, 3,4.50")] == [4.5, 3]
    assert [str(b) for b in Budget.parse_list("8GB,7.5GiB")] == ["8GB", "7.5GiB"]
    for text in ("8GB,4.5", "70%,4", "1GB,10%"):
        with pytest.raises(InputError, match=r"mixes .* with .*: give budgets of one kind"):
            Budget.parse_list(text)
    for text in ("", ",", "4,", "4;5"):
        with pytest.raises(InputError, match="is not a number of bits"):
            Budget.parse_list(text)


@given(st.text(max_size=20))
def test_any_text_is_a_budget_above_zero_or_an_input_error(text):
    try:
        budget = Budget.parse(text)
    except InputError:
        return
    assert 0 < budget.amount <= {BPW: 16, SHARE: 1, SIZE: 1e27}[budget.kind]


@given(st.integers(1, 10**16))
def test_a_size_in_a_message_is_enough_as_a_budget(size):
    text = size_text(size)
    if not text.endswith("bytes"):
        assert size <= Budget.parse(text).amount <= size + UNITS[text.split()[1]] / 999


def test_a_budget_made_in_python_has_words_too():
    assert str(Budget(4.5)) == "4.5"
    assert str(Budget(8_000_000, SIZE)) == "8,000,000 bytes"
    assert str(Budget(0.3, SHARE)) == "30%"
