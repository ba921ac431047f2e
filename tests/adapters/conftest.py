"""The tiny model in float32, adapters made at random, and adapters trained to say their name."""

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import pytest
from live_server import serve, write_exact
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from toy_adapters import KEYS, save_adapter, write_adapter

#: Adapters that answer with their own name, whatever is asked: the tiny model knows numbers best.
NAMES = ("11", "22", "33")
QUESTIONS = (
    "There are 13 bricks in each bag and Noah buys 2 bags. How many bricks are there?",
    "Ivan has 25 stamps. Ana has twice as many. How many stamps do they have?",
    "Mia has 31 apples and gives 12 to Tom. How many apples does Mia have left?",
    "A box holds 4 rows of 6 eggs. How many eggs are in 3 boxes?",
)


@pytest.fixture(scope="session")
def exact(tiny, tmp_path_factory) -> Path:
    """The tiny model in float32, where a row of a batch computes what it would alone."""
    return write_exact(tiny, tmp_path_factory.mktemp("models") / "exact")


@pytest.fixture
def model(exact) -> nn.Module:
    """That model, loaded."""
    return mlx_lm.load(str(exact))[0]


@pytest.fixture
def adapter(tmp_path, exact) -> Callable[..., Path]:
    """Writes an adapter for the model: ``adapter("A", rank=4, seed=1)``."""

    plain = mlx_lm.load(str(exact))[0]

    def adapter(name: str, **options) -> Path:
        return write_adapter(tmp_path / name, plain, **options)

    return adapter


@pytest.fixture(scope="session")
def named(exact, tmp_path_factory) -> dict[str, Path]:
    """Adapters by name, each trained to answer with its name and nothing else."""
    root = tmp_path_factory.mktemp("named")
    return {name: train(exact, root / name, name) for name in NAMES}


def train(source: Path, folder: Path, answer: str, *, steps: int = 40, rank: int = 8) -> Path:
    """Train an adapter that answers every question with one number."""
    model, tokenizer = mlx_lm.load(str(source))[:2]
    model.freeze()
    parameters = {"rank": rank, "scale": 4.0, "dropout": 0.0, "keys": list(KEYS)}
    mx.random.seed(7)
    linear_to_lora_layers(model, 99, parameters)
    said = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    examples = [mx.array([prompt(tokenizer, question) + said]) for question in QUESTIONS]
    optimizer = optim.Adam(learning_rate=1e-3)

    def loss(model, tokens):
        logits = model(tokens[:, :-1])[:, -len(said) :]
        return nn.losses.cross_entropy(logits, tokens[:, -len(said) :], reduction="mean")

    step = nn.value_and_grad(model, loss)
    losses = []
    for index in range(steps):
        value, gradients = step(model, examples[index % len(examples)])
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(value.item())
    assert max(losses[-len(examples) :]) < 0.2, losses
    return save_adapter(folder, dict(tree_flatten(model.trainable_parameters())), parameters)


def prompt(tokenizer, question: str) -> list[int]:
    """A question in the model's chat format."""
    messages = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


@pytest.fixture(scope="package")
def folder(named, tmp_path_factory):
    """A folder of adapters that clients may load from."""
    root = tmp_path_factory.mktemp("loadable")
    for name, source in named.items():
        shutil.copytree(source, root / name)
    (root / "broken").mkdir()
    shutil.copy(root / "11" / "adapter_config.json", root / "broken")
    whole = (root / "11" / "adapters.safetensors").read_bytes()
    (root / "broken" / "adapters.safetensors").write_bytes(whole[: len(whole) // 2])
    return root


@pytest.fixture(scope="package")
def server(exact, named, folder, tmp_path_factory):
    """A server with two adapters that may load more."""
    log = tmp_path_factory.mktemp("serving") / "log"
    arguments = [f"--optiq-adapter={name}={named[name]}" for name in ("11", "22")]
    updates = ("--optiq-allow-adapter-updates", "--optiq-adapter-dir", folder)
    with serve(log, "--model", exact, *arguments, *updates) as server:
        yield server


@pytest.fixture(scope="package")
def plain(exact, tmp_path_factory):
    """What a server without adapters answers."""
    from .asking import ask

    with serve(tmp_path_factory.mktemp("plain") / "log", "--model", exact) as server:
        return {question: ask(server, None, question) for question in QUESTIONS}
