"""``mlx_lm.lora`` on several ranks trains what one process trains."""

import json
import re
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
    rows = [{"text": text[: 60 + 37 * (i % 7)]} for i, text in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, rows)))


def words(model, data, folder, *more):
    yield from ("--model", model, "--data", data, "--adapter-path", folder, "--train")
    yield from ("--iters", "4", "--batch-size", "4", "--steps-per-report", "1", "--val-batches")
    yield from ("2", "--steps-per-eval", "2", "--save-every", "2", "--num-layers", "-1")
    yield from ("--learning-rate", "1e-4", "--optiq-rank-scaling", *more)


def losses(done) -> list[float]:
    return [float(found) for found in re.findall(r"(?:Train|Val) loss ([\d.]+)", done.stdout)]


@pytest.mark.parametrize(
    ("count", "more"), [(2, ()), (4, ("by_bits",)), (2, ("constant", "--optiq-init", "residual"))]
)
def test_the_adapter_is_that_of_one_process(
    launch, run, tiny, converted, data, tmp_path, count, more
):
    if "residual" in more:
        more = (*more, "--optiq-original", tiny)
    alone = run("mlx_lm.lora", *words(converted, data, tmp_path / "one", *more), check=True)
    many = launch(count, "-m", "mlx_lm", "lora", *words(converted, data, tmp_path / "many", *more))
    assert many.returncode == 0, many.stderr
    assert losses(many) == pytest.approx(losses(alone), abs=2e-3)
    assert len(losses(many)) == 4 + 3
    assert many.stdout.count("[optiq] ") == alone.stdout.count("[optiq] ") == 1
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == names
    assert {"optiq_lora_config.json", "adapter_model.safetensors"} <= set(names)
    for name in names:
        one, other = tmp_path / "one" / name, tmp_path / "many" / name
        if name.endswith(".json"):
            folders = (str(tmp_path / each) for each in ("one", "many"))
            assert one.read_text().replace(next(folders), "") == other.read_text().replace(
                next(folders), ""
            )
            continue
        expected, found = mx.load(str(one)), mx.load(str(other))
        assert isinstance(expected, dict)
        assert isinstance(found, dict)
        assert set(found) == set(expected)
        for path, array in expected.items():
            assert float(mx.abs(found[path] - array).max()) < 1e-5, (name, path)
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
    before, after = (losses(done)[0], losses(done)[-1])
    assert after < before
    assert (tmp_path / "ranks" / "0" / "more" / "adapters.safetensors").exists()
    assert not list((tmp_path / "ranks" / "1" / "more").iterdir())


def test_a_batch_that_does_not_divide_is_refused_once(launch, converted, data, tmp_path):
    given = (*words(converted, data, tmp_path / "a"), "--batch-size", "3")
    done = launch(2, "-m", "mlx_lm", "lora", *given)
    assert done.stderr.count("--batch-size 3 does not divide over 2 ranks") == 1, done.stderr
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
