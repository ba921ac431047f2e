"""Reads a PyTorch ``.pt`` file without PyTorch, and without running any of its code.

Such a file is a zip archive: ``data.pkl`` pickles the object tree, and each tensor's bytes lie in
an entry of their own. A pickle may name any function of any module and have it called. Here no name
is ever imported: tensors are rebuilt by this module, classes of PyTorch and Ultralytics become
inert records, and any other name is refused.
Format: the pickle protocol, and torch.save's zip layout (``data.pkl``, ``data/<key>``).
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import InputError

#: PyTorch's storage classes -> numpy type.
STORAGES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": np.uint16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}

#: Packages whose classes become inert records.
RECORDED = ("torch", "ultralytics", "models")

#: Harmless names of the standard library and numpy's scalars -> what stands for them.
PLAIN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): lambda *_: {},
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "slice"): slice,
    ("builtins", "complex"): complex,
    ("builtins", "bytearray"): bytearray,
    ("__builtin__", "set"): set,
}

#: Paths, dates, numbers and bound methods: kept as records, they carry nothing we need.
RECORDED_NAMES = {
    ("_codecs", "encode"),
    ("builtins", "getattr"),
    ("__builtin__", "getattr"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    ("datetime", "datetime"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("types", "SimpleNamespace"),
    ("argparse", "Namespace"),
}


class Record(dict):
    """Stands for an object of a class that is never imported; its state lies in ``state``."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        self.state: Any = {}

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Keys and members of sets."""
        return id(self)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> "Record":
        """Functions and bound methods."""
        return Record()

    def append(self, item: Any) -> None:
        """Lists that were subclassed."""

    def extend(self, items: Any) -> None:
        """Lists that were subclassed."""

    def add(self, item: Any) -> None:
        """Sets that were subclassed."""


class _Refused(pickle.UnpicklingError):
    pass


class _Reader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")), encoding="utf-8")
        self.archive, self.root = archive, root
        self.storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _tensor
        if module == "torch._utils" and name.startswith("_rebuild_parameter"):
            return lambda data, *_: data
        if module in ("torch", "torch.storage") and name in STORAGES:
            return name
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        if module.partition(".")[0] in RECORDED or (module, name) in RECORDED_NAMES:
            return type(name.rpartition(".")[2], (Record,), {})
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[str, np.ndarray]:
        kind, storage, key, _, size = pid[:5]
        if kind != "storage" or storage not in STORAGES or not str(key).isalnum():
            raise _Refused(f"storage {storage!s:.40}")
        if key not in self.storages:
            data = np.frombuffer(self.archive.read(f"{self.root}data/{key}"), STORAGES[storage])
            if data.size != size:
                raise EOFError(f"tensor data {key} has {data.size} of {size} elements")
            self.storages[key] = data
        return storage, self.storages[key]


def _tensor(storage: tuple, offset: int, shape: tuple, stride: tuple, *_: Any) -> mx.array:
    kind, data = storage
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if min(shape, default=1) > 0 and not 0 <= offset <= last < data.size:
        raise EOFError("a tensor reaches beyond its data")
    if any(s < 0 for s in stride):
        raise EOFError("a tensor has a negative stride")
    strides = [s * data.itemsize for s in stride]
    view = np.lib.stride_tricks.as_strided(data[offset:], shape, strides)
    view = np.ascontiguousarray(view).reshape(shape)
    if kind == "BFloat16Storage":
        return mx.array(view).view(mx.bfloat16)
    return mx.array(view.astype(np.float32) if view.dtype == np.float64 else view)


def read(path: Path) -> tuple[dict[str, mx.array], dict[int, str] | None]:
    """Read the tensors of a checkpoint.

    Args:
        path: A file of ``torch.save``: an Ultralytics checkpoint, or a plain state dict.

    Returns:
        Tensors by Ultralytics' names (the averaged ones where the file has both), and the class
        names if it has them.

    Raises:
        InputError: Not such a file, truncated, or it asks for code to be run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next(n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl")
            tree = _Reader(archive, entry[: -len("data.pkl")]).load()
    except _Refused as error:
        raise InputError(
            f"{path} asks for {error} while it is read: no YOLO checkpoint needs that, and nothing "
            "was run. Save its weights as .safetensors with a tool that you trust"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # damaged pickles fail in every way there is
        raise InputError(
            f"{path} is not a whole PyTorch file of torch.save's zip format "
            f"({type(error).__name__}): download it again, or save it as .safetensors"
        ) from error
    model = tree
    if isinstance(tree, Mapping):
        averaged = tree.get("ema")
        model = averaged if averaged is not None else tree.get("model", tree)
        model = model if model is not tree else tree.get("state_dict", tree)
    weights: dict[str, mx.array] = {}
    names = None
    if isinstance(model, Record):
        _collect(model, "", weights, depth=0)
        names = model.state.get("names") if isinstance(model.state, dict) else None
    elif isinstance(model, Mapping):
        weights = {str(k): v for k, v in model.items() if isinstance(v, mx.array)}
    if not weights:
        raise InputError(f"{path} holds no weights: give a YOLO26 checkpoint of Ultralytics")
    return weights, class_names(names)


def class_names(names: Any) -> dict[int, str] | None:
    """Class names as a dict of index to name, or None if they are anything else."""
    pairs = list(enumerate(names)) if isinstance(names, list | tuple) else None
    if isinstance(names, Mapping) and not isinstance(names, Record):
        pairs = list(names.items())
    if not pairs or not all(isinstance(k, int) and isinstance(v, str) for k, v in pairs):
        return None
    return dict(pairs)


def _collect(module: Record, prefix: str, into: dict[str, mx.array], depth: int) -> None:
    """The state dict of a pickled ``torch.nn.Module``."""
    state = module.state if isinstance(module.state, dict) else {}
    for field in ("_parameters", "_buffers"):
        for name, value in (state.get(field) or {}).items():
            if isinstance(value, mx.array):
                into[prefix + name] = value
    for name, child in (state.get("_modules") or {}).items():
        if isinstance(child, Record) and depth < 64:
            _collect(child, f"{prefix}{name}.", into, depth + 1)
