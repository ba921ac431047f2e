"""``mlx_lm.evaluate``: ``--optiq-kv``, and our tasks in place of lm-eval's, against baselines."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_optiq_ext.errors import InputError

from ..engine.command import Run
from ..engine.options import given, read, spelled
from . import kv

#: Title of a group in the help -> its options.
GROUPS = {"task": ("task", "baseline", "data", "context")}
#: Stock requires ``--tasks``; with ``--optiq-task`` it is not needed.
REPLACED = {"tasks": "--optiq-task"}


@dataclass(frozen=True)
class Options:
    """Options of the command line; None, or empty, for those that were not given."""

    task: str | None = None
    baseline: Sequence[str] = ()
    data: Path | None = None
    context: int | None = None


def add_arguments(group):
    """Add the options to an argparse group."""
    from mlx_optiq_ext.evaluation import TASKS

    kv.add_arguments(group)
    group.add_argument(
        "--optiq-task",
        choices=tuple(TASKS),
        help="In place of --tasks: KL divergence from a baseline, perplexity, GSM8K, AI2D through "
        "mlx-vlm, or word error rate through mlx-whisper. Interrupted runs go on where they "
        "stopped; a Markdown and a JSON file are written to --output-dir.",
    )
    group.add_argument(
        "--optiq-baseline",
        metavar="MODEL",
        action="append",
        help="Compare with this model (repeatable).",
    )
    group.add_argument(
        "--optiq-data",
        metavar="FILE",
        type=Path,
        help="Data of the task: text (.txt or .jsonl), GSM8K's test.jsonl, or a .jsonl file with "
        "question, options, answer and image, or audio and text, on each line.",
    )
    group.add_argument(
        "--optiq-context",
        metavar="N",
        type=int,
        help="Tokens of a sequence for kl (default 512) and perplexity (default 2048).",
    )


def check(command, parsed, args) -> Run | None:
    """Refuse unusable options; returns what runs in place of lm-eval, if anything."""
    from ..installation import gate

    kv.check(command, parsed, args)
    options = read(Options, parsed)
    if options.task is None:
        for name in given(options):
            raise InputError(f"{spelled([name])} needs --optiq-task, such as --optiq-task kl")
        return None
    gate().require("evaluation")
    if args.tasks:
        raise InputError(
            "--optiq-task and --tasks both say what to evaluate: leave one of them out"
        )
    if options.data is not None and not options.data.is_file():
        raise InputError(f"--optiq-data {options.data}: there is no such file")
    if options.context is not None and options.context < 2:
        raise InputError(f"--optiq-context {options.context} is too short: give 2 tokens or more")
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit {args.limit} leaves nothing to evaluate: give 1 or more")
    return lambda: run(options, args)


def run(options: Options, args) -> None:
    """Evaluate, print the table and write it."""
    from mlx_optiq_ext import evaluation

    assert options.task is not None
    settings = evaluation.Settings(
        data=options.data,
        limit=args.limit,
        context=options.context,
        shots=args.num_shots,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        chat_template=args.apply_chat_template,
        fewshot_as_multiturn=args.fewshot_as_multiturn,
        seed=args.seed,
    )
    model = evaluation.subject(args.model, kv.plan())
    baselines = [evaluation.subject(name) for name in options.baseline]
    digest = settings.digest([model, *baselines])
    report = evaluation.TASKS[options.task](model, baselines, settings)
    name = f"optiq_{options.task}_{args.model.strip('/').replace('/', '_')}_{digest}"
    table, data = report.write(Path(args.output_dir), name)
    print(report.markdown())
    print(f"[optiq] Written to {table} and {data}")


def interrupted() -> str:
    """What an interrupted evaluation leaves: finished items of our tasks on disk."""
    from mlx_optiq_ext import files

    return "; the same command goes on from here" if files.records_kept() else ""
