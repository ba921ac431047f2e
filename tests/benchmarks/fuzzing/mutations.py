"""Seeded damage to valid files: to their bytes, and to what JSON, zip and pickle mean by them."""

import io
import json
import pickletools
import random
import zipfile
from collections.abc import Callable
from typing import Any

#: Values that a field is replaced with.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 8, 16, 255, 2**31, 2**63, -(2**63), 10**30, 10**39),
    *(0.5, -0.0, 4.0, 1e-320, 1e300, float("nan"), float("inf"), -float("inf")),
    *(
        "",
        "a",
        "8",
        "\0",
        "\ud800",
        "..",
        "/etc/passwd",
        "é" * 300,
        "(a+)+$",
        ".*" * 40,
        "a" * 5000,
    ),
    *([], {}, [[]], [None], ["a"], [1, 2, 3], {"a": 1}, {"": {}}, [[1] * 50] * 50),
)
#: Text that a piece of JSON is replaced with, and that is none.
RAW = (
    *("NaN", "-Infinity", "1e999", "9" * 5000, "-", "01", "[" * 3000, '{"a":' * 3000),
    *('"', "'a'", "//", r'"\ud800"', r'"\x"', "\ufeff", "0." + "1" * 5000, '{"a":1,"a":2}'),
)
#: Pickle that asks for something, or stands for more than it is.
HOSTILE = (
    *(b"cos\nsystem\nX\4\0\0\0true\x85R", b"cbuiltins\neval\nX\1\0\0\0001\x85R"),
    *(
        b"\x8c\5posix\x8c\6system\x93",
        b"}q\0",
        b"h\0",
        b"(((((",
        b"\x85" * 300,
        b")q\1h\1h\1\x86q\1",
    ),
    *(b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"r\xff\xff\xff\xff", b"N0" * 99),
    *(
        b"\x8d" + b"\xff" * 8,
        b"X\0\0\0\x40",
        b"\x96\0\0\0\0\1\0\0\0",
        b"Q",
        b"R",
        b"b",
        b"\x81",
        b"t",
    ),
)


def of_bytes(draw: random.Random, content: bytes) -> bytes:
    """Flip, cut, repeat, move, insert or overwrite bytes."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        if not data:
            return bytes(data)
        at = draw.randrange(len(data))
        size = draw.choice((1, 2, 4, 8, 64, len(data) // 2 + 1))
        other = draw.randrange(len(data))
        match draw.randrange(7):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = data[other : other + size]
            case 4:
                data[at : at + size] = data[other : other + size]
            case 5:
                data[at:at] = draw.randbytes(size % 65)
            case _:
                data[at : at + size % 9] = draw.choice((b"\xff", b"\0")) * (size % 9)
    return bytes(data)


def of_json(draw: random.Random, content: bytes) -> bytes:
    """Change one or a few places of a document, or its text."""
    if draw.random() < 0.2:
        return of_bytes(draw, content)
    value = json.loads(content)
    marks: dict[str, str] = {}
    for _ in range(draw.choice((1, 1, 2, 4))):
        value = _changed(draw, value, marks)
    text = json.dumps(value)
    for mark, raw in marks.items():
        text = text.replace(json.dumps(mark), raw)
    return text.encode("utf-8", "surrogatepass")


def _changed(draw: random.Random, value: Any, marks: dict[str, str]) -> Any:
    places = list(_places(value)) if isinstance(value, dict | list) else []
    if not places:
        return draw.choice(ODD)
    holder, key = draw.choice(places)
    kind = draw.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice(("", "a", key + "x", key.upper(), "\ud800", "0", "__metadata__"))] = (
            holder.pop(key)
        )
    elif kind == 2:
        other, there = draw.choice(places)
        holder[key] = json.loads(json.dumps(other[there]))
    elif kind in (3, 4):
        mark = f"raw {len(marks)} {draw.random()}"
        marks[mark] = draw.choice(RAW)
        if kind == 3 and isinstance(holder, dict):
            # The same key again.
            marks[mark] = f"0,{json.dumps(key)}:1"
        holder[key] = mark
    elif kind == 5 and isinstance(holder[key], int | float):
        holder[key] = draw.choice((-1, 0.5, 2, 10, 2**16, 2**40, 1e30)) * holder[key]
    else:
        holder[key] = json.loads(json.dumps(draw.choice(ODD)))
    return value


def _places(value: Any) -> Any:
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        keys = holder.keys() if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            yield holder, key
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])


def of_lines(draw: random.Random, content: bytes) -> bytes:
    """Change a line of JSON, or the lines' order."""
    lines = content.split(b"\n")
    at = draw.randrange(len(lines))
    if draw.random() < 0.2 or not lines[at]:
        return of_bytes(draw, content)
    lines[at] = of_json(draw, lines[at])
    return b"\n".join(lines)


