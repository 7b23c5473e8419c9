"""Rows of local files, one at a time, each with the place it came from.

Files are read in sorted order and never held whole: compressed ones are unpacked as they are
read, parquet goes by row groups. A text file holds one document per block of lines between
blank lines.
"""

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import zstandard

from probe.errors import BatchError

MAX_BLOCK_CHARS = 1 << 20  # a text file without blank lines is cut at the line end after this
PARQUET_ROWS = 256
JSON_SUFFIXES = (".jsonl", ".json")  # .json as C4 uses it: one object per line
Opener = Callable[[Path], IO[bytes]]
SUPPORTED = ".jsonl, .json (one object per line), .txt, each plain, .gz or .zst; and .parquet"


@dataclass(frozen=True, slots=True)
class Row:
    """One record and where it stands, for messages."""

    fields: dict[str, Any]
    place: str  # `file, line 7`


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and globs name, sorted, each once.

    Args:
        patterns: Paths or globs (`*`, `?`, `[...]`, `**`); `~` is expanded.

    Raises:
        BatchError: A pattern matches no file; the message lists what is near it.
    """
    found: set[Path] = set()
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        names = [expanded] if os.path.isfile(expanded) else glob.glob(expanded, recursive=True)
        files = [Path(name) for name in names if os.path.isfile(name)]
        if not files:
            raise BatchError(f"{pattern}: no such file; {_what_is_near(Path(expanded))}")
        found.update(files)
    return sorted(found)


def read_rows(path: Path, text_field: str, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of one file.

    Args:
        path: Its suffix decides the format.
        text_field: The field under which a block of a text file is handed on.
        columns: The fields wanted; only these are read from parquet.

    Yields:
        One row per line, block or record.

    Raises:
        BatchError: The format is unknown, or the file is broken; names file and line.
    """
    name = path.name.lower()
    opener: Opener = _open_plain
    for suffix, unpack in UNPACK.items():
        if name.endswith(suffix):
            name, opener = name.removesuffix(suffix), unpack
    if name.endswith(JSON_SUFFIXES):
        yield from _json_lines(path, _lines(path, opener))
    elif name.endswith(".txt"):
        yield from _text_blocks(path, _lines(path, opener), text_field)
    elif name.endswith(".parquet") and opener is _open_plain:
        yield from _parquet_rows(path, columns)
    else:
        raise BatchError(f"{path}: unknown format; expected {SUPPORTED}")


def _open_plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def _open_gz(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb"))


def _open_zst(path: Path) -> IO[bytes]:
    return io.BufferedReader(zstandard.open(path, "rb"))


UNPACK: dict[str, Opener] = {".gz": _open_gz, ".zst": _open_zst}


def _lines(path: Path, opener: Opener) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with opener(path) as stream:
            for number, raw in enumerate(stream, start=1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise BatchError(f"{path}, line {number}: not UTF-8: {error.reason}") from error
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise BatchError(f"{path}, after line {number}: cannot be read: {error}") from error


def _json_lines(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    for number, line in lines:
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise BatchError(f"{place}: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise BatchError(f"{place}: expected a JSON object, found {type(fields).__name__}")
        yield Row(fields, place)


def _text_blocks(path: Path, lines: Iterator[tuple[int, str]], field: str) -> Iterator[Row]:
    block: list[str] = []
    first, num_chars = 1, 0
    for number, line in lines:
        if line.strip():
            if not block:
                first = number
            block.append(line)
            num_chars += len(line)
        if block and (not line.strip() or num_chars > MAX_BLOCK_CHARS):
            yield Row({field: "".join(block).rstrip("\r\n")}, f"{path}, line {first}")
            block, num_chars = [], 0
    if block:
        yield Row({field: "".join(block).rstrip("\r\n")}, f"{path}, line {first}")


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            wanted = [name for name in columns if name in table.schema_arrow.names]
            if len(wanted) < len(columns):
                wanted = table.schema_arrow.names  # so that the message lists what is there
            for records in table.iter_batches(batch_size=PARQUET_ROWS, columns=wanted):
                for fields in records.to_pylist():
                    number += 1
                    yield Row(fields, f"{path}, row {number}")
    except (OSError, pyarrow.ArrowException) as error:
        raise BatchError(f"{path}, after row {number}: not readable: {error}") from error


def _what_is_near(path: Path) -> str:
    """The nearest existing directory above a path that matched nothing, and some of its names."""
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    names = sorted(entry.name for entry in parent.iterdir())
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{parent} holds {shown or 'nothing'}"
