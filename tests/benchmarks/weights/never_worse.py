"""Budgeted conversions beside every uniform quantization within their bytes, on unseen text.

    python tests/benchmarks/weights/never_worse.py MODELS --calibration FILE --problems FILE.jsonl
        [--only NAME ...] [--effort plan] [--sequences 24] [--out results/never_worse.jsonl]

MODELS is a folder with tiny-qwen3 and families/*. 40 conversions by ``mlx_lm.convert
--optiq-budget``, each in a process of its own, half of them with ``--optiq-calibration``, the other
half on text sampled from the model. Conversions of one model and text share their measurements, as
a user's do, and come in no order of budgets.

Each is judged on the problems, which nothing was calibrated on, in two forms: written out as the
models were trained on them, and as each model's chat template renders them. It is held against the
stock quantization (bits x group sizes, at most the budget in bits per weight) that is best on that
very text. It is worse if the paired difference over sequences exceeds two standard errors.
The held-out KL that conversions print must not rise with the budget either.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_map
from mlx_lm.utils import compute_bits_per_weight, dequantize_model, quantize_model

from mlx_optiq_ext.planning.calibration import cut
from mlx_optiq_ext.planning.texts import read_texts, tokenized

#: Tokens of a sequence, and sequences run at once.
LENGTH, BATCH = 256, 8
BITS, GROUP_SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)
#: Model -> budgets, in the order in which they are converted.
BUDGETS = {
    "tiny-qwen3": (3.5, 2.6, 4.0, 3.0, 6.0, 3.25, 4.5, 5.5, 4.25, 5.0),
    "families/hybrid": (4.0, 2.6),
    "families/mla": (3.25, 4.5),
    "families/shared_kv": (5.0, 3.0),
    "families/sinks": (3.5, 6.0),
    "families/sliding": (4.25, 5.5),
}

#: Form of the problems -> sequences (n, length).
Texts = Mapping[str, mx.array]
#: Form of the problems -> log-probabilities of the original, a batch at a time.
References = Mapping[str, list[mx.array]]


def texts(path: Path, tokenizer: Any, sequences: int) -> Texts:
    """The problems in both forms."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    whole = "".join(
        f"Question: {r['question']}\nAnswer: {r['answer']}\n<|endoftext|>" for r in rows
    )
    forms = {
        "written out": np.array(tokenizer.encode(whole)),
        "chat template": tokenized(read_texts(path), tokenizer),
    }
    return {name: mx.array(cut(tokens, LENGTH)[:sequences]) for name, tokens in forms.items()}


def in_float32(model: Any) -> Any:
    """A model dequantized, to compute in float32."""
    model.update(
        tree_map(
            lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a,
            model.parameters(),
        )
    )
    return dequantize_model(model)


def log_probs(model: Any, tokens: mx.array) -> Iterator[mx.array]:
    """Log-probabilities (batch, length, vocabulary) of some sequences at a time."""
    for start in range(0, len(tokens), BATCH):
        logits = model(tokens[start : start + BATCH])
        yield logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def divergence(reference: References, model: Any, given: Texts) -> dict[str, list[float]]:
    """Mean KL(reference || model) of each sequence, in nats per token, by form."""
    found: dict[str, list[float]] = {}
    for name, tokens in given.items():
        pairs = zip(reference[name], log_probs(model, tokens), strict=True)
        parts = [(mx.exp(p) * (p - q)).sum(axis=-1).mean(axis=-1) for p, q in pairs]
        found[name] = [float(kl) for part in parts for kl in np.array(part)]
    return found


def uniforms(folder: Path) -> Iterator[tuple[str, float, Any]]:
    """Name, bits per weight and model of each of stock's quantizations."""
    for bits in BITS:
        for group in GROUP_SIZES:
            loaded: Any = mlx_lm.load(str(folder), return_config=True, lazy=True)
            model, _, config = loaded
            predicate = getattr(model, "quant_predicate", None)
            try:
                model, _ = quantize_model(model, config, group, bits, quant_predicate=predicate)
            except ValueError:  # groups that divide nothing
                continue
            yield f"{bits}-bit g{group}", compute_bits_per_weight(model), in_float32(model)


