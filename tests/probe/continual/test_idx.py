"""IDX files, built here byte by byte from the format's description."""

import gzip
import struct
from functools import partial

import numpy as np
import pytest

from probe.continual.idx import read_idx
from probe.errors import BatchError

# Without the time, which would be in the names of tests: each process has to find the same.
gzipped = partial(gzip.compress, mtime=0)


def idx_bytes(code: int, sizes: tuple[int, ...], content: bytes) -> bytes:
    return bytes([0, 0, code, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + content


@pytest.mark.parametrize(
    ("code", "letter", "values"),
    [
        (0x08, "B", [0, 1, 127, 128, 254, 255]),
        (0x09, "b", [-128, -1, 0, 1, 2, 127]),
        (0x0B, "h", [-32768, -2, 0, 1, 258, 32767]),
        (0x0C, "i", [-(2**31), -2, 0, 1, 66051, 2**31 - 1]),
        (0x0D, "f", [-1.5, 0.0, 0.25, 1.0, 2.0, 1e10]),
        (0x0E, "d", [-1.5, 0.0, 0.1, 1.0, 2.0, 1e300]),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzipped"])
def test_every_type_of_number_in_big_endian_order(tmp_path, code, letter, values, pack):
    path = tmp_path / "numbers"  # no suffix: the first bytes decide
    path.write_bytes(pack(idx_bytes(code, (2, 3), struct.pack(f">6{letter}", *values))))
    array = read_idx(path)
    expected = np.array(values).reshape(2, 3)  # the last dimension is the fastest
    if letter == "f":
        expected = expected.astype(np.float32)
    assert array.dtype.isnative
    assert array.tolist() == expected.tolist()


GOOD = idx_bytes(0x08, (2, 2, 2), bytes(range(8)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "4 bytes were announced at this place, 0 are there"),
        (b"\x89PNG" + GOOD, "is no IDX file: it begins with 89 50 4e 47, expected 00 00"),
        (idx_bytes(0x0A, (1,), b"\0"), "begins with 00 00 0a 01"),
        (b"\0\0\x08\0", "begins with 00 00 08 00"),
        (GOOD[:10], "is cut off: 12 bytes were announced at this place, 6 are there"),
        (GOOD[:-1], "is cut off: 8 bytes were announced at this place, 7 are there"),
        (GOOD + b"\0", r"is longer than it says: its sizes are \[2, 2, 2\] of 1 bytes"),
        # 2^96 bytes announced: the file's own 8 are all that may be given memory
        (idx_bytes(0x08, (2**32 - 1,) * 3, bytes(8)), "announced at this place, 8 are there"),
        (gzipped(GOOD)[:-9], "cannot be read"),
        (gzipped(GOOD[:-1]), "is cut off: 8 bytes"),
        (gzipped(GOOD)[:10] + b"\xff" * 20, "cannot be read"),
    ],
)
def test_broken_files_say_what_was_found(tmp_path, content, message):
    path = tmp_path / "train-images"
    path.write_bytes(content)
    with pytest.raises(BatchError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BatchError, match="gone cannot be read: No such file"):
        read_idx(tmp_path / "gone")