def of_safetensors(draw: random.Random, content: bytes) -> bytes:
    """Change the header, its length, or any byte."""
    length = int.from_bytes(content[:8], "little")
    match draw.randrange(6):
        case 0:
            return of_bytes(draw, content)
        case 1:
            length = draw.choice((0, 1, length - 1, length + 1, 2**31, 2**63, len(content)))
            return length.to_bytes(8, "little") + content[8:]
        case 2:
            return content[: draw.randrange(len(content))]
        case _:
            header = of_json(draw, content[8 : 8 + length])
            return len(header).to_bytes(8, "little") + header + content[8 + length :]


def of_pickle(draw: random.Random, content: bytes) -> bytes:
    """Drop, repeat, move or insert opcodes, or change bytes."""
    if draw.random() < 0.3:
        return of_bytes(draw, content)
    places = [at for _, _, at in pickletools.genops(content) if at is not None]
    codes = [content[a:b] for a, b in zip(places, [*places[1:], len(content)], strict=True)]
    for _ in range(draw.choice((1, 1, 2, 6))):
        at, other = draw.randrange(len(codes)), draw.randrange(len(codes))
        match draw.randrange(6):
            case 0:
                del codes[at : at + draw.choice((1, 3, 20))]
            case 1:
                codes[at:at] = codes[other : other + draw.choice((1, 5, 50))]
            case 2:
                codes[at], codes[other] = codes[other], codes[at]
            case 3:
                codes[at] = of_bytes(draw, codes[at])
            case _:
                codes[at:at] = [draw.choice(HOSTILE)] * draw.choice((1, 1, 1, 100))
        codes = codes or [b"."]
    return b"".join(codes)


def of_zip(inner: Callable[[random.Random, str, bytes], bytes]) -> Any:
    """Change an entry of an archive with ``inner``, its compression, or any byte of the file."""

    def mutate(draw: random.Random, content: bytes) -> bytes:
        if draw.random() < 0.4:
            return of_bytes(draw, content)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
        at = draw.randrange(len(entries)) if draw.random() < 0.4 else 0
        name, data = entries[at]
        entries[at] = draw.choice((name, name, name, "", "x")), inner(draw, name, data)
        if draw.random() < 0.1:
            entries.append(draw.choice(entries))
        method = draw.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", method) as archive:
            for name, data in entries:
                archive.writestr(zipfile.ZipInfo(name), data, method)
        written = stream.getvalue()
        return of_bytes(draw, written) if draw.random() < 0.1 else written

    return mutate


def torch_entry(draw: random.Random, name: str, data: bytes) -> bytes:
    """An entry of a PyTorch file."""
    return of_pickle(draw, data) if name.endswith("data.pkl") else of_bytes(draw, data)


def numpy_entry(draw: random.Random, _: str, data: bytes) -> bytes:
    """An entry of a NumPy archive: mostly its header."""
    return of_bytes(draw, data[:128]) + data[128:] if draw.random() < 0.8 else of_bytes(draw, data)


MUTATIONS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": of_json,
    ".jsonl": of_lines,
    ".safetensors": of_safetensors,
    ".pt": of_zip(torch_entry),
    ".npz": of_zip(numpy_entry),
}
