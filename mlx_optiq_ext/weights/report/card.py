"""The model card: what a converted model is, what was measured, how to run it, what made it.

Format: a README.md with YAML in front, as the Hub reads it (huggingface.co/docs/hub/model-cards).
"""

import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...planning.calibration import on
from ..plan import Plan
from . import words

FILE = "README.md"

#: Options that say where results go, and change nothing of the model.
OUTPUTS = ("--mlx-path", "--upload-repo", "--optiq-report")


@dataclass(frozen=True)
class Origin:
    """Where a converted model comes from.

    Attributes:
        base_model: The original: a repository of the Hub, or the name of a folder.
        command: The command line that converted it, without `OUTPUTS`; empty if there was none.
        on_hub: Whether the original is a repository.
    """

    base_model: str
    command: str = ""
    on_hub: bool = False

    @classmethod
    def of(cls, source: str | Path, arguments: Iterable[str] = ()) -> "Origin":
        """The origin of what ``mlx_lm.convert`` makes.

        Args:
            source: Its ``--hf-path``.
            arguments: The words behind the command. Of paths from the root only the name is kept.
        """
        path = Path(source)
        kept = shlex.join(["mlx_lm.convert", *_kept(arguments)])
        return cls(path.name if path.exists() else str(source), kept, not path.exists())

    def entries(self) -> dict[str, str]:
        """The origin as ``optiq_metadata.json`` has it."""
        return {
            "base_model": self.base_model,
            **({"command": self.command} if self.command else {}),
        }


def text(plan: Plan, origin: Origin, name: str, folder: Path) -> str:
    """The card's text, without its YAML.

    Args:
        plan: The plan of the weights.
        origin: Where the model comes from.
        name: What to call the model in commands: its repository, or its folder.
        folder: Holds the model.
    """
    base = origin.base_model
    original = f"[{base}](https://huggingface.co/{base})" if origin.on_hub else f"`{base}`"
    parts = [
        f"# {name}",
        f"{original} with {plan.achieved_bpw:.3f} bits per weight: every tensor has its own bits "
        "and group size. mlx-lm loads it without further packages.",
        _table(plan, folder),
        *_measured(plan),
        "## Use",
        _fenced(f"pip install mlx-lm\nmlx_lm.generate --model {shlex.quote(name)} --prompt hello"),
    ]
    if (folder / "kv_config.json").exists():
        parts += [
            "`kv_config.json` keeps keys and values at their own precision, with mlx-optiq-ext:",
            _fenced(f"mlx_lm.server --model {shlex.quote(name)} --optiq-kv auto"),
        ]
    parts += ["## How it was made"]
    if origin.command:
        parts.append(_fenced(origin.command))
    counts = Counter(str(each) for each in plan.precisions.values())
    listed = ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items()))
    versions = ", ".join(f"{package} {version}" for package, version in plan.versions.items())
    parts.append(f"Tensors: {listed}. `optiq_metadata.json` has the precision of each.")
    if versions:
        parts.append(f"Versions: {versions}.")
    return "\n\n".join(parts) + "\n"


def write(folder: Path, plan: Plan, origin: Origin, name: str) -> None:
    """Write the card into a model's folder, under the YAML of the card that mlx-lm wrote there."""
    from huggingface_hub import ModelCard, ModelCardData

    path = folder / FILE
    data: Any = ModelCardData(library_name="mlx", tags=["mlx"])
    if path.exists():
        data = ModelCard.load(path).data
    data.tags = list(dict.fromkeys([*(data.tags or []), "mlx-optiq-ext"]))
    if origin.on_hub:
        data.base_model = origin.base_model
        data.base_model_relation = "quantized"
    body = text(plan, origin, name, folder)
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{body}", encoding="utf-8")


def upload(folder: Path, repo: str) -> None:
    """Upload a converted model with its card.

    mlx-lm's own upload would replace the card, and needs an older huggingface_hub than 2.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(repo_id=repo, exist_ok=True)
    hub.upload_folder(folder_path=str(folder), repo_id=repo, repo_type="model")
    print(f"[optiq] Uploaded to https://huggingface.co/{repo}")


def _kept(arguments: Iterable[str]) -> Iterable[str]:
    """The arguments without options that name outputs."""
    skipped = False
    for word in arguments:
        name, _, value = word.partition("=")
        output = len(name) > 2 and any(option.startswith(name) for option in OUTPUTS)
        if not skipped and not output:
            path = Path(value or word)
            short = path.name if path.is_absolute() else value or word
            yield f"{name}={short}" if value else short
        skipped = output and not value


def _table(plan: Plan, folder: Path) -> str:
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    rows = [("this model", plan.achieved_bpw, plan.kl, words.size(8 * weights))]
    for other in (plan.below, plan.above):
        if other is not None:
            rows.append((f"uniform {other.precision}", other.bpw, other.kl, ""))
    lines = ["| | bits per weight | KL, nats per token | weight files |", "|---|---|---|---|"]
    for name, bpw, kl, size in rows:
        shown = "not measured" if kl is None else f"{kl:.4g}"
        lines.append(f"| {name} | {bpw:.3f} | {shown} | {size} |")
    return "\n".join(lines)


def _measured(plan: Plan) -> Iterable[str]:
    """On what the KL was measured, if it was."""
    if plan.kl is None:
        return
    said = f"KL(original, model) is the mean on {plan.judged_on}."
    if plan.calibration.get("sequences"):
        used = plan.calibration
        said += f" Calibration: {used['sequences']} sequences of {used['length']} tokens"
        if digest := used.get("sha256"):
            said += f" (SHA-256 of the tokens: `{digest[:16]}`)"
        said += "."
    yield said
    if (found := plan.certificate) is not None:
        kinds = ", ".join(
            f"{kl:.4g} on text {on(kind)}" for kind, kl in found["kl_by_kind"].items()
        )
        yield (
            f"With {found['confidence']:.0%} confidence it is at most {found['kl_bound']:.4g} on "
            f"text like the calibration text ({found['tokens']:,} held-out tokens). The same next "
            f"token is most likely for {found['same_top_token']:.1%} of them, and the 99th "
            f"percentile of their KL is {found['kl_99th_percentile']:.3g}. KL by kind of text: "
            f"{kinds}."
        )


def _fenced(code: str) -> str:
    return f"```bash\n{code}\n```"
