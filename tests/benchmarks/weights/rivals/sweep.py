"""Time one of this package's ways to measure sensitivity, or a plain sweep, in this process.

    python sweep.py METHOD MODEL CALIBRATION OUT.json [--windows N] [--text FILE] [--budgets BPW...]

``plain`` measures every candidate of every tensor with a forward pass of the whole model. With
``--text``, the plans for the budgets are judged on it. Nothing is kept on disk but the report.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_optiq_ext import weights
from mlx_optiq_ext.model.loading import load_unquantized
from mlx_optiq_ext.planning.divergence import Reference
from mlx_optiq_ext.weights.sensitivity import registry
from mlx_optiq_ext.weights.sensitivity.problem import batches

sys.path.append(str(Path(__file__).parent.parent))

import quality


def plain(problem: weights.Problem) -> weights.Sensitivity:
    """Every candidate of every tensor, each with whole forward passes."""
    data = batches(problem.calibration.measured)
    references = [Reference.of(problem.model(batch)) for batch in data]
    count = sum(batch.size for batch in data)

    def cost(path: str, precision: weights.Precision) -> float:
        with problem.quantized({path: precision}):
            return sum(
                float(reference.divergence(problem.model(batch)).sum())
                for reference, batch in zip(references, data, strict=True)
            )

    return {
        tensor.path: {
            precision: cost(tensor.path, precision) / count if precision.quantized else 0.0
            for precision in tensor.precisions
        }
        for tensor in problem.tensors
    }


def judge(study: weights.Study, tokenizer: Any, text: Path, budgets: list[float]) -> dict:
    """KL on a text of the plan for each budget, over the whole vocabulary."""
    model = study.problem.model
    tokens = mx.array(tokenizer.encode(text.read_text())[:2048])
    windows = tokens[: len(tokens) // 512 * 512].reshape(-1, 512)
    reference, found = quality.log_probs(model, windows), {}
    for budget in budgets:
        with study.problem.quantized(weights.search(study, budget).precisions):
            divergence = quality.divergence(reference, quality.log_probs(model, windows))
        found[f"{budget:g}"] = divergence
    return found


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("method", choices=[*registry.names(), "plain"])
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[])
    args = parser.parse_args()
    model, tokenizer, _ = load_unquantized(args.model)
    request = weights.Request(effort="plan", calibration=args.calibration, progress=False)
    problem = weights.calibrated(model, tokenizer, request)
    data = problem.calibration
    problem = replace(problem, calibration=replace(data, tokens=data.tokens[: args.windows]))
    mx.eval(model.parameters())
    method = plain if args.method == "plain" else registry.find(args.method).measure
    started, used = time.perf_counter(), time.process_time()
    sensitivity = method(problem)
    report: dict[str, Any] = {
        "seconds": time.perf_counter() - started,
        "processor": time.process_time() - used,
        "tokens": problem.calibration.measured.size,
    }
    if args.text:
        study = weights.Study(problem, sensitivity, args.method)
        report["kl"] = judge(study, tokenizer, args.text, args.budgets)
    args.out.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
