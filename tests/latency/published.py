"""Published measurements: each point's layout is rebuilt from its architecture and its bits."""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_optiq_ext.latency import Header, Layout, demand, find_chip, fit, layout_of

DATA = Path(__file__).parents[1] / "data" / "latency"
CONFIGS = json.loads((DATA / "configs.json").read_text())
ARCHITECTURES = json.loads((DATA / "architectures.json").read_text())
PUBLISHED = json.loads((DATA / "points.json").read_text())


@dataclass(frozen=True)
class Point:
    chip: str
    architecture: str
    layout: str
    prompt: int
    generated: int
    tps: float
    source: str

    @property
    def seconds(self):
        return 1 / self.tps

    @property
    def demand(self):
        layout = layout_named(self.architecture, self.layout)
        return demand(layout, self.prompt + self.generated / 2)


def points():
    return [Point(*row) for row in PUBLISHED["points"]]


@functools.cache
def layout_named(architecture: str, packing: str) -> Layout:
    """The layout of an architecture at ``4g64``, ``bf16`` or ``mxfp4+4g64`` (experts in MXFP4)."""
    config: dict = dict(CONFIGS[architecture])
    own: dict = {}
    experts, _, others = packing.rpartition("+")
    if others != "bf16":
        bits, group = map(int, others.split("g"))
        own |= {"bits": bits, "group_size": group}
        config["quantization"] = own
    headers: dict[str, Header] = {}
    for template, spans, shape, packs in ARCHITECTURES[architecture]:
        for index in layers(spans):
            path = template.replace("{}", str(index), 1)
            stem = path.removesuffix(".weight")
            if others == "bf16" or not packs:
                headers[path] = Header("BF16", tuple(shape), 2 * math.prod(shape))
                continue
            bits, group = own["bits"], own["group_size"]
            if isinstance(packs, dict):
                bits, group = packs["bits"], packs["group_size"]
                own[stem] = packs
            if experts == "mxfp4" and len(shape) == 3:
                bits, group = 4, 32
                own[stem] = {"bits": 4, "group_size": 32, "mode": "mxfp4"}
            headers |= packed(stem, shape, bits, group, mxfp4=experts and len(shape) == 3)
    return layout_of(config, headers)


def packed(stem, shape, bits, group, *, mxfp4):
    *outer, inner = shape
    words, groups = (*outer, inner * bits // 32), (*outer, inner // group)
    rows = math.prod(outer)
    found = {f"{stem}.weight": Header("U32", words, rows * inner * bits // 8)}
    if mxfp4:
        return found | {f"{stem}.scales": Header("U8", groups, rows * inner // group)}
    scale = Header("BF16", groups, 2 * rows * inner // group)
    return found | {f"{stem}.scales": scale, f"{stem}.biases": scale}


def layers(spans: str):
    if not spans:
        return [0]
    found = []
    for part in spans.split(","):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found


class Table:
    """Points as columns, so that a fit predicts all of them at once."""

    def __init__(self, chosen):
        self.points = list(chosen)
        demands = [point.demand for point in self.points]
        self.chips = [find_chip(point.chip) for point in self.points]
        self.nbytes = np.array([each.nbytes for each in demands])
        self.counts = np.array(
            [(each.launches, each.expert_layers, each.recurrent_layers) for each in demands], float
        )
        self.measured = np.array([point.seconds for point in self.points])

    def seconds(self, efficiency):
        """Predicted seconds per token of every point."""
        chips = set(self.chips)
        rate = {c: efficiency.bytes_per_second(c) for c in chips}
        launch = {c: efficiency.seconds_per_launch(c) for c in chips}
        kernels = np.array(
            [(1, efficiency.expert_launches, efficiency.recurrent(c)) for c in self.chips]
        )
        launches = (self.counts * kernels).sum(axis=1)
        return self.nbytes / [rate[c] for c in self.chips] + launches * [
            launch[c] for c in self.chips
        ]

    def fit(self):
        return fit(self.seconds, self.measured.tolist())

    def errors(self, seconds):
        """Relative error in tokens per second."""
        return self.measured / seconds - 1
