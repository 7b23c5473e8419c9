"""What a safetensors file holds, from its header alone (torch-free).

A file is 8 bytes of little-endian header length, that many bytes of JSON, then the tensors.
Reading only the header finds a truncated file, a missing key or a wrong shape in microseconds,
before any process loads a model.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probe.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies in one file."""

    file: Path
    key: str
    dtype: str  # the format's name: F32, BF16, ...
    shape: tuple[int, ...]
    start: int  # absolute byte offset in the file
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file, key -> place, without reading the tensors.

    Args:
        path: The file.

    Returns:
        Key -> place, in the file's order.

    Raises:
        CheckpointError: The file is missing, truncated, or no safetensors file; the message
            names it, what was found and what was expected.

    Cost: one read of the header.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length_bytes = stream.read(8)
            length = int.from_bytes(length_bytes, "little")
            if len(length_bytes) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: no safetensors header; found {size} bytes whose first 8 announce a "
                    f"header of {length}. The file is truncated or another format."
                )
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    entries = _parse(path, raw)
    tensors = {
        key: _tensor(path, key, entry, 8 + length)
        for key, entry in entries.items()
        if key != "__metadata__"
    }
    expected = max((t.start + t.num_bytes for t in tensors.values()), default=8 + length)
    if expected != size:
        raise CheckpointError(
            f"{path}: found {size} bytes, expected {expected} from the header. "
            + ("It is truncated: copy or save it again." if size < expected else "")
        )
    return tensors


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: the safetensors header is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object")
    return entries


def _tensor(path: Path, key: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype = str(entry["dtype"])
        shape = tuple(int(extent) for extent in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: key {key!r} has a malformed header entry: {entry!r}"
        ) from error
    found = end - begin
    expected = math.prod(shape) * ITEM_BYTES.get(dtype, 0)
    if begin < 0 or found < 0 or (dtype in ITEM_BYTES and found != expected):
        raise CheckpointError(
            f"{path}: key {key!r} of shape {list(shape)} and dtype {dtype} spans {found} bytes, "
            f"expected {expected}"
        )
    return StoredTensor(
        file=path,
        key=key,
        dtype=dtype,
        shape=shape,
        start=data_start + begin,
        num_bytes=found,
    )
