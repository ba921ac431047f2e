"""Tokens that are computed in a long conversation: without a cache, with mlx-lm's and with ours."""

from typing import Any

import pytest

from .conftest import ENDER, Toy, stored, tiered, toy

#: Ends each prompt and stands in no later one, as what opens a thought or an answer does.
OPENING = [40, 41, 42]
MESSAGE, ANSWER, TURNS = 7, 4, 20


def conversation(own: Toy, cache: Any = None) -> tuple[list[list[int]], list[int]]:
    """The answers in 20 turns, and the tokens that were computed for each.

    In every third turn the message is edited, in every fourth the answer is made again.
    """
    history, answers, counts = [3, 5, 7, ENDER], [], []

    def ask(message: list[int]) -> list[int]:
        before = own.seen
        answers.append(own.answer([*history, *message, *OPENING], ANSWER, cache))
        counts.append(own.seen - before)
        return answers[-1]

    for turn in range(TURNS):
        message = [*((turn + i) % 28 + 1 for i in range(MESSAGE - 1)), ENDER]
        answer = ask(message)
        if turn % 3 == 2:
            message = [*message[:-3], 29, 30, ENDER]
            answer = ask(message)
        if turn % 4 == 3:
            answer = ask(message)
        history += [*message, *answer, ENDER]
    return answers, counts


@pytest.mark.parametrize("family", ["qwen3_5", "gemma3_text"])
def test_turns_compute_what_is_new_where_stock_computes_nearly_all(family, tmp_path):
    from mlx_lm.models.cache import LRUPromptCache

    own, at = toy(family), stored(tmp_path)
    expected, whole = conversation(own)
    by_stock, stock = conversation(own, LRUPromptCache())
    by_ours, ours = conversation(own, tiered(own, at))
    assert at.writer.flush()
    from_disk, again = conversation(own, tiered(own, stored(tmp_path)))
    assert expected == by_stock == by_ours == from_disk
    # An answer as the next prompt has it, the message behind it, and the opening.
    assert max(ours) == ANSWER + 1 + MESSAGE + len(OPENING)
    assert again == [1] * len(ours)
    assert (sum(whole), sum(stock), sum(ours)) == (4058, 3333, 364)
