"""PyTorch's file format without PyTorch: files are written here as torch.save does."""

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.yolo.reading import torch_file


@pytest.fixture
def torch(monkeypatch):
    """Modules whose names stand in such files; the classes are only ever named."""
    made = {}
    for name in ("torch", "torch._utils", "ultralytics", "ultralytics.nn.tasks"):
        made[name] = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, made[name])

    def add(module, name, value):
        value.__module__, value.__qualname__ = module, name
        setattr(made[module], name, value)
        return value

    class Module:
        def __init__(self, **state):
            self.__dict__.update(state)

    add("ultralytics.nn.tasks", "DetectionModel", Module)
    for name in ("FloatStorage", "HalfStorage", "BFloat16Storage"):
        add("torch", name, type(name, (), {}))
    add("torch._utils", "_rebuild_tensor_v2", lambda *_: None)
    return made


class Tensor:
    def __init__(self, values, storage, stride=None, offset=0, shape=None):
        self.values, self.storage = np.asarray(values), storage
        self.shape = shape or self.values.shape
        self.stride = stride or tuple(s // self.values.itemsize for s in self.values.strides)
        self.offset = offset


def save(path: Path, tree, torch, damage=lambda data: data):
    """Write ``tree`` as torch.save would, with Tensor for tensors."""
    storages = {}

    class Storage:
        def __init__(self, tensor):
            self.tensor = tensor

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if not isinstance(obj, Storage):
                return None
            key = str(len(storages))
            storages[key] = obj.tensor.values.tobytes()
            kind = getattr(torch["torch"], obj.tensor.storage)
            return ("storage", kind, key, "cpu", obj.tensor.values.size)

        def reducer_override(self, obj):
            if isinstance(obj, Tensor):
                rebuild = torch["torch._utils"]._rebuild_tensor_v2
                parts = (Storage(obj), obj.offset, obj.shape, obj.stride, False, OrderedDict())
                return rebuild, parts
            return NotImplemented

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(tree)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("yolo26n/data.pkl", stream.getvalue())
        for key, data in storages.items():
            archive.writestr(f"yolo26n/data/{key}", damage(data))
    return path


def module(torch, children=None, **tensors):
    return torch["ultralytics.nn.tasks"].DetectionModel(
        _parameters=OrderedDict(tensors), _buffers=OrderedDict(), _modules=children or {}
    )


def test_reads_an_object_tree_by_its_state_dict_names(torch, tmp_path):
    values = np.arange(24, dtype=np.float16).reshape(2, 3, 2, 2)
    conv = module(torch, weight=Tensor(values, "HalfStorage"))
    root = module(torch, {"model": module(torch, {"0": module(torch, {"conv": conv})})})
    root.names = {0: "person", 1: "bicycle"}
    path = save(tmp_path / "a.pt", {"ema": None, "model": root, "epoch": 3}, torch)
    weights, names = torch_file.read(path)
    assert list(weights) == ["model.0.conv.weight"]
    assert weights["model.0.conv.weight"].dtype == mx.float16
    assert np.array_equal(np.array(weights["model.0.conv.weight"]), values)
    assert names == {0: "person", 1: "bicycle"}


def test_the_averaged_weights_win(torch, tmp_path):
    def holding(number):
        return module(torch, weight=Tensor(np.array([number], np.float32), "FloatStorage"))

    path = save(tmp_path / "a.pt", {"model": holding(1), "ema": holding(2)}, torch)
    assert torch_file.read(path)[0]["weight"].tolist() == [2]


def test_reads_a_plain_state_dict_with_views_and_bfloat16(torch, tmp_path):
    base = np.arange(12, dtype=np.float32)
    turned = Tensor(base, "FloatStorage", stride=(1, 3), offset=2, shape=(3, 3))
    half = np.array([1.5, -2], np.float32).view(np.uint32) >> 16
    tree = {"state_dict": {"a": turned, "b": Tensor(half.astype(np.uint16), "BFloat16Storage")}}
    weights, names = torch_file.read(save(tmp_path / "a.pt", tree, torch))
    assert weights["a"].tolist() == [[2, 5, 8], [3, 6, 9], [4, 7, 10]]
    assert weights["b"].dtype == mx.bfloat16
    assert weights["b"].tolist() == [1.5, -2]
    assert names is None


def test_what_checkpoints_hold_beside_weights_is_passed_over(torch, tmp_path):
    conv = module(torch, weight=Tensor(np.array([1], np.float32), "FloatStorage"))
    conv.hook = conv.__init__  # a bound method
    beside = {
        "date": "2026",
        "fitness": np.float64(0.4),
        "path": Path("runs"),
        "shapes": {(1, 2), (3, 4)},
        "history": np.arange(3),
        "blob": b"bytes",
    }
    path = save(tmp_path / "a.pt", {"model": conv, "optimizer": None, **beside}, torch)
    assert torch_file.read(path)[0]["weight"].tolist() == [1]


class Attack:
    """Unpickling it makes a file, if anything is run at all."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("function", ["os.mkdir", "builtins.eval", "shutil.copy", "runpy.run_path"])
def test_a_pickle_with_code_is_refused_and_nothing_runs(torch, tmp_path, function):
    import importlib

    owner, _, name = function.rpartition(".")
    victim = tmp_path / "made"
    argument = f"__import__('os').mkdir({str(victim)!r})" if name == "eval" else str(victim)
    call = getattr(importlib.import_module(owner), name)
    path = save(tmp_path / "a.pt", {"model": Attack(call, argument)}, torch)
    with pytest.raises(InputError, match=rf"asks for \w+\.{name} .* nothing was run"):
        torch_file.read(path)
    assert not victim.exists()


def test_names_below_torch_are_never_imported(torch, tmp_path):
    # A class named inside torch that does not exist would fail to import; here it is a record.
    conv = module(torch, weight=Tensor(np.array([1], np.float32), "FloatStorage"))
    path = save(tmp_path / "a.pt", {"model": conv}, torch)
    for name in list(torch):
        del sys.modules[name]
    weights, _ = torch_file.read(path)
    assert "torch" not in sys.modules
    assert weights["weight"].tolist() == [1]


def test_truncated_and_foreign_files_are_refused(torch, tmp_path):
    tree = {"a": Tensor(np.zeros(100, np.float32), "FloatStorage")}
    whole = save(tmp_path / "whole.pt", tree, torch).read_bytes()
    for name, data in {
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"not a checkpoint",
        "pickle": pickle.dumps({"a": 1}),
    }.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(data)
        with pytest.raises(InputError, match="is not a whole PyTorch file"):
            torch_file.read(path)
    short = save(tmp_path / "short.pt", tree, torch, damage=lambda data: data[:-4])
    with pytest.raises(InputError, match="not a whole PyTorch file"):
        torch_file.read(short)


def test_a_tensor_may_not_reach_beyond_its_data(torch, tmp_path):
    inside = Tensor(np.zeros(10, np.float32), "FloatStorage", stride=(1,), shape=(11,))
    with pytest.raises(InputError, match="not a whole PyTorch file"):
        torch_file.read(save(tmp_path / "a.pt", {"a": inside}, torch))
    backwards = Tensor(np.zeros(10, np.float32), "FloatStorage", stride=(-1,), shape=(2,), offset=5)
    with pytest.raises(InputError, match="not a whole PyTorch file"):
        torch_file.read(save(tmp_path / "b.pt", {"a": backwards}, torch))


def test_a_file_without_weights_is_refused(torch, tmp_path):
    with pytest.raises(InputError, match="holds no weights"):
        torch_file.read(save(tmp_path / "a.pt", {"model": {}}, torch))
