"""Beginnings of documents as tokens of one tokenizer."""

from typing import Any
from unicodedata import east_asian_width

from .kinds import Kind

#: Tokens to feed, turn by turn: after each turn the model writes until it ends the text.
Document = tuple[tuple[int, ...], ...]

#: Most tokens per letter in a language that a tokenizer has words of; a wide letter, as of Chinese,
#: counts as two. SmolLM2's tokenizer takes 0.3 for English, 0.35 for French, 0.7 to 0.8 for Russian
#: and 0.9 for Chinese, Gemma 3's 0.2 to 0.4 for each of them.
SPELLED = 0.6

#: Stand for the texts of a chat where its template is looked at.
ASKED, ANSWERED, AGAIN = "FIRSTREQUEST", "FIRSTANSWER", "SECONDREQUEST"


def ends(tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text or a turn."""
    found = getattr(tokenizer, "eos_token_ids", None) or [getattr(tokenizer, "eos_token_id", None)]
    return frozenset(int(token) for token in found if token is not None)


def documents(kind: Kind, tokenizer: Any, rows: int | None = None) -> list[Document]:
    """The documents of a kind, one for each beginning that the tokenizer can write.

    Left out are beginnings in other letters than ASCII's that it spells out, those with tokens
    that it or the model does not know, and empty ones where no token begins or ends a text. Without
    a chat template a user's turn is plain text, and there is none for the model to write.

    Args:
        kind: The kind.
        tokenizer: Whose tokens and chat template.
        rows: Of the model's embedding; None if that is not known.
    """
    unknown, found = getattr(tokenizer, "unk_token_id", None), []
    for number, beginning in enumerate(kind.beginnings):
        if kind.chat:
            document = _chat(beginning, kind.beginnings[number - 1], tokenizer)
        else:
            document = (_encoded(beginning, tokenizer),)
        tokens = [token for turn in document for token in turn]
        known = unknown not in tokens and (rows is None or max(tokens, default=0) < rows)
        if known and document and all(document) and not _spelled(beginning, tokenizer):
            found.append(document)
    return found


def _spelled(text: str, tokenizer: Any) -> bool:
    """Whether a text is in a language that the tokenizer has no words of."""
    letters = sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)
    return not text.isascii() and len(_encoded(text, tokenizer)) > SPELLED * letters


def _encoded(text: str, tokenizer: Any) -> tuple[int, ...]:
    """Tokens of a text; of an empty one what begins or ends a text, if anything does."""
    if text:
        return tuple(tokenizer.encode(text))
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return (int(token),)
    return ()


def _chat(request: str, following: str, tokenizer: Any) -> Document:
    """What is fed to the model before each of its turns in a chat.

    Args:
        request: The user's first turn; if it is empty, the model writes the user's turns.
        following: The user's second turn.
        tokenizer: Whose chat template renders the chat. Without one the request is all.
    """
    if not getattr(tokenizer, "chat_template", None):
        return (_encoded(f"{request}\n", tokenizer),) if request else ()
    asked = {"role": "user", "content": ASKED}
    more = ({"role": "assistant", "content": ANSWERED}, {"role": "user", "content": AGAIN})
    before, found, after = _rendered(tokenizer, asked).partition(ASKED)
    if not found:
        return ()
    turns = [before + request + after] if request else [before, after]
    rest = _rendered(tokenizer, asked, *more).partition(ANSWERED)[2]
    between, found, after = rest.partition(AGAIN)
    if found:
        turns += [between + following + after] if request else [between, after]
    # The template may have the token that begins a text.
    first = getattr(tokenizer, "bos_token", None)
    begun = first is not None and before.startswith(first)
    return tuple(
        tuple(tokenizer.encode(turn, add_special_tokens=not (begun or number)))
        for number, turn in enumerate(turns)
        if turn
    )


def _rendered(tokenizer: Any, *messages: dict[str, str]) -> str:
    """A chat up to the model's turn; empty if the template refuses it."""
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a template raises what it likes
        return ""
