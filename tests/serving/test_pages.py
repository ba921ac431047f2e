"""Which web pages may read the answers of a server with adapters, by origin and by rebound name."""

from email.message import Message

import pytest
from live_server import serve

from mlx_optiq_ext.serving import Guard, Keys, Refusal

from .conftest import KEY
from .raw import COMPLETIONS, chat, get, post, received, request, wire

EVIL = "https://evil.example"
REBOUND = {"Host": "evil.example:8080"}
NEAR = ("http://localhost:3000", "http://127.0.0.1", "https://[::1]:8443")
FAR = (
    *(EVIL, "null", "", "localhost", "file://localhost", "http://[", "http://[::1"),
    *("http://localhost.evil.example", "http://127.0.0.1.evil.example", "http://192.0.2.1"),
    *("http://localhost@evil.example", "http://evil.example#localhost"),
)


@pytest.fixture(scope="module")
def allowed(tiny, folder, tmp_path_factory):
    """Tells who may read: ``allowed(options, origin)`` gives what each answer permits."""

    def allowed(*options, origin):
        log = tmp_path_factory.mktemp("pages") / "log"
        found = set()
        with serve(log, "--model", tiny, f"--optiq-adapter=a={folder / 'a'}", *options) as server:
            for method, path, body in (
                ("GET", "/v1/models", None),
                ("POST", COMPLETIONS, chat(model="nobody")),
                ("POST", COMPLETIONS, chat(stream=True)),
                ("OPTIONS", "/v1/models", None),
            ):
                headers = request(server, method, path, body, {"Origin": origin})[1]
                found.add(headers.get("Access-Control-Allow-Origin"))
        return found

    return allowed


def test_a_page_of_another_host_reads_no_names_of_adapters(allowed):
    assert allowed(origin=EVIL) == {None}


def test_a_page_of_this_host_reads_answers(allowed):
    assert allowed(origin="http://localhost:3000") == {"*"}


@pytest.mark.newest
@pytest.mark.parametrize("flag", ["--allowed-origins=*", "--allowed-o=*"])
def test_whoever_allows_every_origin_means_it(allowed, flag):
    assert allowed(flag, origin=EVIL) == {"*"}


def test_a_key_hides_names_as_well(allowed):
    assert allowed("--optiq-api-key", KEY, origin=EVIL) == {"*"}


def test_pages_of_this_host_are_known_by_their_origin():
    guard = Guard(own_pages=True)
    assert all(guard.lets_read(origin) for origin in NEAR)
    assert not any(guard.lets_read(origin) for origin in (*FAR, None))
    assert Guard().lets_read(EVIL)


def admits(guard: Guard, *hosts: str, path: str = "/v1/models") -> bool:
    headers = Message()
    for host in hosts:
        headers["Host"] = host
    try:
        guard.check_host(path, headers)
    except Refusal as refusal:
        return refusal.status != 403
    return True


def test_a_rebound_page_reads_no_names_and_gets_no_answers(server):
    for status, body in (
        get(server, "/v1/models", REBOUND),
        get(server, "/metrics", REBOUND),
        post(server, COMPLETIONS, chat(), REBOUND),
        post(server, COMPLETIONS, chat(model="nobody"), REBOUND),
    ):
        assert (status, body["error"]["code"]) == (403, "forbidden_host")
    assert get(server, "/health", REBOUND)[0] == 200


def test_clients_by_name_by_address_and_without_host_are_served(server):
    for host in ("localhost:8080", "127.0.0.1", "[::1]:80", "192.0.2.7"):
        assert get(server, "/v1/models", {"Host": host})[0] == 200
    with wire(server) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
        assert received(connection).startswith(b"HTTP/1.0 200")


def test_a_proxy_is_named_as_an_allowed_origin():
    guard = Guard(origins=("https://models.example", "http://["))
    assert admits(guard, "models.example")
    assert admits(guard, "models.example:443")
    assert guard.serves("models.example")
    for hosts in (("evil.example",), ("localhost", "evil.example"), ("x.models.example",), ("",)):
        assert not admits(guard, *hosts)


@pytest.mark.parametrize("host", ["box", "box.example"])
def test_the_host_that_it_listens_at_is_served(host):
    assert admits(Guard(host=host), f"{host}:8080")
    assert not admits(Guard(host=host), "evil.example")


def test_a_host_may_be_anything_where_that_protects_nothing():
    for guard in (
        Guard(keys=Keys.read(["secret"])),
        Guard(origins=("*",)),
        Guard(host="0.0.0.0"),
        Guard(host="::"),
        Guard(host=""),
    ):
        assert admits(guard, "any.example")
    assert not admits(Guard(origins=("*",), own_pages=True), "any.example")
