"""Word error rate of speech recognition: mlx-whisper, Whisper's normaliser, jiwer.

Corpus rate: edits over words of the whole set, after the English normaliser of Whisper (Radford et
al., arXiv 2212.04356, appendix C).
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from .. import files
from ..errors import InputError, UnsupportedError
from .items import read_lines
from .journal import Journal
from .models import Subject


@dataclass(frozen=True)
class Item:
    """A recording and its transcript."""

    audio: Path
    text: str


def read_items(path: Path) -> list[Item]:
    """Recordings of a ``.jsonl`` file: ``audio``, a file beside it, and ``text``.

    Raises:
        InputError: The file is missing, empty, or a line is wrong; the message names it.
    """

    def item(where: str, entry: Any) -> Item:
        audio, text = path.parent / str(entry["audio"]), str(entry["text"])
        if not audio.is_file():
            raise InputError(f"{where}: there is no recording {audio}")
        return Item(audio, text)

    return read_lines(path, item, "audio and text")


def normaliser(folder: Path) -> Callable[[str], str]:
    """Whisper's English normaliser, with the spellings of ``normalizer.json`` if it is there."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    path = folder / "normalizer.json"
    spellings = files.read_json(path) if path.exists() else {}
    return EnglishTextNormalizer(spellings)


def counts(
    references: Sequence[str], answers: Sequence[str], normalise: Callable[[str], str]
) -> list[tuple[int, int]]:
    """Edits and reference words of each item after normalisation.

    An item whose reference is empty after that counts every word of its answer as an edit.

    Raises:
        UnsupportedError: jiwer is not installed.
    """
    try:
        import jiwer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UnsupportedError(
            "wer counts edits with jiwer, which is not installed: "
            "pip install 'mlx-optiq-ext[audio]'"
        ) from error
    found = []
    for reference, answer in zip(references, answers, strict=True):
        said, heard = normalise(reference), normalise(answer)
        if not said.strip():
            found.append((len(heard.split()), 0))
            continue
        result = jiwer.process_words(said, heard)
        edits = result.substitutions + result.deletions + result.insertions
        found.append((edits, result.hits + result.substitutions + result.deletions))
    return found


def figures(found: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Corpus word error rate in %, its standard error over recordings, edits and words."""
    edits, words = sum(e for e, _ in found), sum(w for _, w in found)
    if not words:
        raise InputError("the data file's texts have no words to be heard")
    rate, count = edits / words, len(found)
    spread = sum((e - rate * w) ** 2 for e, w in found)
    error = (count / (count - 1) * spread) ** 0.5 / words if count > 1 else float("nan")
    return {
        "wer": 100 * rate,
        "wer_error": 100 * error,
        "edits": float(edits),
        "words": float(words),
        "recordings": float(count),
    }


Transcribe = Callable[[Item], str]


def transcripts(
    model: Subject,
    items: list[Item],
    *,
    transcribe: Transcribe | None = None,
    progress: bool = True,
) -> list[str]:
    """A model's transcripts, one for each item.

    Args:
        model: A Whisper model in MLX's format.
        items: The recordings.
        transcribe: Returns a model's text for an item; None uses mlx-whisper.
        progress: Whether to show a progress bar.

    Raises:
        UnsupportedError: mlx-whisper is not installed.
    """
    key = [(item.audio.name, item.audio.stat().st_size, item.text) for item in items]
    journal = Journal.open({"task": "wer", "model": model.key(), "items": key})
    known = journal.items()
    missing = [n for n in range(len(items)) if str(n) not in known]
    if missing:
        transcribe = transcribe or through_mlx_whisper(model)
        for n in tqdm(missing, desc=f"WER {model.label}"[-50:], disable=not progress):
            known[str(n)] = transcribe(items[n])
            journal.put_item(str(n), known[str(n)])
    return [known[str(n)] for n in range(len(items))]


def through_mlx_whisper(model: Subject) -> Transcribe:
    """A function that transcribes through mlx-whisper.

    On a CPU it computes in float32, which takes a tenth of the time of float16 there.

    Raises:
        InputError: The model is no Whisper, or a recording cannot be decoded.
        UnsupportedError: mlx-whisper or ffmpeg is not installed.
    """
    try:
        import mlx_whisper  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UnsupportedError(
            f"wer transcribes through mlx-whisper, which is not installed ({error}): "
            "pip install 'mlx-optiq-ext[audio]'"
        ) from error

    config = model.config()
    if "n_mels" not in config:
        what = config.get("model_type", "no model type")
        raise InputError(
            f"wer transcribes recordings, and {model.name} ({what}) is no Whisper in mlx-whisper's "
            "format: give one such as mlx-community/whisper-tiny-mlx-4bit"
        )
    if shutil.which("ffmpeg") is None:
        raise UnsupportedError(
            "mlx-whisper decodes recordings with ffmpeg, which is not on the PATH: install it "
            "(brew install ffmpeg, or apt-get install ffmpeg)"
        )
    half = mx.default_device() != mx.Device(mx.cpu)

    def transcribe(item: Item) -> str:
        try:
            found: Any = mlx_whisper.transcribe(
                str(item.audio), path_or_hf_repo=str(model.folder), language="en", temperature=0.0,
                fp16=half,
            )  # fmt: skip
        except RuntimeError as error:
            first = str(error).strip().partition("\n")[0]
            raise InputError(f"{item.audio} could not be transcribed ({first})") from error
        return found["text"]

    return transcribe
