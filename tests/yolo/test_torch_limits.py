"""Files in PyTorch's form that are made to hang, crash or fill the memory of who reads them."""

import io
import pickle
import resource
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.yolo.reading import torch_file

GLOBAL_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\4tQ"


def tensor(shape: bytes, stride: bytes, offset: bytes = b"K\0") -> bytes:
    """A state dict with one view of four floats."""
    made = GLOBAL_TENSOR + b"(" + STORAGE + offset + shape + stride + b"\x89}tR"
    return b"\x80\2}X\1\0\0\0a" + made + b"s."


def archive(path, pickled: bytes, *, method=zipfile.ZIP_STORED, data=bytes(16)):
    with zipfile.ZipFile(path, "w", method) as stream:
        stream.writestr("a/data.pkl", pickled)
        stream.writestr("a/data/0", data)
    return path


def test_the_smallest_whole_file_reads(tmp_path):
    path = archive(tmp_path / "a.pt", tensor(b"K\2K\2\x86", b"K\1K\2\x86"))
    assert torch_file.read(path)[0]["a"].shape == (2, 2)


BOMBS = {
    "lists within lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "tuples within tuples": b"\x80\2)" + b"\x85" * 200_000 + b".",
    "marks without end": b"(" * 200_000 + b".",
    "a key whose hash takes forever": b"\x80\2})" + b"q\0h\0\x86" * 60 + b"Ns.",
    "a memo of two billion": b"\x80\2Nr\xff\xff\xff\x7f.",
    "an integer of a gigabyte": b"\x80\2\x8b\0\0\0\x40.",
    "a string of 16 EB": b"\x80\2\x8d" + b"\xff" * 8 + b".",
    "a string of a gigabyte": b"\x80\2X\0\0\0\x40.",
    "a byte array of a gigabyte": b"\x80\5\x96" + struct.pack("<Q", 1 << 30) + b".",
    "a frame of a gigabyte": b"\x80\4\x95" + struct.pack("<Q", 1 << 30) + b"N.",
    "a text integer": b"I" + b"9" * 100_000 + b"\n.",
    "an endless name": b"c" + b"a" * 1_000_000,
    "an object without its class": b"\x80\2N)\x81.",
    "a call of a string": b"\x80\2X\1\0\0\0a)R.",
    "an opcode without operands": b"\x80\2R.",
    "a reference to nothing": b"\x80\2h\7.",
    "an extension": b"\x80\2\x82\1.",
    "more opcodes than any file": b"\x80\2" + b"N0" * 600_000 + b"N.",
    "nothing": b"",
}
VIEWS = {
    "a view of 4 GB with strides of 0": (b"J\0\0\0\x40\x85", b"K\0\x85"),
    "a view of 2^60 elements": (b"J\0\0\0\x40J\0\0\0\x40\x86", b"K\0K\0\x86"),
    "a shape of 2^2000": (b"\x8a\xff" + b"\xff" * 254 + b"\7\x85", b"K\1\x85"),
    "a negative side": (b"J\xff\xff\xff\xff\x85", b"K\1\x85"),
    "a negative stride": (b"K\2\x85", b"J\xff\xff\xff\xff\x85"),
    "an empty view of 2^60 by 0": (b"\x8a\x08" + b"\0" * 7 + b"\x10K\0\x86", b"K\1K\1\x86"),
    "fewer strides than sides": (b"K\2K\2\x86", b"K\1\x85"),
    "a shape of strings": (b"X\1\0\0\0a\x85", b"K\1\x85"),
    "a list for a shape": (b"]", b"]"),
    "more sides than any tensor": (b"(" + b"K\1" * 60 + b"t", b"(" + b"K\1" * 60 + b"t"),
}


@pytest.mark.parametrize(
    "pickled", [*BOMBS.values(), *(tensor(*view) for view in VIEWS.values())], ids=[*BOMBS, *VIEWS]
)
def test_a_bomb_is_refused_at_once(tmp_path, pickled):
    path = archive(tmp_path / "a.pt", pickled)
    begin, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"not a whole PyTorch file|holds no weights"):
        torch_file.read(path)
    assert time.process_time() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 256 * scale()


def scale() -> int:
    """Units of ``ru_maxrss`` in a megabyte."""
    return 1 << 20 if sys.platform == "darwin" else 1 << 10


def test_modules_that_contain_each_other_end(tmp_path):
    # Each of 60 modules holds the next one twice: 2^60 paths.
    begin = b"\x80\2N0ctorch.nn\nModule\n)\x81q\0"
    link = b"ctorch.nn\nModule\n)\x81}X\x08\0\0\0_modules}(X\1\0\0\0ah\0X\1\0\0\0bh\0usbq\0"
    path = archive(tmp_path / "a.pt", begin + link * 60 + b".")
    started = time.process_time()
    with pytest.raises(InputError, match="contain each other"):
        torch_file.read(path)
    assert time.process_time() - started < 2


