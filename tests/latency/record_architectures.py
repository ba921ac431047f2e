"""Records the tensors of the architectures in tests/data/latency: run with mlx-lm 0.32.2.

``python -m tests.latency.record_architectures`` builds every model from its config without ever
evaluating a weight, and writes its tensors' names and shapes, layers of one shape folded together.
"""

import importlib
import json
import re
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

DATA = Path(__file__).parents[1] / "data" / "latency"


def tensors(config):
    """Parameter path -> (shape, whether its module can be packed) of a model by its config."""
    kind = config["model_type"]
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    model = module.Model(module.ModelArgs.from_dict(config))
    rule = getattr(model, "quant_predicate", None)
    packs = {}
    leaves: Any = tree_flatten(model.leaf_modules(), is_leaf=lambda m: hasattr(m, "parameters"))
    for path, leaf in leaves:
        if hasattr(leaf, "to_quantized"):
            answer = True if rule is None else rule(path, leaf)
            packs[f"{path}.weight"] = answer if isinstance(answer, dict) else bool(answer)
    arrays: Any = tree_flatten(model.parameters())
    tied = config.get("tie_word_embeddings")
    return {
        path: (list(array.shape), packs.get(path, False))
        for path, array in arrays
        # Some classes build a head that they drop when they load tied weights.
        if not (tied and "lm_head" in path)
    }


def folded(found):
    """Rows of ``[path with {}, layers, shape, packs]``."""
    rows = {}
    for path, (shape, packs) in found.items():
        match = re.search(r"\.layers\.(\d+)\.", path)
        template = path if match is None else path.replace(match.group(0), ".layers.{}.", 1)
        key = (template, json.dumps(shape), json.dumps(packs))
        rows.setdefault(key, []).extend([] if match is None else [int(match.group(1))])
    return [
        [template, spans(layers), json.loads(shape), json.loads(packs)]
        for (template, shape, packs), layers in rows.items()
    ]


def spans(numbers):
    """``[0, 1, 2, 5]`` as ``"0-2,5"``."""
    parts = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in parts)


def main():
    configs = json.loads((DATA / "configs.json").read_text())
    lines = []
    for name, config in configs.items():
        rows = folded(tensors(config))
        body = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in rows)
        lines.append(f"{json.dumps(name)}: [\n{body}\n]")
    (DATA / "architectures.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
