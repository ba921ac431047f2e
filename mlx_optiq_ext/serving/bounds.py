"""What one request may ask of the thread that serves everybody.

mlx-lm's server renders templates, builds the automaton of stop texts and fetches images for as long
as they take, and every other request waits.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from .refusal import Refusal

#: Stop texts, and characters of all of them.
STOPS, STOPS_LENGTH = 64, 4096
#: Tokens that a draft model writes between two looks whether the client is still there.
DRAFTED = 64
#: Arguments of transformers' ``apply_chat_template`` that are no variables of the template: they
#: run a template of the client's, pad a prompt to any length, or return something else than tokens.
NO_VARIABLES = frozenset(
    {
        "chat_template",
        "conversation",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)


def check_bounds(body: Mapping[str, Any]) -> None:
    """Refuse a request to complete a text that would keep all others waiting, or fetch something.

    Values of a wrong type are left to mlx-lm and to `check`.

    Args:
        body: Its body.

    Raises:
        Refusal: 400, which names the field.
    """
    stop = body.get("stop")
    words = [stop] if isinstance(stop, str) else stop
    if isinstance(words, list | Mapping):
        length = sum(len(word) for word in words if isinstance(word, str))
        if len(words) > STOPS or length > STOPS_LENGTH:
            raise _refused(
                "stop", f"has at most {STOPS} texts, with {STOPS_LENGTH} characters in all"
            )
    drafted = body.get("num_draft_tokens")
    if isinstance(drafted, int) and drafted > DRAFTED:
        raise _refused("num_draft_tokens", f"must be at most {DRAFTED}")
    variables = body.get("chat_template_kwargs")
    if variables is not None and not isinstance(variables, dict):
        raise _refused("chat_template_kwargs", "must be an object")
    if named := sorted(NO_VARIABLES & set(variables or ())):
        raise _refused("chat_template_kwargs", f"may not have {named[0]}: it is the server's")
    if any(not url.lower().startswith("data:") for url in _images(body.get("messages"))):
        raise _refused("messages", "may have images as data: URLs only: nothing is fetched")


def _images(messages: Any) -> Iterator[str]:
    """Where the images of messages are, in each form that mlx-lm knows."""
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict):
                raise _refused("messages", "may have lists of objects as content only")
            for name in ("image_url", "image"):
                found = part.get(name)
                found = found.get("url") if isinstance(found, dict) else found
                if isinstance(found, str):
                    yield found


def _refused(param: str, message: str) -> Refusal:
    return Refusal(400, f"{param} {message}", "invalid_value", param)
