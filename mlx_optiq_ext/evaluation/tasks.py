"""The tasks of ``mlx_lm.evaluate --optiq-task``, each from models and data to a report."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import InputError
from . import diagrams, harness, likelihood, speech, token_divergence, word_problems
from .models import Subject, check_same_tokens, tokenizer_of
from .report import Figures, Report
from .texts import CONTEXT, read_data, sequences


@dataclass(frozen=True)
class Settings:
    """What a task is given besides its models.

    Attributes:
        data: File of texts, questions, images or recordings.
        limit: Items or sequences at most.
        context: Tokens of a sequence.
        shots: Examples before a question.
        max_tokens: Tokens of an answer at most.
        batch_size: Answers generated at once.
        chat_template: Whether to use it; None for where there is one.
        fewshot_as_multiturn: Whether examples are turns of a chat.
        seed: For drawing examples.
        progress: Whether to show progress bars.
    """

    data: Path | None = None
    limit: int | None = None
    context: int | None = None
    shots: int | None = None
    max_tokens: int | None = None
    batch_size: int = 8
    chat_template: bool | None = None
    fewshot_as_multiturn: bool = False
    seed: int = 123
    progress: bool = True

    def digest(self, models: Sequence[Subject]) -> str:
        """Eight letters that tell an evaluation of other models, data or settings apart."""
        told = asdict(self) | {"models": [each.label for each in models]}
        for name in ("data", "batch_size", "progress"):
            del told[name]
        total = hashlib.sha256(repr(told).encode())
        if self.data is not None:
            with self.data.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()[:8]


def kl(model: Subject, baselines: Sequence[Subject], settings: Settings) -> Report:
    """KL(baseline || model) over a text, for each baseline.

    Raises:
        InputError: There is no baseline or no text, or a baseline has another tokenizer.
    """
    if not baselines:
        raise InputError("kl compares with a reference: name it with --optiq-baseline")
    texts = read_data(settings.data)
    for each in baselines:
        check_same_tokens(model, each, texts)
    context = settings.context or CONTEXT
    tokens = sequences(texts, tokenizer_of(model), context, settings.limit)
    columns: dict[str, Figures] = {}
    for each in baselines:
        found = token_divergence.compare(model, each, tokens, progress=settings.progress)
        sizes = {**model.size(), **{f"baseline_{k}": v for k, v in each.size().items()}}
        columns[f"{model.label} against {each.name}"] = {**found, **sizes}
    note = "KL in nats per token, KL(baseline \\|\\| model); changes of probability in %."
    data = settings.data.name if settings.data else ""
    shape = {"windows": len(tokens), "context": tokens.shape[1]}
    return Report("kl", data, shape, columns, (note,), noise=token_divergence.NOISE)


def perplexity(model: Subject, baselines: Sequence[Subject], settings: Settings) -> Report:
    """Perplexity over long sequences: of the model with its KV plan and without, and of baselines.

    Raises:
        InputError: There is no text, or a baseline has another tokenizer.
    """
    texts = read_data(settings.data)
    for each in baselines:
        check_same_tokens(model, each, texts)
    tokens = sequences(texts, tokenizer_of(model), settings.context or 4 * CONTEXT, settings.limit)
    plain = [Subject(model.name, model.folder)] if model.kv_plan is not None else []
    own = likelihood.losses(model, tokens, progress=settings.progress)
    columns: dict[str, Figures] = {model.label: {**likelihood.figures(own), **model.size()}}
    for each in [*plain, *baselines]:
        other = likelihood.losses(each, tokens, progress=settings.progress)
        columns[each.label] = {**likelihood.figures(other), **each.size()}
        columns[f"{model.label} against {each.label}"] = likelihood.ratio(own, other)
    data = settings.data.name if settings.data else ""
    shape = {"windows": len(tokens), "context": tokens.shape[1]}
    return Report("perplexity", data, shape, columns)


def gsm8k(model: Subject, baselines: Sequence[Subject], settings: Settings) -> Report:
    """GSM8K by lm-eval, strict and flexible, with McNemar's test against each baseline.

    Raises:
        InputError: The data or the number of examples is wrong.
        UnsupportedError: lm-eval is not installed.
    """
    harness.require()
    config = word_problems.config_for(settings.data, settings.shots)
    columns = word_problems.accuracy_columns(
        model,
        baselines,
        config,
        shots=settings.shots,
        limit=settings.limit,
        max_tokens=settings.max_tokens,
        batch_size=settings.batch_size,
        chat_template=settings.chat_template,
        fewshot_as_multiturn=settings.fewshot_as_multiturn,
        seed=settings.seed,
        progress=settings.progress,
    )
    data = settings.data.name if settings.data else "openai/gsm8k"
    note = "Accuracy in %; McNemar's exact test, two-sided, on the same items."
    about = {
        "task": config["task"],
        "examples": settings.shots or 8,
        "max tokens": settings.max_tokens or harness.MAX_TOKENS,
    }
    return Report("gsm8k", data, about, columns, (note,))


def ai2d(model: Subject, baselines: Sequence[Subject], settings: Settings) -> Report:
    """AI2D's accuracy through mlx-vlm, with McNemar's test against each baseline.

    Raises:
        InputError: The data is wrong, or a KV plan was given.
        UnsupportedError: mlx-vlm is not installed.
    """
    _refuse_kv(model, "ai2d", "mlx-vlm")
    items, name = diagrams.items_of(settings.data)
    items = items[: settings.limit]
    own = diagrams.answers(model, items, progress=settings.progress)
    columns: dict[str, Figures] = {
        model.label: word_problems.figures({"accuracy": own}) | model.size()
    }
    for each in baselines:
        other = diagrams.answers(each, items, progress=settings.progress)
        columns[each.label] = word_problems.figures({"accuracy": other}) | each.size()
        columns[f"{model.label} against {each.label}"] = word_problems.paired(
            {"accuracy": own}, {"accuracy": other}
        )
    note = "Accuracy in %; McNemar's exact test, two-sided, on the same items."
    return Report("ai2d", name, {}, columns, (note,))


def wer(model: Subject, baselines: Sequence[Subject], settings: Settings) -> Report:
    """Corpus word error rate through mlx-whisper.

    Raises:
        InputError: There is no data or it is wrong, or a KV plan was given.
        UnsupportedError: mlx-whisper or jiwer is not installed.
    """
    _refuse_kv(model, "wer", "mlx-whisper")
    if settings.data is None:
        raise InputError("wer needs recordings: name a .jsonl file with --optiq-data")
    items = speech.read_items(settings.data)[: settings.limit]
    said = [item.text for item in items]
    columns: dict[str, Figures] = {}
    for each in [model, *baselines]:
        heard = speech.transcripts(each, items, progress=settings.progress)
        found = speech.counts(said, heard, speech.normaliser(each.folder))
        columns[each.label] = speech.figures(found) | each.size()
    note = "Word error rate in % of all words, after Whisper's English normaliser."
    return Report("wer", settings.data.name, {}, columns, (note,))


def _refuse_kv(model: Subject, task: str, engine: str) -> None:
    if model.kv_plan is not None:
        raise InputError(
            f"{task} runs through {engine}, which has no KV plan: leave --optiq-kv out"
        )


Task = Callable[[Subject, Sequence[Subject], Settings], Report]

TASKS: Mapping[str, Task] = {
    "kl": kl,
    "perplexity": perplexity,
    "gsm8k": gsm8k,
    "ai2d": ai2d,
    "wer": wer,
}
