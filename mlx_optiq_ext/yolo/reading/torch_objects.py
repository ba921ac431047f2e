"""Objects in a checkpoint's pickle: records, tensors, and names that are never imported.

Sources: torch/_utils.py for the arguments of tensors, torch/serialization.py for their data.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: PyTorch's storage classes -> bytes of an element.
STORAGES = {
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "DoubleStorage": 8,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
}

#: Packages whose classes and functions become inert records.
RECORDED = ("torch", "ultralytics", "models")

#: Containers, paths, dates, numbers and bound methods also become records; they are not needed.
RECORDED_NAMES = {
    ("_codecs", "encode"),
    *((module, "getattr") for module in ("builtins", "__builtin__")),
    *(("builtins", name) for name in ("set", "frozenset", "slice", "complex", "bytearray")),
    ("__builtin__", "set"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    ("datetime", "datetime"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    ("types", "SimpleNamespace"),
    ("argparse", "Namespace"),
}
_DICTIONARIES = {("collections", "OrderedDict"), ("collections", "defaultdict")}
_TENSORS = {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor")}
_PARAMETER = "_rebuild_parameter"

_NAME = re.compile(r"[A-Za-z_][\w.<>]{0,199}", re.ASCII)

#: Most elements of a tensor with repeated data, such as an expanded one.
_REPEATED = 1 << 16


class Damaged(ValueError):
    """The data is not a pickle of torch.save; the text says why."""


class Refused(ValueError):
    """The pickle asks for a function or class that no checkpoint needs; the text is its name."""


@dataclass(frozen=True, eq=False)
class Name:
    """A class or function of another module, which is never imported."""

    module: str
    name: str


class Record:
    """An object of a class that is never imported.

    Attributes:
        state: Its attributes, as far as they are a dict.
    """

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: Mapping[Any, Any] = {}


@dataclass(frozen=True, eq=False)
class Storage:
    """A tensor's data: the archive's entry ``key``, of ``size`` elements."""

    kind: str
    key: str
    size: int

    @property
    def order(self) -> tuple[str, str]:
        """Sort key that puts views of the same elements together."""
        return self.key, self.kind


@dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for side in self.shape:
            count *= side
        return count


def named(module: Any, name: Any) -> Name:
    """Resolve a name that a pickle asks for.

    Raises:
        Damaged: The value is not a name.
        Refused: No checkpoint needs the name.
    """
    if not (isinstance(module, str) and isinstance(name, str)):
        raise Damaged("a name that is no string")
    if not (_NAME.fullmatch(module) and _NAME.fullmatch(name)):
        raise Damaged("a name that no module or class has")
    found = module, name
    if found in _DICTIONARIES or found in RECORDED_NAMES or module.split(".")[0] in RECORDED:
        return Name(module, name)
    raise Refused(f"{module}.{name}")


def is_dict(kind: Name) -> bool:
    """Whether a class is one of the dicts of the standard library."""
    return (kind.module, kind.name) in _DICTIONARIES


def result(called: Name | Record, arguments: tuple[Any, ...]) -> Any:
    """The replacement for a call's result: a tensor, an empty dict, or a record.

    Raises:
        Damaged: A tensor does not fit its data.
    """
    if isinstance(called, Record):  # a bound method
        return Record()
    found = called.module, called.name
    if is_dict(called):
        return {}
    if found in _TENSORS:
        return _tensor(*arguments[:4], *[None] * (4 - len(arguments)))
    if called.module == "torch._utils" and called.name.startswith(_PARAMETER) and arguments:
        return arguments[0]
    return Record()


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> Tensor:
    if not isinstance(storage, Storage) or type(shape) is not tuple or type(stride) is not tuple:
        raise Damaged("a tensor without storage, shape and stride")
    numbers = (offset, *shape, *stride)
    whole = all(type(n) is int and 0 <= n < 1 << 48 for n in numbers)
    if not whole or len(shape) != len(stride) or len(shape) > 8:
        raise Damaged("a tensor of impossible shape or stride")
    tensor = Tensor(storage, offset, shape, stride)
    if not tensor.elements:
        return tensor
    if offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) >= storage.size:
        raise Damaged("a tensor reaches beyond its data")
    if tensor.elements > max(storage.size, _REPEATED):
        raise Damaged("a tensor is larger than its data")
    return tensor


def stored(parts: Any, sizes: Mapping[str, int]) -> Storage:
    """Resolve a persistent id.

    Args:
        parts: ``("storage", type, key, device, elements)``.
        sizes: Key of each storage in the archive -> its bytes.

    Raises:
        Damaged: The id is malformed, or its size is wrong.
    """
    if not isinstance(parts, tuple) or len(parts) < 5 or parts[0] != "storage":
        raise Damaged("a reference to something other than tensor data")
    _, kind, key, _, size = parts[:5]
    known = isinstance(kind, Name) and kind.module in ("torch", "torch.storage")
    if not known or kind.name not in STORAGES:
        raise Damaged("tensor data of an unknown type")
    if not isinstance(key, str) or key not in sizes:
        raise Damaged("tensor data that is not in the file")
    if type(size) is not int or size * STORAGES[kind.name] != sizes[key]:
        raise Damaged(f"tensor data {key:.20} has another size than the pickle says")
    return Storage(kind.name, key, size)
