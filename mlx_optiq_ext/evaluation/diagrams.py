"""AI2D, multiple choice about diagrams: lmms-eval's prompt and scoring, through mlx-vlm.

Source: lmms-eval's ai2d task (lmms-lab/ai2d, test): the question and its options, greedy decoding
of at most 16 tokens, exact match of the option's letter without case and punctuation.
"""

import base64
import string
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import InputError, UnsupportedError
from .items import read_lines
from .journal import Journal
from .models import Subject

MAX_TOKENS = 16
INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        question: The question's text.
        options: The answers to choose from.
        answer: The correct option's letter.
        image: The diagram's file.
    """

    question: str
    options: tuple[str, ...]
    answer: str
    image: Path

    @property
    def prompt(self) -> str:
        """The prompt that goes with the image."""
        letters = string.ascii_uppercase
        choices = "\n".join(f"{letters[n]}. {text}" for n, text in enumerate(self.options))
        return f"{self.question}\n{choices}{INSTRUCTION}"


def read_items(path: Path) -> list[Item]:
    """Questions of a ``.jsonl`` file: ``question``, ``options``, ``answer`` and ``image``.

    ``answer`` is a letter or the option's number from 0, ``image`` a file beside the data file.

    Raises:
        InputError: The file is missing, empty, or a line is wrong; the message names it.
    """

    def item(where: str, entry: Any) -> Item:
        question, options = str(entry["question"]), tuple(map(str, entry["options"]))
        image, answer = path.parent / str(entry["image"]), entry["answer"]
        text = str(answer).strip()
        index = int(text) if text.isdigit() else string.ascii_uppercase.find(text.upper() or "?")
        if not 0 <= index < len(options):
            raise InputError(f"{where}: the answer {answer!r} is none of {len(options)} options")
        if not image.is_file():
            raise InputError(f"{where}: there is no image {image}")
        return Item(question, options, string.ascii_uppercase[index], image)

    return read_lines(path, item, "question, options, answer and image")


def download(folder: Path) -> list[Item]:
    """The test set of lmms-lab/ai2d from the Hub, its images written into a folder.

    Raises:
        InputError: The test set cannot be downloaded.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]

        rows: Any = datasets.load_dataset("lmms-lab/ai2d", split="test")
    except (ImportError, OSError, ValueError) as error:
        raise InputError(
            f"lmms-lab/ai2d cannot be downloaded ({type(error).__name__}): install datasets, check "
            "the connection, or name a .jsonl file with --optiq-data"
        ) from error
    items = []
    for number, row in enumerate(rows):
        image = folder / f"{number}.png"
        row["image"].save(image)
        letter = string.ascii_uppercase[int(row["answer"])]
        items.append(Item(row["question"], tuple(row["options"]), letter, image))
    return items


def right(answer: str, item: Item) -> bool:
    """Whether an answer is the option's letter, without case and punctuation."""
    plain = answer.strip().translate(str.maketrans("", "", string.punctuation))
    return plain.strip().lower() == item.answer.lower()


Answer = Callable[[Item], str]


def answers(
    model: Subject, items: list[Item], *, answer: Answer | None = None, progress: bool = True
) -> list[bool]:
    """Which items a model gets right.

    Args:
        model: A vision-language model.
        items: The questions.
        answer: Returns a model's text for an item; None uses mlx-vlm.
        progress: Whether to show a progress bar.

    Raises:
        UnsupportedError: mlx-vlm is not installed.
    """
    digest = [(item.prompt, base64.b64encode(item.image.read_bytes()[-64:])) for item in items]
    journal = Journal.open({"task": "ai2d", "model": model.key(), "items": repr(digest)})
    known = journal.items()
    missing = [n for n in range(len(items)) if str(n) not in known]
    if missing:
        answer = answer or through_mlx_vlm(model)
        for n in tqdm(missing, desc=f"AI2D {model.label}"[-50:], disable=not progress):
            known[str(n)] = answer(items[n])
            journal.put_item(str(n), known[str(n)])
    return [right(known[str(n)], item) for n, item in enumerate(items)]


def through_mlx_vlm(model: Subject) -> Answer:
    """A function that asks a model through mlx-vlm.

    Raises:
        InputError: The model takes no images, or mlx-vlm cannot load it.
        UnsupportedError: mlx-vlm is not installed.
    """
    try:
        import mlx_vlm  # pyright: ignore[reportMissingImports]
        from mlx_vlm.prompt_utils import (  # pyright: ignore[reportMissingImports]
            apply_chat_template,
        )
    except ImportError as error:
        raise UnsupportedError(
            "ai2d runs vision-language models through mlx-vlm, which is not installed "
            f"({error}): pip install 'mlx-optiq-ext[vlm]'"
        ) from error
    config = model.config()
    if not any("vision" in key or "image" in key or "mm_" in key for key in config):
        what = config.get("model_type", "no model type")
        raise InputError(
            f"ai2d asks about images, and {model.name} ({what}) takes none: give a vision-language "
            "model, converted with its vision tower (--optiq-keep-unused-modalities)"
        )
    try:
        loaded, processor = mlx_vlm.load(str(model.folder))
    except (AttributeError, ImportError, KeyError, OSError, TypeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise InputError(
            f"mlx-vlm cannot load {model.name} ({type(error).__name__}: {first}): give a "
            "vision-language model that it knows"
        ) from error

    def answer(item: Item) -> str:
        prompt = apply_chat_template(processor, loaded.config, item.prompt, num_images=1)
        found: Any = mlx_vlm.generate(
            loaded, processor, prompt, [str(item.image)], max_tokens=MAX_TOKENS, temperature=0.0,
            verbose=False,
        )  # fmt: skip
        return getattr(found, "text", found)

    return answer


def items_of(path: Path | None) -> tuple[list[Item], str]:
    """The items of a file, or of the Hub's test set, and the name of the data."""
    if path is not None:
        return read_items(path), path.name
    return download(Path(tempfile.mkdtemp(prefix="ai2d-"))), "lmms-lab/ai2d"
