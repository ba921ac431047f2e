"""GSM8K with lm-eval's own prompts and filters, from a local file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import harness
from .items import read_lines
from .models import Subject
from .report import Figures
from .settings import Settings
from .statistics import mcnemar, proportion_error

#: lm-eval's task by the number of examples it shows.
TASKS = {8: "gsm8k-cot", 5: "gsm8k"}
FILTERS = {"strict-match": "strict", "flexible-extract": "flexible"}


def read_items(path: Path) -> list[dict[str, str]]:
    """Questions and answers of a GSM8K file.

    Raises:
        InputError: It is missing, empty, or a line lacks ``question`` and an answer behind ####.
    """
    return read_lines(path, _item, "question and answer")


def _item(where: str, entry: Any) -> dict[str, str]:
    question, answer = entry["question"], entry["answer"]
    if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
        raise InputError(f"{where}: the answer must end with #### and a number")
    return {"question": question, "answer": answer}


def config_for(data: Path | None, shots: int | None) -> dict[str, Any]:
    """lm-eval's task on local data, or on the Hub's without any.

    Eight examples (the default) are the fixed ones of its chain-of-thought task, five are drawn
    from the training set: a file train.jsonl beside the data.

    Raises:
        InputError: The number of examples or a file is wrong.
    """
    if shots not in (None, *TASKS):
        raise InputError(f"gsm8k shows 8 (chain of thought) or 5 examples, not {shots}")
    name = TASKS[shots or 8]
    config = harness.task_config(name)
    if data is None:
        return config
    read_items(data)
    files = {"test": str(data.resolve())}
    if shots == 5:
        train = data.resolve().with_name("train.jsonl")
        if not train.exists():
            raise InputError(
                f"five examples are drawn from GSM8K's training set: put its train.jsonl beside "
                f"{data}, or use --num-shots 8"
            )
        files["train"] = str(train)
    config.pop("dataset_name", None)
    return {**config, "dataset_path": "json", "dataset_kwargs": {"data_files": files}}


def answers(
    model: Subject,
    config: dict[str, Any],
    settings: Settings,
    generate: harness.Generate = harness.generated,
) -> dict[str, list[bool]]:
    """Which items a model got right, by filter, in the order of the items."""
    samples = harness.evaluate(model, config, settings, generate)
    found: dict[str, list[tuple[int, bool]]] = {}
    for sample in samples:
        right = bool(sample["exact_match"])
        found.setdefault(FILTERS[sample["filter"]], []).append((sample["doc_id"], right))
    return {name: [right for _, right in sorted(pairs)] for name, pairs in found.items()}


def figures(found: dict[str, list[bool]]) -> dict[str, float]:
    """Accuracy of each filter in % with its standard error."""
    result: dict[str, float] = {}
    for name, hits in found.items():
        result[name] = 100 * sum(hits) / len(hits)
        result[f"{name}_error"] = 100 * proportion_error(hits)
        result["items"] = float(len(hits))
    return result


def paired(own: dict[str, list[bool]], other: dict[str, list[bool]]) -> dict[str, float]:
    """McNemar's test of each filter on the same items."""
    result: dict[str, float] = {}
    for name, hits in own.items():
        better, worse, p = mcnemar(hits, other[name])
        result |= {f"{name}_only_model": float(better), f"{name}_only_baseline": float(worse)}
        result[f"{name}_difference"] = 100 * (better - worse) / len(hits)
        result[f"{name}_mcnemar_p"] = p
    return result


def accuracy_columns(
    model: Subject, baselines: Sequence[Subject], config: dict[str, Any], settings: Settings
) -> dict[str, Figures]:
    """Columns of a report: each model, and the model against each baseline."""
    own = answers(model, config, settings)
    columns: dict[str, Figures] = {model.label: {**figures(own), **model.size()}}
    for each in baselines:
        other = answers(each, config, settings)
        columns[each.label] = {**figures(other), **each.size()}
        columns[f"{model.label} against {each.label}"] = paired(own, other)
    return columns
