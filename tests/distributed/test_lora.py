"""``mlx_lm.lora`` on several ranks trains what one process trains."""

import json
import time

import mlx.core as mx
import pytest

from .test_failures import ALLOWED


@pytest.fixture(scope="session")
def data(texts, tmp_path_factory):
    """Texts of different lengths, so that ranks see different numbers of tokens."""
    folder = tmp_path_factory.mktemp("data")
    for name, part in (("train", texts[:32]), ("valid", texts[32:40])):
        write(folder / f"{name}.jsonl", part)
    return folder


def write(path, texts):
    rows = [{"text": text[: 20 + 18 * (i % 7)]} for i, text in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, rows)))


def words(model, data, folder, *more):
    yield from ("--model", model, "--data", data, "--adapter-path", folder, "--train")
    yield from ("--iters", "2", "--batch-size", "4", "--steps-per-report", "1", "--val-batches")
    yield from ("1", "--steps-per-eval", "2", "--save-every", "2", "--num-layers", "-1")
    yield from ("--learning-rate", "1e-4", "--optiq-rank-scaling", *more)


RECORDED = """
import json, os
import mlx_lm.lora as command
from mlx_lm.tuner.callbacks import TrainingCallback

class Recorder(TrainingCallback):
    def on_train_loss_report(self, info):
        self.keep("train", info["train_loss"])
    def on_val_loss_report(self, info):
        self.keep("validation", info["val_loss"])
    def keep(self, name, loss):
        if os.environ.get("MLX_RANK", "0") == "0":
            with open(os.environ["LOSSES"], "a") as file:
                file.write(json.dumps([name, loss]) + "\\n")

command.get_reporting_callbacks = lambda *args, **kwargs: Recorder()
command.main()
"""


def losses(path) -> list[tuple[str, float]]:
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()]


#: Adam divides by the gradient's size, so that rounding counts where that is next to nothing.
PLAIN = ("--optimizer", "sgd", "--learning-rate", "0.1")


@pytest.mark.parametrize(
    ("count", "more", "bound"),
    [
        (2, ("by_bits", *PLAIN), 1e-5),
        pytest.param(4, (), 1e-4, marks=pytest.mark.newest),
        pytest.param(
            *(2, ("constant", "--optiq-init", "residual", *PLAIN), 1e-5), marks=pytest.mark.newest
        ),
    ],
)
def test_the_adapter_is_that_of_one_process(
    launch, run, tiny, converted, data, tmp_path, count, more, bound
):
    if "residual" in more:
        more = (*more, "--optiq-original", tiny)
    curves = [tmp_path / f"{name}.jsonl" for name in ("one", "many")]
    commands = [
        ("-c", RECORDED, *words(converted, data, tmp_path / n, *more)) for n in ("one", "many")
    ]
    alone = run("python", *commands[0], env={"LOSSES": str(curves[0])}, check=True)
    many = launch(count, *commands[1], env={"LOSSES": str(curves[1])})
    assert many.returncode == 0, many.stderr
    expected, found = map(losses, curves)
    assert [n for n, _ in found] == [n for n, _ in expected], many.stdout + many.stderr
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-5)
    assert len(found) == 2 + 2
    assert many.stdout.count("[optiq] ") == alone.stdout.count("[optiq] ") == 1
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == names
    assert {"optiq_lora_config.json", "adapter_model.safetensors"} <= set(names)
    for name in names:
        one, other = tmp_path / "one" / name, tmp_path / "many" / name
        if name.endswith(".json"):
            assert one.read_text().replace(str(tmp_path / "one"), "") == other.read_text().replace(
                str(tmp_path / "many"), ""
            )
            continue
        adapter, other_adapter = mx.load(str(one)), mx.load(str(other))
        assert isinstance(adapter, dict)
        assert isinstance(other_adapter, dict)
        assert set(other_adapter) == set(adapter)
        for path, array in adapter.items():
            assert float(mx.abs(other_adapter[path] - array).max()) < bound, (name, path)
            assert float(mx.abs(array).max()) > 0


def test_training_goes_on_from_what_only_the_first_rank_has(apart, converted, data, run, tmp_path):
    first = tmp_path / "first"
    run("mlx_lm.lora", *words(converted, data, first), check=True)

    def fill(folder, rank):
        if rank == 0:
            (folder / "before.safetensors").write_bytes(
                (first / "adapters.safetensors").read_bytes()
            )

    done = apart(
        fill,
        "lora",
        *words(converted, data, "more", "by_kl", "--resume-adapter-file", "before.safetensors"),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ranks" / "0" / "more" / "adapters.safetensors").exists()
    assert not list((tmp_path / "ranks" / "1" / "more").iterdir())
    started, ended = (
        mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("first", "ranks/0/more")
    )
    assert isinstance(started, dict)
    assert isinstance(ended, dict)
    # Two steps at this rate move no number further, while a new start would be anywhere.
    assert all(float(mx.abs(ended[path] - started[path]).max()) < 5e-3 for path in started)


def test_a_batch_that_does_not_divide_is_refused_once(launch, converted, data, tmp_path):
    given = (*words(converted, data, tmp_path / "a"), "--batch-size", "3")
    done = launch(2, "-m", "mlx_lm", "lora", *given)
    assert done.stderr.count("--batch-size 3 does not divide over 2 processes") == 1, done.stderr
    assert not (tmp_path / "a").exists()


def test_other_data_on_one_rank_is_refused(apart, converted, texts):
    def fill(folder, rank):
        for name in ("train", "valid"):
            write(folder / f"{name}.jsonl", texts[rank : 32 + rank])

    started = time.monotonic()
    done = apart(fill, "lora", *words(converted, ".", "out"))
    assert time.monotonic() - started < ALLOWED
    assert done.stderr.count("the ranks do not have the same training data") == 1, done.stderr


def test_another_yaml_file_on_one_rank_is_refused(apart, converted, data):
    def fill(folder, rank):
        (folder / "lora.yaml").write_text(f"optiq_rank_scaling: by_bits\nseed: {rank}\n")

    given = [w for w in words(converted, data, "out") if w != "--optiq-rank-scaling"]
    done = apart(fill, "lora", *given, "--config", "lora.yaml")
    assert done.stderr.count("the ranks do not have the same settings") == 1, done.stderr
