"""The keys that clients show a server."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .. import files
from ..errors import InputError
from .refusal import Refusal

#: Keys, and characters of one.
MOST, LONGEST = 10_000, 1000


@dataclass(frozen=True)
class Keys:
    """Keys, any of which opens a server; kept as digests, so that no message shows one."""

    _digests: tuple[bytes, ...] = field(repr=False)

    @classmethod
    def read(cls, texts: Iterable[str], name: str = "--optiq-api-key") -> "Keys":
        """Read keys as an option gives them.

        Args:
            texts: A key each, or ``@FILE`` for a file with one key a line. Blank lines and lines
                that start with ``#`` do not count.
            name: The option or variable, for messages.

        Raises:
            InputError: A file cannot be read, or a key is empty or has other characters than
                visible ASCII.
        """
        keys: list[str] = []
        for text in texts:
            found = _lines(Path(text[1:])) if text.startswith("@") else [(0, text)]
            for line, key in found:
                if not 0 < len(key) <= LONGEST or not all("!" <= c <= "~" for c in key):
                    where = f" {text}, line {line}" if line else ""
                    raise InputError(
                        f"{name}{where}: a key is 1 to {LONGEST} visible ASCII characters without "
                        "spaces"
                    )
                keys.append(key)
        if not keys or len(keys) > MOST:
            raise InputError(f"{name} gives {len(keys)} keys: give 1 to {MOST}")
        return cls(tuple(_digest(key.encode()) for key in dict.fromkeys(keys)))

    def check(self, authorization: str | None) -> None:
        """Refuse a request without one of the keys, in a time that tells nothing about them.

        Args:
            authorization: The header ``Authorization``; None if absent.

        Raises:
            Refusal: 401.
        """
        shown = _shown(authorization)
        if shown is None:
            raise _refused(
                "You didn't provide an API key: send it in the header Authorization: Bearer KEY"
            )
        # Every key is compared: how long it takes does not depend on which one fits.
        if not sum(hmac.compare_digest(shown, each) for each in self._digests):
            raise _refused("Incorrect API key provided")

    def number(self, authorization: str | None) -> int | None:
        """Which key a header ``Authorization`` shows, from 1 in the order given; None if none."""
        shown = _shown(authorization) or b""
        fits = [hmac.compare_digest(shown, each) for each in self._digests]
        return fits.index(True) + 1 if any(fits) else None

    def __len__(self) -> int:
        return len(self._digests)


def _shown(authorization: str | None) -> bytes | None:
    """Digest of the key that a header shows; None if it shows none."""
    scheme, _, key = (authorization or "").partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        return None
    return _digest(key.encode("utf-8", "surrogateescape"))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _lines(path: Path) -> list[tuple[int, str]]:
    """Keys of a file, with the numbers of their lines from 1 on."""
    text = files.read_text(path).removeprefix("\ufeff")
    # Not splitlines: what it also takes for an end would cut a key into shorter ones.
    lines = enumerate(map(str.strip, re.split(r"\r\n|\r|\n", text)), 1)
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _refused(message: str) -> Refusal:
    return Refusal(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
