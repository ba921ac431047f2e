"""Converts a generated model under a limit several times smaller, beside a control that may not.

    python tests/benchmarks/weights/larger_than_memory.py [--layers 104] [--limit-mb 1024]
        [--refine]

The model has random weights, so only memory and time mean anything. The limit is RLIMIT_DATA, which
counts what a process allocates and not what the system caches of files. The control
(MLX_OPTIQ_EXT_STREAM=0) keeps the model in memory. Linux only.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import mlx.core as mx

TINY = Path(__file__).parents[2] / "data" / "tiny-qwen3"


def generate(folder: Path, layers: int, hidden: int) -> float:
    """Write a Qwen3 layer by layer; returns its GiB."""
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3

    config = json.loads((TINY / "config.json").read_text())
    config.update(hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers)
    config.update(num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64)
    config.update(layer_types=["full_attention"] * layers)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, folder)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    flat = tree_flatten(model.parameters())
    assert isinstance(flat, list)
    groups: dict[str, dict[str, mx.array]] = {}
    for path, array in flat:
        groups.setdefault(".".join(path.split(".")[:3]), {})[path] = array
    del model, flat
    size = 0
    for number, name in enumerate(list(groups)):
        part = groups.pop(name)
        mx.save_safetensors(str(folder / f"model-{number:05d}.safetensors"), part)
        size += sum(array.nbytes for array in part.values())
    return size / 2**30


def convert(arguments: list[str], limit: int, **environment: str) -> None:
    """Run ``mlx_lm convert`` under a limit and print how it went."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "convert", *arguments],
        env={**os.environ, **environment},
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_DATA, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    planned = [line for line in done.stdout.splitlines() if "[optiq]" in line]
    print("\n".join(planned))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        print(f"  failed after {seconds:.0f} s, exit {done.returncode}: {last[:200]}")
    else:
        print(f"  converted in {seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=104)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--limit-mb", type=int, default=1024)
    parser.add_argument("--words", type=int, default=60, help="of calibration text")
    parser.add_argument("--refine", action="store_true")
    parser.add_argument("--no-control", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as holder:
        folder = Path(holder)
        size = generate(folder / "model", args.layers, args.hidden)
        print(f"{args.layers} layers, {size:.2f} GiB on disk, limit {args.limit_mb / 1024:.2f} GiB")
        lines = (TINY.parent / "calibration.jsonl").read_text().splitlines()
        words = " ".join(json.loads(line).get("text", line) for line in lines).split()
        (folder / "text.txt").write_text(" ".join(words[: args.words]))
        options = ["--hf-path", str(folder / "model"), "--optiq-budget", "4.0"]
        options += ["--optiq-calibration", str(folder / "text.txt")]
        options += ["--optiq-bits", "3,4", "--optiq-group-sizes", "64"]
        options += ["--optiq-effort", "refine" if args.refine else "plan"]
        for name, switch in (("layer by layer", ""), ("control", "0")):
            if switch == "0" and args.no_control:
                continue
            print(f"{name}:", flush=True)
            convert(
                [*options, "--mlx-path", str(folder / name.replace(" ", "-"))],
                args.limit_mb * 2**20,
                MLX_OPTIQ_EXT_STREAM=switch,
                MLX_OPTIQ_EXT_CACHE=str(folder / f"cache{switch}"),
            )


if __name__ == "__main__":
    main()
