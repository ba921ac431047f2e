"""What distillation's settings bring: KL on a text before and after, for each of them.

    python tests/benchmarks/weights/distilling.py MODEL --start CONVERTED --calibration FILE
        --text FILE [--try "steps=300 codes_rate=0.003 parameters_rate=0.001"]...

Starts from a converted folder (``--start``), from a plan for ``--budget`` that is refined first,
or from MLX's own rounding to ``--bits``. Each ``--try`` names fields of the library's ``Settings``
and prints one JSON object: the settings, KL on the text and on held-out sequences, steps, seconds
and peak memory. KL on the text is computed in float32, as by quality.py, over the first
``--tokens`` tokens in windows of ``--window``.
"""

import argparse
import json
import time
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import mlx_lm
from quality import divergence, load, log_probs

from mlx_optiq_ext.model.layers import quantizable
from mlx_optiq_ext.model.loading import cast, half_dtype, load_unquantized
from mlx_optiq_ext.planning.calibration import Sampling
from mlx_optiq_ext.weights import Precision, Request, calibrated, refine, search, study_model
from mlx_optiq_ext.weights.precision import quantize
from mlx_optiq_ext.weights.rounding.distillation import Settings, distill, placed
from mlx_optiq_ext.weights.rounding.refinement import restored


def settings(text: str) -> Settings:
    """Settings from ``name=value`` pairs."""
    given = dict(pair.split("=", 1) for pair in text.split())
    unknown = given.keys() - {field.name for field in fields(Settings)}
    if unknown:
        raise SystemExit(f"no such setting: {', '.join(sorted(unknown))}")
    return Settings(**{name: json.loads(value) for name, value in given.items()})


def converted(folder: str):
    """Precisions and stored values of a converted folder's tensors."""
    model = mlx_lm.load(folder)[0]
    modules = {p: m for p, m in model.named_modules() if "scales" in m and "biases" in m}
    precisions = {path: Precision(m.bits, m.group_size) for path, m in modules.items()}
    return precisions, {path: (m.weight, m.scales, m.biases) for path, m in modules.items()}


def start(args, model, tokenizer, request):
    """The problem, precisions, and what is stored before distillation."""
    if args.start or args.bits:
        problem = calibrated(model, tokenizer, request)
        if args.start:
            return problem, *converted(args.start)
        precisions = {t.path: Precision(args.bits, args.group_size) for t in problem.tensors}
        if args.refine:
            return problem, precisions, refine(problem, precisions)
        plain = {path: quantize(problem.weights[path], p) for path, p in precisions.items()}
        return problem, precisions, plain
    study = study_model(model, tokenizer, request)
    plan = search(study, args.budget)
    return study.problem, plan.precisions, refine(study.problem, plan.precisions)


def main() -> None:
    """Print one line a configuration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--start", help="a converted folder to start from")
    parser.add_argument("--budget", type=float, help="bits per weight to plan and refine for")
    parser.add_argument("--bits", type=int, help="width to round all tensors to")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--refine", action="store_true", help="refine what --bits rounds")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--refining", type=int, default=256, help="calibration sequences at most")
    parser.add_argument("--length", type=int, default=256, help="tokens of one")
    parser.add_argument("--text", required=True, type=Path, help="text to judge on")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--try", dest="tries", action="append", metavar="SETTINGS")
    args = parser.parse_args()
    if sum(value is not None for value in (args.start, args.budget, args.bits)) != 1:
        parser.error("give one of --start, --budget and --bits")
    tries = [settings(text) for text in args.tries or [""]]
    model, tokenizer, _ = load_unquantized(args.model)
    cast(model, {}, half_dtype(model))  # as a conversion does
    request = Request(
        budget=args.budget,
        calibration=args.calibration,
        sampling=Sampling(args.length, refining=args.refining),
        effort="refine",
        progress=False,
    )
    problem, precisions, stored = start(args, model, tokenizer, request)
    judge = load(args.model)[0]
    tokens = tokenizer.encode(args.text.read_text())[: args.tokens]
    windows = mx.array(tokens[: len(tokens) // args.window * args.window]).reshape(-1, args.window)
    reference = log_probs(judge, windows)
    names = {f"{path}.weight": path for path, _ in quantizable(judge)}

    def kl(refined, parameters) -> float:
        weights = {
            name: restored(refined[path], precisions[path], mx.float32)
            for name, path in names.items()
            if path in refined
        }
        others = {name: value.astype(mx.float32) for name, value in parameters.items()}
        with placed(judge, {**weights, **others}):
            return divergence(reference, log_probs(judge, windows))

    before = kl(stored, {})
    for text, chosen in zip(args.tries or [""], tries, strict=True):
        mx.clear_cache()
        mx.reset_peak_memory()
        began, active = time.perf_counter(), mx.get_active_memory()
        found = distill(problem, precisions, stored, chosen)
        seconds, peak = time.perf_counter() - began, mx.get_peak_memory()
        row = {
            "settings": text,
            "kl": kl(found.refined, found.parameters),
            "kl_before": before,
            "held_out": found.kl,
            "held_out_before": found.kl_before,
            "steps": found.steps,
            "seconds_a_step": found.seconds,
            "seconds": seconds,
            "peak_gib": peak / 2**30,
            "peak_above_models_gib": (peak - active) / 2**30,
            "digest": digest(found),
        }
        print(json.dumps(row), flush=True)


def digest(found) -> str:
    """A number that differs where any stored value does."""
    total = 0
    for path in sorted(found.refined):
        for array in found.refined[path]:
            total = hash((total, float(array.astype(mx.float32).sum()), float(array.max())))
    return f"{total & 0xFFFFFFFF:08x}"


if __name__ == "__main__":
    main()
