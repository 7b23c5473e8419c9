"""MNIST's own file format, IDX: a type, sizes and numbers in big-endian order (torch-free).

Four bytes (0, 0, type of the numbers, number of dimensions), one unsigned 32-bit size per
dimension, then the numbers, last dimension fastest.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from probe.errors import BatchError

ELEMENT_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 20


def read_idx(path: Path) -> NDArray[Any]:
    """The array of one IDX file, in this machine's byte order.

    Args:
        path: Plain or gzipped; the first bytes decide, not the name.

    Raises:
        BatchError: The file is missing, is no IDX file, is cut off, or is longer than it says.
    """
    try:
        with path.open("rb") as raw:
            is_packed = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if is_packed else raw
            return _read_array(stream, path)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise BatchError(f"{path} cannot be read: {reason}") from error


def _read_array(stream: IO[bytes], path: Path) -> NDArray[Any]:
    magic = _read_exactly(stream, 4, path)
    if magic[:2] != b"\0\0" or magic[2] not in ELEMENT_TYPES or magic[3] == 0:
        known = ", ".join(f"{code:02x}" for code in ELEMENT_TYPES)
        raise BatchError(
            f"{path} is no IDX file: it begins with {magic.hex(' ')}, expected 00 00, a type "
            f"({known}) and the number of dimensions; MNIST's images begin with 00 00 08 03"
        )
    sizes = np.frombuffer(_read_exactly(stream, 4 * magic[3], path), ">u4").tolist()
    dtype = np.dtype(ELEMENT_TYPES[magic[2]])
    content = _read_exactly(stream, math.prod(sizes) * dtype.itemsize, path)
    if stream.read(1):
        raise BatchError(
            f"{path} is longer than it says: its sizes are {sizes} of {dtype.itemsize} bytes, and "
            "more follows; download it again"
        )
    return np.frombuffer(content, dtype).reshape(sizes).astype(dtype.newbyteorder("="))


def _read_exactly(stream: IO[bytes], num_bytes: int, path: Path) -> bytes:
    """In small reads: a broken file may announce any size, and must not be given memory for it."""
    content = bytearray()
    while len(content) < num_bytes:
        chunk = stream.read(min(_CHUNK_BYTES, num_bytes - len(content)))
        if not chunk:
            raise BatchError(
                f"{path} is cut off: {num_bytes} bytes were announced at this place, "
                f"{len(content)} are there; download it again"
            )
        content += chunk
    return bytes(content)
