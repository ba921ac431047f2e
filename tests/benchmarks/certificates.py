"""How often the bound of ``--optiq-max-kl`` holds on fresh text of the same kind.

    python tests/benchmarks/certificates.py MODELS --text FILE.txt [--runs 50]
        [--effort plan] [--report FILE.jsonl]

MODELS is a folder with tiny-qwen3 and families/*. Each run shuffles the paragraphs of the text with
its own seed, converts one of the models on one half for one of several distances, and measures the
KL from the original on the other half. Prints a JSON line a run, and how many bounds held.
"""

import argparse
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mlx_optiq_ext.planning.calibration import cut
from mlx_optiq_ext.planning.texts import tokenized
from mlx_optiq_ext.weights import Request, prepare
from mlx_optiq_ext.weights.pipeline import opened
from mlx_optiq_ext.weights.targets import CERTIFIED, certified

NAMES = (
    "tiny-qwen3",
    *(f"families/{name}" for name in ("hybrid", "mla", "shared_kv", "sinks", "sliding")),
)
DISTANCES = (0.003, 0.01, 0.03, 0.1, 0.3)


def halves(path: Path, seed: int) -> tuple[str, str]:
    """The paragraphs of a text in two halves."""
    paragraphs = [part for part in path.read_text().split("\n\n") if part.strip()]
    order = np.random.default_rng(seed).permutation(len(paragraphs))
    middle = len(order) // 2
    one, other = (
        "\n\n".join(paragraphs[i] for i in part) for part in (order[:middle], order[middle:])
    )
    return one, other


def run(folder: Path, text: Path, seed: int, wanted: float, effort: str) -> dict:
    """Convert on one half and judge on the other."""
    own, fresh = halves(text, seed)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(own)
        file.flush()
        request = Request(
            max_kl=wanted,
            calibration=Path(file.name),
            effort=effort,
            progress=False,
            say=lambda line: None,
        )
        done = prepare(str(folder), request)
        tokenizer = opened(str(folder), request).tokenizer
    assert done.study is not None
    assert done.plan.certificate is not None
    tokens = cut(tokenized([fresh], tokenizer), CERTIFIED.length)
    found = certified(
        done.study.problem, done.plan.precisions, done.refined, done.parameters, {"fresh": tokens}
    )
    kl = found.by_kind["fresh"]
    return {
        "model": folder.name,
        "seed": seed,
        "wanted": wanted,
        "bpw": round(done.plan.achieved_bpw, 4),
        "kl": round(done.plan.certificate["kl"], 6),
        "bound": round(done.plan.certificate["kl_bound"], 6),
        "fresh_kl": round(kl, 6),
        "fresh_tokens": tokens.size,
        "held": kl <= wanted,
    }


def main() -> None:
    """Run and count."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--effort", default="plan")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    lines = [{"command": " ".join(sys.argv), "machine": platform.platform(), "mlx": version("mlx")}]

    def say(row: dict) -> None:
        print(json.dumps(row), flush=True)
        if args.report is not None:
            with args.report.open("a") as stream:
                stream.write(json.dumps(row) + "\n")

    say(lines[0])
    held = []
    for seed in range(args.runs):
        name, wanted = NAMES[seed % len(NAMES)], DISTANCES[seed % len(DISTANCES)]
        row = run(args.models / name, args.text, seed, wanted, args.effort)
        held.append(row["held"])
        say(row)
    say({"runs": len(held), "held": sum(held)})


if __name__ == "__main__":
    main()
