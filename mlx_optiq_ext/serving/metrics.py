"""What a server has done, in Prometheus' text format 0.0.4."""

import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping

METRICS = "/metrics"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: Upper bounds of the histogram of times to the first token, in seconds.
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PREFIX = "mlx_optiq_"
_KINDS = {
    "requests_total": ("counter", "Requests by endpoint and status of the answer."),
    "connections_refused_total": ("counter", "Connections beyond the limit."),
    "prompt_tokens_total": ("counter", "Tokens of prompts, cached ones too."),
    "completion_tokens_total": ("counter", "Generated tokens."),
    "prompt_cache_hits_total": ("counter", "Prompts whose beginning was in the prompt cache."),
    "prompt_cache_tokens_total": ("counter", "Tokens of prompts that were in the prompt cache."),
    "time_to_first_token_seconds": ("histogram", "From a request to its first token."),
    "batch_size": ("gauge", "Requests that are being served by the generation thread."),
    "prompt_cache_bytes": ("gauge", "Bytes of keys and values in the prompt cache."),
    "adapters": ("gauge", "Adapters by state."),
    "adapter_uses": ("gauge", "Requests and rows that use an adapter."),
}

#: Labels of a sample, as names and values.
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters of a server, which any thread may change."""

    def __init__(self):
        self._lock = threading.Lock()
        self._totals: defaultdict[tuple[str, Labels], int] = defaultdict(int)
        self._buckets = [0] * (len(BUCKETS) + 1)
        self._seconds = 0.0

    def add(self, name: str, amount: int = 1, **labels: str) -> None:
        """Add to a counter or gauge."""
        with self._lock:
            self._totals[name, tuple(labels.items())] += amount

    def first_token(self, seconds: float) -> None:
        """Count a request's time to its first token."""
        with self._lock:
            self._buckets[bisect_left(BUCKETS, seconds)] += 1
            self._seconds += seconds

    def text(self, gauges: Mapping[tuple[str, Labels], int] | None = None) -> str:
        """All metrics.

        Args:
            gauges: What is counted elsewhere: name and labels -> value.
        """
        with self._lock:
            samples = {**self._totals, **(gauges or {})}
            buckets, seconds = list(self._buckets), self._seconds
        lines = []
        for name, (kind, meaning) in _KINDS.items():
            full = PREFIX + name
            lines += [f"# HELP {full} {meaning}", f"# TYPE {full} {kind}"]
            if kind == "histogram":
                count = 0
                for bound, more in zip((*BUCKETS, "+Inf"), buckets, strict=True):
                    count += more
                    lines.append(f'{full}_bucket{{le="{bound}"}} {count}')
                lines += [f"{full}_sum {seconds!r}", f"{full}_count {count}"]
                continue
            found = {labels: value for (each, labels), value in samples.items() if each == name}
            if not found and name not in ("requests_total", "adapters", "adapter_uses"):
                found[()] = 0
            lines += [f"{full}{_labels(each)} {value}" for each, value in sorted(found.items())]
        return "\n".join(lines) + "\n"


class Row:
    """Counts one request, from before it waits for the generation thread until it ends.

    Args:
        metrics: Where it is counted; None to count nothing.
    """

    def __init__(self, metrics: Metrics | None):
        self._metrics = metrics
        self._began = time.monotonic()
        self._first = True
        # The generation thread may end a request before its own thread knows that it is served.
        self._lock = threading.Lock()
        self._served = self._ended = False

    def serve(self, prompt: int) -> None:
        """The generation thread has taken it, with so many tokens of a prompt."""
        if self._metrics is None:
            return
        self._metrics.add("prompt_tokens_total", prompt)
        with self._lock:
            if not self._ended:
                self._served = True
                self._metrics.add("batch_size")

    def token(self, cached: int) -> None:
        """A token arrived; ``cached`` tokens of its prompt were in the prompt cache."""
        if self._metrics is None:
            return
        if self._first:
            self._first = False
            self._metrics.first_token(time.monotonic() - self._began)
            if cached > 0:
                self._metrics.add("prompt_cache_hits_total")
                self._metrics.add("prompt_cache_tokens_total", cached)
        self._metrics.add("completion_tokens_total")

    def end(self) -> None:
        """It is no longer served; may be repeated."""
        if self._metrics is None:
            return
        with self._lock:
            if self._served and not self._ended:
                self._metrics.add("batch_size", -1)
            self._ended = True


def _labels(labels: Labels) -> str:
    quoted = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels)
    return f"{{{quoted}}}" if quoted else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
