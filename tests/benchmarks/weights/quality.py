"""Quality of converted models against their original: KL on a text, accuracy on word problems.

    python tests/benchmarks/weights/quality.py ORIGINAL CONVERTED... --text FILE
        [--problems FILE.jsonl] [--json]

Weights are dequantized to float32, so that half-precision products add no noise of their own. KL is
the mean over the first ``--tokens`` tokens in windows of ``--window``, over the whole vocabulary.
"""

import argparse
import json
import re
from pathlib import Path

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_map
from mlx_lm.utils import compute_bits_per_weight, dequantize_model


def load(path: str):
    """A model in float32 with its weights dequantized, its tokenizer and its bits per weight."""
    model, tokenizer = mlx_lm.load(path)[:2]
    bits = compute_bits_per_weight(model)
    model.update(
        tree_map(
            lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a,
            model.parameters(),
        )
    )
    model = dequantize_model(model)
    mx.eval(model.parameters())
    return model, tokenizer, bits


def log_probs(model, windows: mx.array) -> list[mx.array]:
    """Log-probabilities (window, length, vocabulary) for each window."""
    result = []
    for window in windows:
        logits = model(window[None])[0]
        result.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(result[-1])
    return result


def divergence(reference: list[mx.array], found: list[mx.array]) -> float:
    """Mean KL(reference || found) in nats per token, from `log_probs` of each."""
    each = [
        float((mx.exp(p) * (p - q)).sum(axis=-1).mean())
        for p, q in zip(reference, found, strict=True)
    ]
    return sum(each) / len(each)


def accuracy(model, tokenizer, problems: list[dict], batch: int = 50) -> float:
    """Share of problems whose greedy answer ends in the right number."""
    right = 0
    for start in range(0, len(problems), batch):
        part = problems[start : start + batch]
        prompts = [tokenizer.encode(f"Question: {p['question']}\nAnswer:") for p in part]
        texts = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=64).texts
        for problem, text in zip(part, texts, strict=True):
            expected = problem["answer"].rsplit("####", 1)[1].strip()
            # A base model goes on with another question after the number.
            found = re.search(r"####\s*(-?\d+)", text)
            right += found is not None and found[1] == expected
    return right / len(problems)


def main() -> None:
    """Print one line a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("original")
    parser.add_argument("converted", nargs="+")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--problems", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="print a JSON object for each model")
    args = parser.parse_args()
    model, tokenizer, _ = load(args.original)
    tokens = tokenizer.encode(args.text.read_text())[: args.tokens]
    windows = mx.array(tokens).reshape(-1, args.window)
    reference = log_probs(model, windows)
    problems = []
    if args.problems:
        problems = [json.loads(line) for line in args.problems.read_text().splitlines()]
        problems = problems[: args.count]
    for path in args.converted:
        model, _, bits = load(path)
        mean, share = divergence(reference, log_probs(model, windows)), None
        if problems:
            share = accuracy(model, tokenizer, problems)
        if args.json:
            row = {"path": path, "bpw": bits, "kl": mean, "accuracy": share}
            print(json.dumps(row), flush=True)
            continue
        line = f"{path}: {bits:.4f} bpw, KL {mean:.5f} nats"
        print(line if share is None else f"{line}, accuracy {100 * share:.1f} %", flush=True)


if __name__ == "__main__":
    main()
