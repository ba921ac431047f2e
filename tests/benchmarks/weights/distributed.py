"""How ranks of ``mlx.launch`` on this machine share a sweep or a refinement, and how long it takes.

    python tests/benchmarks/weights/distributed.py --calibration FILE
        [--model tests/data/tiny-qwen3] [--ranks 1 2 4] [--methods taylor kl refine]
        [--report FILE.json]

Each run measures every candidate with nothing known beforehand. Printed are its wall time, from
when all ranks have loaded the model; and for each rank the windows that it differentiated (times
layers), the candidates that it costed, the probes that it ran, and its processor seconds without
those spent waiting for other ranks. The last line of a run says how far the busiest rank is from
an even share of each. ``refine`` refines to 3 bits what was measured with taylor, and counts the
weights that each rank rounded; its seconds are those of the refinement alone. Ranks compute with
one thread each; where they are more than the processor's cores, or others use it too, the wall time
says little.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TINY = HERE.parents[1] / "data" / "tiny-qwen3"
COUNTED = ("windows", "candidates", "probes", "weights")


def sweep(model: str, calibration: Path, method: str) -> None:
    """One rank's part; rank 0 prints what all of them did."""
    import mlx.core as mx

    from mlx_optiq_ext import distributed
    from mlx_optiq_ext.distributed import exchange
    from mlx_optiq_ext.weights import Precision, Request, refine
    from mlx_optiq_ext.weights import study as planning
    from mlx_optiq_ext.weights.rounding import stage
    from mlx_optiq_ext.weights.sensitivity import fisher, kl, taylor
    from mlx_optiq_ext.weights.sensitivity.problem import journal_key

    counts: dict[str, int] = dict.fromkeys(COUNTED, 0)
    waited = 0.0

    def counting(owner: Any, name: str, what: str, amount: Any) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[what] += amount(*args, **kwargs)
            return original(*args, **kwargs)

        setattr(owner, name, counted)

    def waiting(array: mx.array) -> mx.array:
        nonlocal waited
        before = time.process_time()
        try:
            return evaluated(array)
        finally:
            waited += time.process_time() - before

    def unknown(probes: Any, tensor: Any, precision: Any) -> bool:
        return probes.journal.get(journal_key(tensor.path, precision)) is None

    def costed(problem: Any, tensor: Any, curvature: Any, precisions: Any) -> int:
        return len(list(precisions))

    counting(fisher._Walk, "call", "windows", lambda *args: 1)
    counting(taylor, "predictions", "candidates", costed)
    counting(kl.Probes, "__call__", "probes", unknown)
    counting(stage.Rounding, "rounded", "weights", lambda self, path, weight, *rest: weight.size)
    evaluated, exchange._evaluated = exchange._evaluated, waiting
    loaded, tokenizer, _ = planning.load_unquantized(model)
    mx.eval(loaded.parameters())
    distributed.agree()
    waited, started, processor = 0.0, time.perf_counter(), time.process_time()
    study = planning.study_model(
        loaded,
        tokenizer,
        Request(
            effort="refine" if method == "refine" else "plan",
            calibration=calibration,
            method="taylor" if method == "refine" else method,
            progress=False,
            say=lambda line: None,
        ),
        load=partial(planning.reload, model),
    )
    if method == "refine":
        waited, started, processor = 0.0, time.perf_counter(), time.process_time()
        refine(study.problem, {t.path: Precision(3, 64) for t in study.problem.tensors})
    seconds = time.perf_counter() - started
    worked = time.process_time() - processor - waited
    rows = distributed.gathered({**counts, "processor": worked, "waiting": waited})
    if distributed.leads():
        print(json.dumps({"seconds": seconds, "ranks": rows}))


def run(args: argparse.Namespace, method: str, count: int) -> dict[str, Any]:
    """Start the ranks of one sweep as ``mlx.launch --backend ring`` does.

    That command itself keeps a core busy while it waits for what they print.
    """
    words = [sys.executable, str(Path(__file__).absolute()), "--rank", "--model", str(args.model)]
    words += ["--calibration", str(args.calibration.absolute()), "--methods", method]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]))
        held.close()
        env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MLX_OPTIQ_EXT_CACHE": folder}
        if count > 1:
            env["MLX_HOSTFILE"] = str(hosts)
        ranks = [
            subprocess.Popen(
                words,
                env=env if count == 1 else {**env, "MLX_RANK": str(number)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]
        printed = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank failed")
    found = json.loads(printed[0].strip().splitlines()[-1])
    return {"method": method, "model": str(args.model), "load": os.getloadavg()[0], **found}


def uneven(values: list[float]) -> float:
    """How far the largest of some values is above their mean, as a share of it."""
    mean = sum(values) / len(values)
    return max(values) / mean - 1 if mean else 0.0


def report(row: dict[str, Any]) -> list[str]:
    """A line for the sweep, one for each rank, and one for how even they are."""
    ranks = row["ranks"]
    text = [
        f"{row['method']} on {len(ranks)} ranks: {row['seconds']:.1f} s "
        f"(load average {row['load']:.1f})"
    ]
    for number, rank in enumerate(ranks):
        counts = ", ".join(f"{rank[name]} {name}" for name in COUNTED)
        text.append(
            f"  rank {number}: {counts}, {rank['processor']:.1f} processor s of work, "
            f"{rank['waiting']:.1f} of waiting"
        )
    shares = [f"{n} {uneven([r[n] for r in ranks]):.1%}" for n in (*COUNTED, "processor")]
    return [*text, f"  busiest rank above the mean: {', '.join(shares)}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="How ranks share a sweep")
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--methods", nargs="+", default=["taylor", "kl"])
    parser.add_argument("--report", type=Path)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        sweep(str(args.model), args.calibration, args.methods[0])
        return
    rows = []
    for method in args.methods:
        for count in args.ranks:
            rows.append(run(args, method, count))
            print("\n".join(report(rows[-1])), flush=True)
            if args.report:
                args.report.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