def test_compressed_entries_are_refused_unread(tmp_path):
    whole = tensor(b"K\2\x85", b"K\1\x85")
    path = archive(tmp_path / "a.pt", whole, method=zipfile.ZIP_DEFLATED, data=bytes(200 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(InputError, match="compressed"):
        torch_file.read(path)


def test_storages_are_compared_with_their_pickle_before_they_are_read(tmp_path):
    path = archive(tmp_path / "a.pt", tensor(b"K\2\x85", b"K\1\x85"), data=bytes(4 << 20))
    with pytest.raises(InputError, match="has another size than the pickle says"):
        torch_file.read(path)


def test_many_views_of_one_storage_are_bounded_together(tmp_path):
    data = np.zeros(1 << 20, np.float32).tobytes()
    storage = STORAGE.replace(b"K\4t", b"J\0\0\x10\0t") + b"q\0"
    view = GLOBAL_TENSOR + b"(h\0K\0J\0\0\x10\0\x85K\1\x85\x89}tR"
    items = b"".join(b"X\4\0\0\0%04d" % n + view for n in range(1000))
    path = archive(tmp_path / "a.pt", b"\x80\2" + storage + b"0}(" + items + b"u.", data=data)
    with pytest.raises(InputError, match="larger than the file"):
        torch_file.read(path)


def directory(path, change) -> None:
    """Change the fields of the second entry in the zip directory."""
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\1\2")
    change(content, at)
    path.write_bytes(content)


DIRECTORIES = {
    "overlap": lambda c, at: struct.pack_into("<I", c, at + 42, 0),
    "size": lambda c, at: struct.pack_into("<2I", c, at + 20, 1 << 30, 1 << 30),
    "other sizes": lambda c, at: struct.pack_into("<I", c, at + 24, 1 << 30),
    "checksum": lambda c, at: struct.pack_into("<I", c, at + 16, 1),
    "zip64 without sizes": lambda c, at: struct.pack_into("<I", c, at + 42, 0xFFFFFFFF),
    "names": lambda c, at: struct.pack_into("<H", c, at + 28, 0xFFFF),
    "count": lambda c, at: struct.pack_into("<H", c, len(c) - 12, 0xFFFF),
    "start": lambda c, at: struct.pack_into("<I", c, len(c) - 6, 0),
    "no end": lambda c, at: c.__delitem__(slice(len(c) - 22, None)),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_false_zip_directory_is_refused(tmp_path, name):
    path = archive(tmp_path / "a.pt", tensor(b"K\2\x85", b"K\1\x85"))
    directory(path, DIRECTORIES[name])
    with pytest.raises(InputError, match="not a whole PyTorch file"):
        torch_file.read(path)


def test_zip64_ends_and_data_descriptors_read_as_pytorch_writes_them(tmp_path):
    class Unseekable(io.RawIOBase):
        def __init__(self):
            self.content = bytearray()

        def writable(self):
            return True

        def write(self, data):
            self.content += data
            return len(data)

    stream = Unseekable()
    with zipfile.ZipFile(stream, "w") as written:  # sizes follow the data
        written.writestr("a/data.pkl", tensor(b"K\4\x85", b"K\1\x85"))
        written.writestr("a/data/0", np.arange(4, dtype=np.float32).tobytes())
    plain = bytes(stream.content)
    count, size, start = struct.unpack_from("<H2I", plain, len(plain) - 12)
    end = len(plain) - 22
    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    path = tmp_path / "a.pt"
    path.write_bytes(plain[:end] + wide + locator + plain[end:])
    assert torch_file.read(path)[0]["a"].tolist() == [0, 1, 2, 3]


def test_pickle_is_never_loaded(tmp_path):
    path = archive(tmp_path / "a.pt", tensor(b"K\2\x85", b"K\1\x85"))
    program = (
        "import pickle, sys\n"
        "pickle.loads = pickle.load = pickle.Unpickler = None\n"
        "from mlx_optiq_ext.yolo.reading import torch_file\n"
        "from pathlib import Path\n"
        "print(len(torch_file.read(Path(sys.argv[1]))[0]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1"


def test_every_protocol_of_pickle_reads(tmp_path):
    beside = {"a": [1, 2.5, None, True, -3, 1 << 40], "b": (b"x", "é"), "c": {1, 2}, "d": {}}
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        path = archive(tmp_path / f"{protocol}.pt", pickle.dumps(beside, protocol))
        with pytest.raises(InputError, match="holds no weights"):
            torch_file.read(path)
