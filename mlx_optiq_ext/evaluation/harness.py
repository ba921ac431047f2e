"""lm-evaluation-harness with our models: its tasks, prompts, filters and metrics.

Each answer is stored at once, so that an interrupted run goes on where it stopped.
"""

import contextlib
import importlib.util
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

from ..errors import InputError, UnsupportedError
from ..kv import make_caches
from ..model.vocabulary import check_tokens
from .journal import Journal
from .models import Subject
from .settings import Settings

#: Tokens of an answer at most, unless told otherwise.
MAX_TOKENS = 512

#: Continues texts: model, tokenizer, texts, tokens of a continuation at most.
Generate: TypeAlias = Callable[..., list[str]]


def require() -> None:
    """Raise UnsupportedError unless lm-eval is installed."""
    for name in ("lm_eval", "datasets"):
        if importlib.util.find_spec(name) is None:
            raise UnsupportedError(
                f"gsm8k uses lm-evaluation-harness, and {name} is not installed: "
                "pip install 'mlx-optiq-ext[eval]'"
            )


def task_config(name: str) -> dict[str, Any]:
    """The definition of one of lm-eval's GSM8K tasks, such as ``"gsm8k"``."""
    import yaml

    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "tasks" / "gsm8k"
    return yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))


def evaluate(
    model: Subject, config: dict[str, Any], settings: Settings, generate: Generate
) -> list[dict[str, Any]]:
    """Run one generating task of lm-eval on a model.

    Args:
        model: The model.
        config: The task's definition, as lm-eval's YAML files have it.
        settings: Those of the task; ``shots`` is None for the definition's own number.
        generate: Continues texts, as `generated` does.

    Returns:
        lm-eval's samples: one dict per item and filter, with ``doc_id``, ``filter``, ``doc``,
        ``filtered_resps``, ``resps`` and the task's metrics.
    """
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

    journal = Journal.open(
        {"task": config, "model": model.key(), "max_tokens": settings.max_tokens}
    )
    loaded, tokenizer = model.load()
    templated = settings.chat_template
    if templated is None:
        templated = getattr(tokenizer, "chat_template", None) is not None

    class Generator(LM):
        """Generates with mlx-lm; the template is applied before lm-eval hands texts over."""

        @property
        def tokenizer_name(self) -> str:
            return model.name

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
            known = journal.items()
            wanted = {each.args[0]: each.args[1] for each in requests}
            missing = [text for text in wanted if text not in known]
            done = len(wanted) - len(missing)
            quiet, name = not settings.progress, model.label[-40:]
            with tqdm(total=len(wanted), initial=done, disable=quiet, desc=name) as bar:
                limit = settings.max_tokens or MAX_TOKENS
                for start in range(0, len(missing), settings.batch_size):
                    batch = missing[start : start + settings.batch_size]
                    answers = generate(loaded, tokenizer, batch, limit, special=not templated)
                    for text, answer in zip(batch, answers, strict=True):
                        known[text] = _cut(answer, wanted[text].get("until") or [], tokenizer)
                        journal.put_item(text, known[text])
                    bar.update(len(batch))
            return [known[each.args[0]] for each in requests]

        def loglikelihood(self, requests: Any, **_: Any) -> Any:
            raise InputError("only generating tasks of lm-eval can be run here")

        loglikelihood_rolling = loglikelihood

    run: Any = lm_eval.simple_evaluate
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            results = run(
                model=Generator(),
                tasks=[config],
                num_fewshot=settings.shots,
                limit=settings.limit,
                log_samples=True,
                bootstrap_iters=0,
                apply_chat_template=bool(templated),
                fewshot_as_multiturn=bool(templated and settings.fewshot_as_multiturn),
                random_seed=settings.seed,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
    except ConnectionError as error:
        raise InputError(
            f"{config['dataset_path']} is neither cached nor reachable: name its test set with "
            "--optiq-data"
        ) from error
    (samples,) = results["samples"].values()
    return samples


def generated(
    model: Any, tokenizer: Any, texts: list[str], max_tokens: int, *, special: bool
) -> list[str]:
    """Greedy continuations: in a batch, or one by one where a KV plan makes the caches."""
    from mlx_lm import batch_generate, stream_generate

    from ..kv import mounted_on

    prompts = [tokenizer.encode(text, add_special_tokens=special) for text in texts]
    for prompt in prompts:
        check_tokens(model, prompt)
    if mounted_on(model) is None:
        return batch_generate(model, tokenizer, prompts, max_tokens=max_tokens).texts
    answers = []
    for prompt in prompts:
        pieces = stream_generate(
            model, tokenizer, prompt, max_tokens=max_tokens, prompt_cache=make_caches(model)
        )
        answers.append("".join(piece.text for piece in pieces))
    return answers


def _cut(text: str, stops: Sequence[str], tokenizer: Any) -> str:
    """An answer up to its first stop string, without the thinking before it."""
    if getattr(tokenizer, "has_thinking", False):
        _, found, rest = text.partition(tokenizer.think_end)
        text = rest if found else text
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
