"""A headless Chromium, spoken to over its DevTools pipe."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The browser reads its commands from descriptor 3 and answers on 4.
LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""

#: Seconds to wait for a sign of life.
PATIENCE = 60

PLACES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)


def find() -> str | None:
    """The first browser of `PLACES` that is installed."""
    return next(filter(None, map(shutil.which, PLACES)), None)


class Page:
    """One open page, with everything that the browser reported about it.

    Attributes:
        requests: Addresses that the page asked for.
        complaints: Console messages, log entries and uncaught errors.
    """

    def __init__(self, commands: int, replies: int):
        self._commands, self._replies = commands, replies
        self._buffer, self._number, self._session = b"", 0, ""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Run one DevTools command and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._read()
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return reply["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._replies], [], [], PATIENCE)
            chunk = os.read(self._replies, 1 << 20) if ready else b""
            assert chunk, "the browser went away or hangs"
            self._buffer += chunk
        head, _, self._buffer = self._buffer.partition(b"\0")
        reply = json.loads(head)
        method, params = reply.get("method"), reply.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            self.complaints.append(json.dumps(params))
        return reply

    def open(self, path: Path) -> None:
        """Load a file and wait until it has loaded."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def show(self, width: int, scheme: str = "light", media: str = "screen") -> None:
        """Set the window's width in CSS pixels, the colour scheme and the medium."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 700,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, which the page's own policy does not concern."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        result = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(result["data"])


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page in a browser whose profile is in ``folder``."""
    program = find()
    assert program, "no browser"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options += ["--no-first-run", "--disable-extensions", "--disable-background-networking"]
    options += [f"--user-data-dir={folder}", "--remote-debugging-pipe"]
    to_browser, commands = os.pipe()
    replies, from_browser = os.pipe()
    # A preloaded BLAS is none of its business.
    process = subprocess.Popen(
        [
            sys.executable,
            "-IS",
            "-c",
            LAUNCH,
            str(to_browser),
            str(from_browser),
            program,
            *options,
        ],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"},
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Page(commands, replies)
    finally:
        process.kill()
        process.wait()
        os.close(commands)
        os.close(replies)