def convert(
    folder: Path, out: Path, budget: float, calibration: Path | None, effort: str, home: Path
) -> dict:
    """Convert as a user does; returns what was written beside the weights."""
    words = [
        "--hf-path",
        str(folder),
        "--mlx-path",
        str(out),
        "--optiq-effort",
        effort,
        "--optiq-budget",
        str(budget),
    ]
    words += ["--optiq-calibration", str(calibration)] if calibration is not None else []
    done = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "convert", *words],
        env={**os.environ, "HOME": str(home), "MLX_OPTIQ_EXT_CACHE": str(home / "cache")},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return json.loads((out / "optiq_metadata.json").read_text())


def compared(own: list[float], other: list[float]) -> dict[str, float | bool]:
    """The ratio of two means, and the paired difference in standard errors."""
    difference = np.subtract(own, other)
    error = float(difference.std(ddof=1) / math.sqrt(len(difference)))
    mean = float(difference.mean())
    errors = mean / error if error else 0.0
    return {
        "ratio": round(float(np.mean(own) / np.mean(other)), 4),
        "errors": round(errors, 2),
        "worse": errors > 2,
    }


def rows_of(name: str, args: argparse.Namespace, home: Path) -> Iterator[dict[str, Any]]:
    """Convert and judge one model."""
    folder = args.models / name
    reference, tokenizer = mlx_lm.load(str(folder))[:2]
    given = texts(args.problems, tokenizer, args.sequences)
    original = in_float32(reference)
    reference = {form: list(log_probs(original, tokens)) for form, tokens in given.items()}
    stock = [
        (label, bpw, divergence(reference, model, given)) for label, bpw, model in uniforms(folder)
    ]
    for calibration in (None, args.calibration):
        for budget in BUDGETS[name]:
            out = home / f"{name.replace('/', '-')}-{budget}-{calibration is not None}"
            told = convert(folder, out, budget, calibration, args.effort, home)
            own = divergence(reference, in_float32(mlx_lm.load(str(out))[0]), given)
            held = {}
            for form, kls in own.items():
                within = [each for each in stock if each[1] <= budget]
                best = min(within, key=lambda each: np.mean(each[2][form]), default=None)
                if best is not None:
                    held[form] = {"uniform": best[0], **compared(kls, best[2][form])}
            yield {
                "model": name,
                "budget": budget,
                "calibration": told["calibration"]["source"],
                "bpw": told["achieved_bpw"],
                "variant": told["variant"],
                "held_out_kl": told["kl"],
                "kl": {form: round(float(np.mean(kls)), 6) for form, kls in own.items()},
                "against": held,
            }


def line(row: Mapping[str, Any]) -> str:
    """One conversion for the terminal."""
    parts = [
        f"{form} {held['ratio']:.2f} x {held['uniform']} ({held['errors']:+.1f} SE)"
        + (" WORSE" if held["worse"] else "")
        for form, held in row["against"].items()
    ]
    start = f"{row['model']} {row['budget']:g} {row['calibration']}: {row['variant']}"
    return f"{start}; {'; '.join(parts) or 'no uniform quantization fits'}"


def rising(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Pairs of budgets whose larger one ended with more held-out KL, though it came later."""
    return [
        (one["budget"], two["budget"])
        for number, two in enumerate(rows)
        for one in rows[:number]
        if (one["model"], one["calibration"]) == (two["model"], two["calibration"])
        and one["budget"] < two["budget"]
        and one["held_out_kl"] < two["held_out_kl"]
    ]


def main() -> int:
    """Convert and judge; 1 if any conversion is worse."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--problems", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(BUDGETS), choices=BUDGETS)
    parser.add_argument("--effort", default="plan", choices=("plan", "refine", "distill"))
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    made = {"machine": platform.platform(), "cores": os.cpu_count(), "command": sys.argv}
    lines = [json.dumps({**made, **{name: version(name) for name in ("mlx", "mlx-lm")}})]
    with tempfile.TemporaryDirectory() as home:
        for name in args.only:
            for row in rows_of(name, args, Path(home)):
                rows.append(row)
                lines.append(json.dumps(row))
                print(line(row), flush=True)
                if args.out is not None:
                    args.out.write_text("\n".join(lines) + "\n")
    worse = [row for row in rows if any(held["worse"] for held in row["against"].values())]
    print(f"{len(worse)} of {len(rows)} conversions are worse than the best uniform quantization")
    print(
        f"larger budgets that ended worse than smaller ones before them: {rising(rows) or 'none'}"
    )
    return int(bool(worse or rising(rows)))


if __name__ == "__main__":
    sys.exit(main())
