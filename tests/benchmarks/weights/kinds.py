"""KL of converted models from their original on four kinds of text that nothing is calibrated on.

    python tests/benchmarks/weights/kinds.py ORIGINAL CONVERTED... --texts FOLDER [--tokens N]

Prints a JSON line a model; ``-`` in place of CONVERTED reads their paths from standard input, one a
line, as they come. FOLDER is where WikiText-2's test text, a text of books and GSM8K are
looked for; the fourth kind is source of Python's standard library. Weights are dequantized to
float32.
"""

import argparse
import json
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from quality import load

#: Modules of the standard library, read as Python source.
SOURCES = ("argparse", "ast", "dataclasses", "difflib", "inspect", "pathlib", "pickle", "typing")


def texts(folder: Path) -> dict[str, Callable[[Any], str]]:
    """Kind -> makes the text for a tokenizer.

    Args:
        folder: With ``wiki.test.raw``, ``books_test.txt`` and ``gsm8k.jsonl`` (or what of these
            there is), in it or in the folders that the data sets come in.
    """
    found: dict[str, Callable[[Any], str]] = {"python": lambda _: _python()}
    for kind, names in {
        "wikitext": ("wiki.test.raw", "wikitext2/wiki.test.raw"),
        "books": ("books_test.txt",),
        "gsm8k": ("gsm8k.jsonl", "gsm8k/test.jsonl"),
    }.items():
        path = next((folder / n for n in names if (folder / n).exists()), None)
        if path is not None and kind == "gsm8k":
            found[kind] = lambda tokenizer, path=path: _chats(path, tokenizer)
        elif path is not None:
            found[kind] = lambda _, path=path: path.read_text(encoding="utf-8")
    return found


def _python() -> str:
    library = Path(sysconfig.get_path("stdlib"))
    files = (library / f"{name}.py" for name in SOURCES)
    return "\n".join(path.read_text(encoding="utf-8") for path in files if path.exists())


def _chats(path: Path, tokenizer: Any) -> str:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:200]]
    chats = [
        [
            {"role": "user", "content": line["question"]},
            {"role": "assistant", "content": line["answer"]},
        ]
        for line in lines
    ]
    if getattr(tokenizer, "chat_template", None) is None:
        return "\n\n".join("\n".join(m["content"] for m in chat) for chat in chats)
    return "".join(tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats)


class Judge:
    """The original's log-probabilities on windows of each kind, kept in half precision."""

    def __init__(
        self, model: Any, tokenizer: Any, folder: Path, tokens: int, window: int, batch: int = 8
    ):
        self.windows: dict[str, list[mx.array]] = {}
        for kind, make in texts(folder).items():
            ids = np.asarray(tokenizer.encode(make(tokenizer)))[:tokens]
            rows = ids[: len(ids) // window * window].reshape(-1, window)
            self.windows[kind] = [mx.array(rows[i : i + batch]) for i in range(0, len(rows), batch)]
        self.reference = {
            kind: [_log_probs(model, rows).astype(mx.float16) for rows in windows]
            for kind, windows in self.windows.items()
        }
        mx.eval(list(self.reference.values()))

    def divergences(self, model: Any) -> dict[str, float]:
        """Mean KL(original || model) in nats per token, by kind."""
        found = {}
        for kind, windows in self.windows.items():
            total, count = 0.0, 0
            for rows, reference in zip(windows, self.reference[kind], strict=True):
                p, q = reference.astype(mx.float32), _log_probs(model, rows)
                total += float((mx.exp(p) * (p - q)).sum())
                count += rows.size
            found[kind] = total / count
        return found


def _log_probs(model: Any, rows: mx.array) -> mx.array:
    logits = model(rows).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def main() -> None:
    """Print one line a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("original")
    parser.add_argument("converted", nargs="+")
    parser.add_argument("--texts", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=16384, help="of each kind")
    parser.add_argument("--window", type=int, default=512)
    args = parser.parse_args()
    model, tokenizer, _ = load(args.original)
    judge = Judge(model, tokenizer, args.texts, args.tokens, args.window)
    piped = (line.strip() for line in sys.stdin)
    for path in piped if args.converted == ["-"] else args.converted:
        model, _, bits = load(path)
        print(json.dumps({"path": path, "bpw": bits, **judge.divergences(model)}), flush=True)


if __name__ == "__main__":
    main()
