"""Interprets pickles of torch.save without the pickle module.

A pickle is a program for a small stack machine that may call any function of any module. This
interpreter imports and calls nothing: a few names have a meaning in `torch_objects`, classes of
PyTorch and Ultralytics become inert records, and any other name is refused. It takes one step for
each opcode, never copies earlier results, and stops after `STEPS`.
Format: CPython's Lib/pickletools.py, protocols 2 to 5.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any

from .torch_objects import Damaged, Name, Record, Tensor, is_dict, named, result, stored

#: Most opcodes to execute. A YOLO26x with its optimizer takes some 300,000.
STEPS = 1_000_000


def interpret(data: bytes, sizes: Mapping[str, int]) -> Any:
    """The tree that a pickle describes, of plain values and the classes of this module.

    Args:
        data: The pickle.
        sizes: Key of each storage in the archive -> its bytes.

    Raises:
        Damaged: The data is truncated, not a pickle, uses an opcode that torch.save does not write,
            or has a tensor that does not fit its data.
        Refused: The pickle names other things than classes of PyTorch and Ultralytics.
    """
    machine = _Machine(data, sizes)
    for _ in range(STEPS):
        code = machine.take(1)
        if code == b".":
            return machine.pop()
        action = _ACTIONS.get(code)
        if action is None:
            raise Damaged(f"pickle opcode {code!r}, which torch.save does not write")
        action(machine)
    raise Damaged(f"more than {STEPS:,} pickle opcodes")


class _Machine:
    def __init__(self, data: bytes, sizes: Mapping[str, int]):
        self.data, self.sizes, self.at = data, sizes, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def take(self, count: int) -> bytes:
        found = self.data[self.at : self.at + count]
        if len(found) != count:
            raise Damaged("its pickle is cut off")
        self.at += count
        return found

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self, form: str) -> bytes:
        return self.take(self.number(form))

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 256)
        if end < 0:
            raise Damaged("a name without end")
        text = self.data[self.at : end].decode("ascii", "replace")
        self.at = end + 1
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Damaged("a pickle opcode without its operand")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.push(value)
        return value

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise Damaged("a pickle opcode without its mark")
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def pop_several(self, count: int) -> list[Any]:
        found = [self.pop() for _ in range(count)]
        return found[::-1]

    def keep(self, index: int) -> None:
        self.memo[index] = self.top()

    def kept(self, index: int) -> Any:
        if index not in self.memo:
            raise Damaged("a reference to nothing")
        return self.memo[index]


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Damaged("a string that is not UTF-8") from error


def _integer(machine: _Machine) -> int:
    return int.from_bytes(machine.string("B"), "little", signed=True)


def _reduce(machine: _Machine) -> None:
    arguments, called = machine.pop(), machine.pop()
    if not isinstance(arguments, tuple) or not isinstance(called, Name | Record):
        raise Damaged("a call of what is no function")
    machine.push(result(called, arguments))


def _new(machine: _Machine, operands: int) -> None:
    for _ in range(operands):
        machine.pop()
    kind = machine.pop()
    if not isinstance(kind, Name):
        raise Damaged("an object of what is no class")
    machine.push({} if is_dict(kind) else Record())


def _build(machine: _Machine) -> None:
    state, target = machine.pop(), machine.top()
    if isinstance(target, Record) and isinstance(state, dict):
        target.state = state
    elif not isinstance(target, Record | Tensor | dict):
        raise Damaged("attributes of what has none")


def _append(machine: _Machine, items: list[Any]) -> None:
    target = machine.top()
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Record):
        raise Damaged("items of what is no list")


def _put(machine: _Machine, items: list[Any]) -> None:
    target = machine.top()
    if not isinstance(target, dict | Record) or len(items) % 2:
        raise Damaged("items of what is no dict")
    if isinstance(target, dict):
        _fill(target, items)


def _fill(target: dict, items: list[Any]) -> dict:
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Hashing deeply nested tuples can take forever; no needed key is one.
        if isinstance(key, str) or (isinstance(key, int) and -(2**63) <= key < 2**63):
            target[key] = value
    return target


def _paired(items: list[Any]) -> dict:
    if len(items) % 2:
        raise Damaged("a key without its value")
    return _fill({}, items)


def _global_on_stack(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.push(named(module, name))


#: The supported opcodes. Text pickles, extensions, buffers and instances are not supported.
_ACTIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.take(1),  # PROTO
    b"\x95": lambda m: m.take(8),  # FRAME
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"0": _Machine.pop,
    b"1": _Machine.pop_to_mark,
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.push(_integer(m)),  # LONG1
    b"G": lambda m: m.push(m.number(">d")),
    b"X": lambda m: m.push(_text(m.string("<I"))),
    b"\x8c": lambda m: m.push(_text(m.string("B"))),
    b"\x8d": lambda m: m.push(_text(m.string("<Q"))),
    b"T": lambda m: m.push(m.string("<i")),
    b"U": lambda m: m.push(m.string("B")),
    b"B": lambda m: m.push(m.string("<I")),
    b"C": lambda m: m.push(m.string("B")),
    b"\x8e": lambda m: m.push(m.string("<Q")),
    b"\x96": lambda m: m.push(m.string("<Q")),
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"\x8f": lambda m: m.push(Record()),  # EMPTY_SET
    b"\x85": lambda m: m.push(tuple(m.pop_several(1))),
    b"\x86": lambda m: m.push(tuple(m.pop_several(2))),
    b"\x87": lambda m: m.push(tuple(m.pop_several(3))),
    b"t": lambda m: m.push(tuple(m.pop_to_mark())),
    b"l": lambda m: m.push(m.pop_to_mark()),
    b"d": lambda m: m.push(_paired(m.pop_to_mark())),
    b"\x91": lambda m: (m.pop_to_mark(), m.push(Record())),  # FROZENSET
    b"a": lambda m: _append(m, [m.pop()]),
    b"e": lambda m: _append(m, m.pop_to_mark()),
    b"\x90": lambda m: _append(m, m.pop_to_mark()),  # ADDITEMS
    b"s": lambda m: _put(m, m.pop_several(2)),
    b"u": lambda m: _put(m, m.pop_to_mark()),
    b"q": lambda m: m.keep(m.number("B")),
    b"r": lambda m: m.keep(m.number("<I")),
    b"\x94": lambda m: m.keep(len(m.memo)),  # MEMOIZE
    b"h": lambda m: m.push(m.kept(m.number("B"))),
    b"j": lambda m: m.push(m.kept(m.number("<I"))),
    b"c": lambda m: m.push(named(m.line(), m.line())),
    b"\x93": _global_on_stack,
    b"Q": lambda m: m.push(stored(m.pop(), m.sizes)),
    b"R": _reduce,
    b"b": _build,
    b"\x81": lambda m: _new(m, 1),  # NEWOBJ
    b"\x92": lambda m: _new(m, 2),  # NEWOBJ_EX
}
