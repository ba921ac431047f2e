"""Which web pages may read the answers of a server with adapters."""

import pytest
from live_server import serve

from mlx_optiq_ext.serving import Guard

from .conftest import KEY
from .raw import COMPLETIONS, chat, request

EVIL = "https://evil.example"
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
