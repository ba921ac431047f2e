"""What a conversion came to, in a form that two versions of the code can be compared by.

    python tests/golden.py tiny-qwen3 hybrid ...

records tests/data/golden/NAME.json anew; do that only where a change means to alter results.
"""

import contextlib
import hashlib
import html
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
RECORDS = TESTS / "data" / "golden"
FAMILIES = ("hybrid", "mla", "shared_kv", "sinks", "sliding")
#: The part of tests/data/calibration.jsonl that is read, in lines.
LINES = 24

Run = Callable[..., None]


def source(name: str, shared: Path) -> Path:
    """The folder of a model."""
    return TESTS / "data" / name if name == "tiny-qwen3" else shared / "models" / "families" / name


def measure(run: Run, model: Path, folder: Path) -> dict[str, Any]:
    """Convert, plan its KV cache and train one step of LoRA on it by the stock commands.

    Args:
        run: Runs ``(command, *arguments)``.
        model: Folder of the original.
        folder: An empty one to write to.
    """
    text = folder / "calibration.jsonl"
    lines = (TESTS / "data" / "calibration.jsonl").read_text().splitlines()[:LINES]
    text.write_text("\n".join(lines) + "\n")
    out, report = folder / "out", folder / "report.html"
    run(
        *("convert", "--hf-path", model, "--mlx-path", out, "--optiq-calibration", text),
        *(
            "--optiq-budget",
            3.6,
            "--optiq-effort",
            "plan",
            "--optiq-bits",
            "2,3,4,8",
            "--optiq-group-sizes",
            "64,128",
        ),
        *("--optiq-kv-budget", 5, "--optiq-report", report),
    )
    data = folder / "data"
    data.mkdir()
    for part in ("train", "valid"):
        rows = [json.dumps({"text": " ".join(json.loads(line).values())}) for line in lines]
        (data / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
    adapter = folder / "adapter"
    run(
        *("lora", "--train", "--model", out, "--data", data, "--adapter-path", adapter),
        *("--iters", 1, "--batch-size", 1, "--num-layers", 2, "--val-batches", 1),
        *("--optiq-rank-scaling", "by_kl"),
    )
    ranks = _read(adapter / "optiq_lora_config.json")
    metadata = _read(out / "optiq_metadata.json")
    return {
        "weights": dict(_weights(out)),
        "plan": {
            path: [entry["bits"], entry["group_size"]]
            for path, entry in metadata["per_layer"].items()
        },
        "kl": {path: entry.get("kl") for path, entry in metadata["per_layer"].items()},
        "judged": [metadata["kl"], metadata["variant"], metadata["uniform"]],
        "quantization": _read(out / "config.json")["quantization"],
        "kv_config": _read(out / "kv_config.json"),
        "kv_kl": _read(out / "kv_sensitivity.json")["kl"],
        "ranks": {k: v for k, v in ranks.items() if k != "base_model"},
        "report": _words(report.read_text()),
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def _weights(folder: Path) -> Iterator[tuple[str, str]]:
    import mlx.core as mx
    import numpy as np

    for path in sorted(folder.glob("model*.safetensors")):
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        for name, array in sorted(arrays.items()):
            kind = f"{array.dtype} {array.shape}"
            stored = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
            yield name, f"{kind} {hashlib.sha256(np.array(stored).tobytes()).hexdigest()[:16]}"


def _words(page: str) -> str:
    """The words of a report, without those that tell when and with what it was made."""
    page = re.sub(r"<(style|script)\b.*?</\1>", " ", page, flags=re.S)
    words = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", page)))
    return re.sub(r"\d{4}-\d\d-\d\d|\d+\.\d+\.\d+\S*|/\S*", "-", words).strip()


def _main(names: list[str]) -> None:
    import importlib

    shared = Path(os.environ.get("MLX_OPTIQ_SHARED") or TESTS.parent.parent / "shared")

    def run(command: str, *arguments: object) -> None:
        module = importlib.import_module(f"mlx_lm.{command}")
        sys.argv = [f"mlx_lm.{command}", *map(str, arguments)]
        with contextlib.redirect_stdout(io.StringIO()):
            module.main()

    for name in names or ["tiny-qwen3", *FAMILIES]:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["MLX_OPTIQ_EXT_CACHE"] = f"{folder}/cache"
            found = measure(run, source(name, shared).resolve(), Path(folder))
        RECORDS.mkdir(exist_ok=True)
        (RECORDS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(name)


if __name__ == "__main__":
    _main(sys.argv[1:])
