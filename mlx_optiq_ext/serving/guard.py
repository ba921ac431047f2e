"""What a server asks of a request before it serves it."""

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from email.message import Message
from urllib.parse import urlsplit

from .connection import Slots
from .keys import Keys
from .refusal import Refusal

HEALTH, MODELS = "/health", "/v1/models"
#: Where mlx-lm completes texts.
COMPLETIONS = ("/v1/completions", "/v1/chat/completions", "/chat/completions")

#: Headers of proxies: a client is not on this host only because its proxy is.
FORWARDED = ("Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP")


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        connections: Connections at a time.
        body: Bytes of a request's body.
        patience: Seconds in which a request must arrive, and each piece of an answer be accepted.
    """

    connections: int = 256
    body: int = 1 << 25
    patience: float = 60.0


@dataclass(frozen=True)
class Guard:
    """The rules of a server.

    Attributes:
        host: The address that it listens at, as ``--host`` gives it.
        origins: Web origins that may call it.
        keys: Keys, one of which every request shows; None if none is asked for.
        own_pages: Whether only web pages of this host may read answers.
        limits: Its limits.
        slots: The connections that it serves.
    """

    host: str = "127.0.0.1"
    origins: tuple[str, ...] = ()
    keys: Keys | None = None
    own_pages: bool = False
    limits: Limits = field(default_factory=Limits)
    slots: Slots = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "slots", Slots(self.limits.connections))

    def check_key(self, path: str, headers: Message) -> None:
        """Refuse a request without a key, except for the server's health.

        Raises:
            Refusal: 401.
        """
        if self.keys is not None and path != HEALTH:
            self.keys.check(headers.get("Authorization"))

    def check_host(self, path: str, headers: Message) -> None:
        """Refuse a request for another host, which a web page can send by DNS rebinding.

        Not asked for are hosts of a server with keys, which pages do not have, of one whose answers
        every page may read, and of one that listens at all addresses, whose names nobody knows.

        Args:
            path: What is asked for; the server's health is for all.
            headers: The request's; clients without ``Host`` are no browsers.

        Raises:
            Refusal: 403.
        """
        every_page = "*" in self.origins and not self.own_pages
        if self.keys is not None or every_page or path == HEALTH or _is_everywhere(self.host):
            return
        if not all(map(self.serves, headers.get_all("Host") or [])):
            raise _another_host()

    def check_length(self, headers: Message) -> int:
        """Bytes of a request's body, unless it is too large or does not say how large it is.

        Raises:
            Refusal: 400, 411 or 413.
        """
        found = headers.get_all("Content-Length") or []
        if not found or headers.get("Transfer-Encoding") is not None:
            raise Refusal(411, "Content-Length header is required", "invalid_request")
        length = found[0].strip()
        if len(found) > 1 or not (length.isascii() and length.isdecimal()):
            raise Refusal(400, "Invalid Content-Length header", "invalid_request")
        if len(length) > 18 or int(length) > self.limits.body:
            message = f"the request is larger than {self.limits.body} bytes"
            raise Refusal(413, message, "request_too_large")
        return int(length)

    def check_change(self, headers: Message, client: str) -> None:
        """Refuse a request to change the server that a web page could have sent, or a stranger.

        Args:
            headers: The request's.
            client: The client's address.

        Raises:
            Refusal: 401, 403 or 415.
        """
        if headers.get_content_type() != "application/json":
            message = "send Content-Type: application/json"
            raise Refusal(415, message, "unsupported_media_type")
        hosts = headers.get_all("Host") or []
        if len(hosts) != 1 or not self.serves(hosts[0]):
            raise _another_host()
        # "*" lets every page ask, and no page change anything.
        if any(each not in self.origins or each == "*" for each in headers.get_all("Origin") or []):
            message = "this Origin may not change the server: name it in --allowed-origins"
            raise Refusal(403, message, "forbidden_origin")
        near = is_loopback(client) and not any(headers.get(name) for name in FORWARDED)
        if self.keys is None and not near:
            message = "start the server with --optiq-api-key to change it from another host"
            raise Refusal(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def lets_read(self, origin: str | None) -> bool:
        """Whether a web page of an origin may read answers, as far as `own_pages` goes.

        Args:
            origin: The header ``Origin``; None if absent.
        """
        if not self.own_pages:
            return True
        try:
            found = urlsplit(origin or "")
            name = found.hostname or ""
        except ValueError:
            return False
        return found.scheme in ("http", "https") and is_loopback(name)

    def serves(self, host: str) -> bool:
        """Whether a header ``Host`` names this server.

        Its names are those of this host and of `origins`, and any address. A page whose own name
        was made to point here (DNS rebinding) sends that name.
        """
        try:
            name = (urlsplit(f"//{host.strip()}").hostname or "").lower()
        except ValueError:
            return False
        known = {"localhost", self.host.lower(), *_own_names(), *map(_host_of, self.origins)}
        return _address(name) is not None or (name != "" and name in known)


def _another_host() -> Refusal:
    message = (
        "the header Host names another server: a proxy's name is to be in --allowed-origins, as "
        "https://NAME"
    )
    return Refusal(403, message, "forbidden_host")


def _own_names() -> tuple[str, ...]:
    """Names of this host in its network."""
    whole = socket.gethostname().lower()
    first = whole.partition(".")[0]
    return whole, first, f"{first}.local"


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def _is_everywhere(host: str) -> bool:
    """Whether a server at this address listens at every address of its host."""
    found = _address(host)
    return host == "" or (found is not None and found.is_unspecified)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def is_loopback(host: str) -> bool:
    """Whether an address, or ``localhost``, is this host's own."""
    found = _address(host)
    return host.lower() == "localhost" if found is None else found.is_loopback


def warning(guard: Guard) -> str | None:
    """What is to be said at start of a server that others reach without a key; None if nothing."""
    if guard.keys is not None or is_loopback(guard.host):
        return None
    return (
        f"listening at {guard.host} without --optiq-api-key: everybody who reaches this host may "
        "use the model"
    )


def known_origins(text: str | Iterable[str]) -> tuple[str, ...]:
    """The value of mlx-lm's ``--allowed-origins``: one text, or a list of them."""
    return (text,) if isinstance(text, str) else tuple(text)
