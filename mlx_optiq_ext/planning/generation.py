"""Text of many kinds, drawn from a model itself for want of any other.

A sequence holds documents of several kinds (see `kinds`), one after the other as pretraining packs
them: a beginning is fed to the model, which goes on with it until it ends the text or has written
its share of the sequence. Then the next kind has its turn.

A model's own text holds no surprise: it expects all of it. A plan made on such text keeps what the
model does there and loses the rest, so that its KL on others' text is far above the one measured.
Therefore some kinds have tokens in them that the model would hardly have written.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import count as numbers
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..model.layers import arrays
from ..model.vocabulary import embedding_rows
from .documents import Document, documents, ends
from .kinds import KINDS, Kind

#: Kinds between two documents of a sequence. So every kind is in one of any four sequences of
#: different first kinds, if each has room for a quarter of the kinds.
STRIDE = 4
#: Documents of a sequence, where their beginnings are short and none ends by itself.
DOCUMENTS = 2
#: Bytes that the sequences drawn at once may take. It does not follow the machine's memory, since
#: what is drawn depends on it.
HELD = 1 << 30
#: Arrays (sequences, vocabulary) in float32 that a draw holds at once.
DRAWS = 5

#: What a document takes next: a token, or None to let the model draw at this temperature.
Step = tuple[int | None, float]


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a model without a tokenizer, for which mlx-lm makes an empty one.

    Raises:
        InputError: The tokenizer knows no token.
    """
    if hasattr(tokenizer, "vocab_size") and not ordinary(tokenizer):
        name = getattr(tokenizer, "name_or_path", None) or "this model"
        raise InputError(
            f"{name} has no tokenizer, which reading a text needs: put its tokenizer files "
            "(tokenizer.json, tokenizer_config.json) beside the weights"
        )


def ordinary(tokenizer: Any, rows: int | None = None) -> list[int]:
    """Tokens that stand for text.

    Args:
        tokenizer: Whose tokens.
        rows: Of the embedding, beyond which there are none.
    """
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    special = set(getattr(tokenizer, "all_special_ids", None) or [])
    special |= {number for number, token in added.items() if token.special}
    known = tokenizer.vocab_size if rows is None else min(rows, tokenizer.vocab_size)
    return [t for t in range(known) if t not in special]


def generated(
    model: Any,
    tokenizer: Any,
    count: int,
    length: int,
    *,
    each: int = 1,
    seed: int = 0,
    kinds: Sequence[Kind] = KINDS,
    least: int = DOCUMENTS,
    held: int = HELD,
) -> np.ndarray:
    """Sequences drawn from the model.

    Args:
        model: An mlx-lm model.
        tokenizer: Its tokenizer.
        count: Sequences.
        length: Tokens of each.
        each: Sequences in a row that begin with one kind.
        seed: Of all draws.
        kinds: Kinds of text. One that the tokenizer cannot write is left out.
        least: Documents of a sequence, where their beginnings are short.
        held: Bytes that the sequences drawn at once may take; one is always drawn.

    Returns:
        int32 (count, length).
    """
    check_tokenizer(tokenizer)
    rng, rows = np.random.default_rng(seed), embedding_rows(model)
    words, last = ordinary(tokenizer, rows), ends(tokenizer)

    def blind() -> int:
        return words[rng.integers(len(words))]

    def surprise(share: float) -> int | None:
        return blind() if share and rng.random() < share else None

    begun = ((kind, documents(kind, tokenizer, rows)) for kind in kinds)
    decks = [(kind, _shuffled(found, rng)) for kind, found in begun if found]
    if not decks:
        decks = [(kind, _blindly(blind)) for kind in kinds]
    share = -(-length // least)
    scripts = [
        _script(_in_turn(decks, index // each), last, share, surprise) for index in range(count)
    ]
    most = max(1, min(count, held // _bytes(model, length)))
    starts, key = range(0, count, most), mx.random.key(seed)
    keys = mx.random.split(key, len(starts)) if len(starts) > 1 else [key]
    drawn = [
        np.stack(list(islice(_generate(model, scripts[i : i + most], own), length)), axis=1)
        for i, own in zip(starts, keys, strict=True)
    ]
    return np.concatenate(drawn)


def _shuffled(found: list[Document], rng: np.random.Generator) -> Iterator[Document]:
    """All documents in some order, and again without end."""
    while True:
        for index in rng.permutation(len(found)):
            yield found[index]


def _blindly(blind: Callable[[], int]) -> Iterator[Document]:
    """Documents that begin with any token."""
    while True:
        yield ((blind(),),)


def _in_turn(
    decks: list[tuple[Kind, Iterator[Document]]], first: int
) -> Iterator[tuple[Kind, Document]]:
    """The documents of one sequence."""
    for number in numbers(first, STRIDE):
        kind, deck = decks[number % len(decks)]
        yield kind, next(deck)


def _script(
    begun: Iterator[tuple[Kind, Document]],
    last: frozenset[int],
    most: int,
    surprise: Callable[[float], int | None],
) -> Generator[Step, int, None]:
    """What one sequence takes, token by token; is sent each token that it took.

    Args:
        begun: Its documents.
        last: Tokens that end a text or a turn.
        most: Tokens that the model writes of a document, beside those that are fed to it.
        surprise: A token to take in place of the model's, or None, for a share of surprises.
    """
    for kind, document in begun:
        written, token = 0, -1
        for turn in document:
            # The model has often written the end of its turn, which the template has too.
            for fed in turn[1:] if turn[0] == token else turn:
                yield fed, kind.temperature
            while written < most:
                token = yield surprise(kind.surprises), kind.temperature
                written += 1
                if token in last:
                    break
            if written >= most:
                break


def _bytes(model: Any, length: int) -> int:
    """Bytes that a sequence of so many tokens takes while it is drawn."""
    from mlx_lm.models.cache import make_prompt_cache

    cache, sizes = make_prompt_cache(model), []
    for _ in range(2):
        logits = model(mx.array([[0]]), cache=cache)
        sizes.append(sum(array.nbytes for array in arrays([one.state for one in cache])))
    grows = sizes[1] - sizes[0]
    return sizes[0] + grows * (length - 1) + DRAWS * 4 * logits.shape[-1]


def _generate(
    model: Any, scripts: Sequence[Generator[Step, int, None]], key: mx.array
) -> Iterator[np.ndarray]:
    """One token of every sequence at a time, int32 (count,), without end.

    Args:
        model: An mlx-lm model.
        scripts: What each sequence takes; of the first step a token.
        key: Of the model's draws.
    """
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    taken = np.array([next(script)[0] for script in scripts], np.int32)
    while True:
        yield taken
        steps = [script.send(int(t)) for script, t in zip(scripts, taken, strict=True)]
        instead = mx.array([-1 if token is None else token for token, _ in steps])
        key, draw = mx.random.split(key)
        logits = model(mx.array(taken)[:, None], cache=cache)[:, -1].astype(mx.float32)
        heat = mx.array([temperature for _, temperature in steps])[:, None]
        drawn = mx.random.categorical(logits / heat, key=draw)
        taken = np.array(mx.where(instead < 0, drawn, instead), np.int32)
