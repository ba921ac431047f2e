"""The tasks of ``mlx_lm.evaluate --optiq-task``, each from models and data to a report."""

from collections.abc import Callable, Mapping, Sequence

from ..errors import InputError
from . import diagrams, harness, likelihood, speech, token_divergence, word_problems
from .models import Subject, check_same_tokens, tokenizer_of
from .report import Figures, Report
from .settings import Settings
from .texts import CONTEXT, read_data, sequences


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
    shape = {"sequences": len(tokens), "context": tokens.shape[1]}
    return Report("kl", data, shape, columns, (note,), noise=token_divergence.NOISE)


def perplexity(model: Subject, baselines: Sequence[Subject], settings: Settings) -> Report:
    """Perplexity over long sequences of the model, with its KV plan and without, and of baselines.

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
    shape = {"sequences": len(tokens), "context": tokens.shape[1]}
    return Report("perplexity", data, shape, columns)


def gsm8k(model: Subject, baselines: Sequence[Subject], settings: Settings) -> Report:
    """GSM8K by lm-eval, strict and flexible, with McNemar's test against each baseline.

    Raises:
        InputError: The data or the number of examples is wrong.
        UnsupportedError: lm-eval is not installed.
    """
    harness.require()
    config = word_problems.config_for(settings.data, settings.shots)
    columns = word_problems.accuracy_columns(model, baselines, config, settings)
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
