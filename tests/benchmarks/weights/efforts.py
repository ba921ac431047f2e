"""What rounding costs and brings on a real model, step by step, in one process.

    python tests/benchmarks/weights/efforts.py MODEL --texts FOLDER [--calibration FILE]
        [--budgets 4.5 3.5] [--sequences N] [--length N] [--refine blocks=8,sweeps=2 ...]
        [--distill steps=400,rate=0.003 ...] [--tokens N] [--report FILE.jsonl]
        [--beside N] [--further N] [--kinds NAME ...] [--temperature T] [--surprises SHARE]
        [--rows N]

Plans each budget, refines it, and distills it if asked. After each step a JSON line has the seconds
that it took and the KL from the original on four kinds of text (see kinds.py). Several ``--refine``
settings (blocks, sweeps, outputs, exact: see `Thoroughness`) refine the same plan in each of these
ways, the first of them twice, because a GPU compiles its kernels in the first: the curve of quality
over seconds. What the last of them made is distilled. Without --calibration the text is sampled
from the model, in all kinds of `planning.kinds` or in those named, each at its own temperature and
share of surprises or at those given. ``--rows 0`` plans without refining rows of each tensor first.
"""

import argparse
import json
import platform
import sys
import time
from ast import literal_eval
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from kinds import Judge

from mlx_optiq_ext.model.loading import load_unquantized
from mlx_optiq_ext.planning.calibration import Sampling
from mlx_optiq_ext.planning.kinds import KINDS
from mlx_optiq_ext.weights import Request
from mlx_optiq_ext.weights.plan_search import search
from mlx_optiq_ext.weights.precision import dequantized
from mlx_optiq_ext.weights.rounding.distillation import Settings, distill, placed
from mlx_optiq_ext.weights.rounding.refinement import Refined, refine, restored
from mlx_optiq_ext.weights.rounding.stage import Thoroughness
from mlx_optiq_ext.weights.sensitivity.remainder import ROWS
from mlx_optiq_ext.weights.sensitivity.taylor import Taylor
from mlx_optiq_ext.weights.study import study_model


def read(words: str) -> dict[str, Any]:
    """The settings in ``NAME=VALUE,NAME=VALUE``."""
    pairs = [word.split("=", 1) for word in words.split(",") if word]
    return {name: literal_eval(value) for name, value in pairs}


def main() -> None:
    """Print one line a step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.5, 3.5])
    parser.add_argument("--sequences", type=int, default=256, help="to refine on")
    parser.add_argument("--length", type=int, default=256, help="tokens of one")
    parser.add_argument("--refine", nargs="+", default=[""], metavar="NAME=VALUE,...")
    parser.add_argument("--distill", nargs="*", default=[], metavar="NAME=VALUE,...")
    parser.add_argument("--tokens", type=int, default=16384, help="judged, of each kind")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--beside", type=int, help="of --sequences, sampled beside --calibration")
    parser.add_argument("--further", type=int, help="sequences sampled to distill on")
    parser.add_argument("--kinds", nargs="+", choices=[kind.name for kind in KINDS])
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--surprises", type=float)
    parser.add_argument("--rows", type=int, default=ROWS, help="of each tensor, refined to plan")
    args = parser.parse_args()

    def say(**row) -> None:
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
        print(line, flush=True)
        if args.report:
            with args.report.open("a") as stream:
                stream.write(line + "\n")

    say(command=" ".join(sys.argv), machine=platform.node(), mlx=version("mlx"))
    model, tokenizer, _ = load_unquantized(args.model)
    judge = Judge(model, tokenizer, args.texts, args.tokens, args.window)
    given = {"temperature": args.temperature, "surprises": args.surprises}
    changes = {name: value for name, value in given.items() if value is not None}
    kinds = tuple(
        replace(kind, **changes) for kind in KINDS if not args.kinds or kind.name in args.kinds
    )
    sampling = Sampling(
        length=args.length,
        refining=args.sequences,
        kinds=kinds,
        beside=args.beside,
        further=args.further,
    )
    request = Request(
        budget=min(args.budgets),
        calibration=args.calibration,
        sampling=sampling,
        effort="distill" if args.distill else "refine",
        method=Taylor(rows=args.rows),
    )
    started = time.perf_counter()
    study = study_model(model, tokenizer, request)
    say(step="measured", seconds=time.perf_counter() - started)
    problem = study.problem

    def judged(step, seconds, weight, paths, **more) -> None:
        with problem.replaced(paths, weight):
            found = judge.divergences(problem.model)
        say(step=step, seconds=seconds, peak=mx.get_peak_memory() / 2**30, **found, **more)

    for budget in args.budgets:
        started = time.perf_counter()
        plan = search(study, budget)
        spent = time.perf_counter() - started
        chosen = {path: p for path, p in plan.precisions.items() if p.quantized}

        def plain(path, chosen=chosen):
            return dequantized(problem.weights[path], chosen[path], problem.dtype)

        judged("planned", spent, plain, chosen, budget=budget, bits=plan.achieved_bpw)
        values: Refined = {}

        def stored(path, values, chosen=chosen):
            return restored(values[path], chosen[path], problem.dtype)

        again = args.refine[:1] if len(args.refine) > 1 else []
        for words in again + args.refine:
            how = Thoroughness(**read(words))
            started = time.perf_counter()
            values = refine(problem, plan.precisions, how)
            spent = time.perf_counter() - started
            put = partial(stored, values=values)
            judged("refined", spent, put, chosen, budget=budget, **asdict(how))
        for words in args.distill:
            started = time.perf_counter()
            settings = Settings(**read(words))
            quiet = replace(problem, progress=False)
            found = distill(quiet, plan.precisions, values, settings)
            spent, tuned = time.perf_counter() - started, found.refined
            others = {path: a.astype(problem.dtype) for path, a in found.parameters.items()}
            with placed(problem.model, others):
                judged(
                    "distilled", spent, partial(stored, values=tuned), chosen, how=words,
                    budget=budget, steps=found.steps, seconds_a_step=found.seconds,
                    held_out=found.kl,
                )  # fmt: skip


if __name__ == "__main__":
    main()
