"""From a model folder and a KV budget to the files beside the weights."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ... import distributed, files
from ...errors import InputError
from ...model.finite import check_outputs, check_parameters
from ...model.hub import cached_folder
from ...model.loading import load, model_digest, to_compute
from ...planning.calibration import Calibration, Sampling, cut, load_tokens, spread
from .. import transform_file
from ..formats import Affine, to_json
from ..plan import FILE, entries
from .kv_sensitivity import COMPLETE, CONTEXT, KVSensitivity, journal_of, measure
from .plan_search import Found, search

#: File beside the plan with the measurements.
SENSITIVITY = "kv_sensitivity.json"
#: Errors of a cache add up over long contexts, so a few long sequences are used; every other one
#: is held out to judge plans.
LONG = Sampling(length=1024, count=4, held_out_every=2)
#: Tokens of a sequence that sides are measured on alone: enough to tell one from another.
MEASURED = 512
#: Tokens of the shortest useful sequence.
SHORTEST = 16


def plan_kv(
    path_or_repo: str,
    budget: float,
    *,
    calibration: Path | None = None,
    sampling: Sampling = LONG,
    context: int = CONTEXT,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> tuple[Found, KVSensitivity]:
    """Measure a model's keys and values and plan them within a budget.

    The processes of ``mlx.launch`` share the work, and all get the same plan.

    Args:
        path_or_repo: An MLX model, quantized or not.
        budget: Stored bits per element of the caches, scales and biases included.
        calibration: A text or JSON-lines file, or None for mlx-lm's own text.
        sampling: Length and number of the calibration sequences.
        context: Tokens of context over which tokens that take 16 bits are counted.
        revision: Revision of the repository.
        trust_remote_code: Whether to run a repository's own code, as in mlx-lm.
        progress: Whether to show a progress bar.
        say: Receives one-line messages.

    Raises:
        OptiqError: The model or the budget is not usable; the message says what to change.
    """
    if not distributed.leads():
        say, progress = distributed.silent, False

    model, tokenizer, _ = load(path_or_repo, revision, trust_remote_code)
    model = to_compute(model, rounded=True)
    check_parameters(model)
    tokens, source = load_tokens(model, tokenizer, calibration, say)
    fitted, held_out = sequences(tokens, sampling)
    measured = fitted[:, :MEASURED]
    check_outputs(model, mx.array(measured[:1, :256]))
    digest = model_digest(cached_folder(path_or_repo, revision))
    tokens_digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    distributed.compare(**{"model": digest, "calibration data": tokens_digest})
    journal = journal_of({"model": digest, "device": str(mx.default_device())}, fitted)
    kept = journal.get(COMPLETE) is not None
    doing, where = "Measuring", ""
    if kept:
        doing, where = "Reading the measurements of", f" from {files.cache_dir()}"
    say(
        f"[optiq] {doing} keys and values at {measured.shape[1]} tokens of context on "
        f"{measured.size} tokens ({source}){where}"
    )
    bar = progress and not kept
    found = measure(
        model, measured, held_out, fitted=fitted, journal=journal, context=context, progress=bar
    )
    if not kept:
        journal.add(COMPLETE, 1.0)
        journal.exchange()
    return replace(search(found, budget), text=source), found


def write(
    folder: Path, found: Found, measured: KVSensitivity, *, model: str, budget: float
) -> None:
    """Write the plan and what was measured of it into a folder."""
    files.write_json(folder / SENSITIVITY, _record(found, measured, model, budget))
    transforms = {
        layer: formats.keys.transform
        for layer, formats in found.layers.items()
        if isinstance(formats.keys, Affine) and formats.keys.transform is not None
    }
    place = folder / transform_file.FILE
    if transforms:
        transform_file.write(place, transforms)
    else:
        place.unlink(missing_ok=True)
    files.write_json(folder / FILE, entries(found.layers))


def _record(found: Found, measured: KVSensitivity, model: str, budget: float) -> dict[str, Any]:
    layers = []
    for (layer, side), formats in measured.kl.items():
        shape = measured.shapes[layer, side][0]
        layers.append(
            {
                "layer_idx": layer,
                "layer_name": f"model.layers.{layer}",
                "side": side,
                "n_kv_heads": shape[1],
                "head_dim": shape[3],
                "sensitivities": [{**to_json(f), "kl": kl} for f, kl in formats.items()],
            }
        )
    return {
        "model": model,
        "target_bits": budget,
        "achieved_bits": found.bits_per_element,
        "kl": found.kl,
        "text": found.text,
        "plans": {name: {"bits": b, "kl": kl} for name, (b, kl) in found.tried.items()},
        "layers": layers,
    }


def sequences(tokens: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Sequences to measure on and to judge on, each (n, length), spread over the text.

    They are shorter than ``sampling`` says where the text is too short for so many.

    Raises:
        InputError: The text is too short for sequences of `SHORTEST` tokens.
    """
    length = min(sampling.length, len(tokens) // sampling.count)
    if length < SHORTEST:
        raise InputError(
            f"the calibration data has {len(tokens)} tokens, too few to measure keys and values: "
            "give a longer text with --optiq-calibration"
        )
    every = cut(tokens, length)
    chosen = every[spread(len(every), sampling.count)]
    found = Calibration(chosen, "", held_out_every=sampling.held_out_every)
    return found.measured, found.held_out
