"""Settings of an evaluation, apart from its models."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .models import Subject


@dataclass(frozen=True)
class Settings:
    """Settings of a task, apart from its models.

    Attributes:
        data: File of texts, questions, images or recordings.
        limit: Items or sequences at most.
        context: Tokens of a sequence.
        shots: Examples before a question.
        max_tokens: Tokens of an answer at most.
        batch_size: Answers generated at once.
        chat_template: Whether to use the chat template; None uses it if the tokenizer has one.
        fewshot_as_multiturn: Whether examples are turns of a chat.
        seed: Seed for drawing examples.
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
        """Eight characters that identify the models, the data and the settings."""
        told = asdict(self) | {"models": [each.label for each in models]}
        for name in ("data", "batch_size", "progress"):
            del told[name]
        total = hashlib.sha256(repr(told).encode())
        if self.data is not None:
            with self.data.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()[:8]
