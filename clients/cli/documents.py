"""Read the documents of a text file one by one, for a preview: no torch, no tokenizer.

The engine reads its batches by its own code, which needs torch; a test holds this one to the
same documents.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from clients.cli.conventions import InputError

_PARQUET_ROWS = 256


def read_documents(path: Path, field: str = "text") -> Iterator[dict[str, Any]]:
    """The documents of a file: JSON lines, Parquet rows, or blocks of text between blank lines.

    Args:
        path: .jsonl, .json (one object per line) or .txt, each plain, .gz or .zst; or .parquet.
        field: Key under which a block of a text file is handed on.

    Raises:
        InputError: No such file, another format, or a line that is no JSON object.
    """
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    try:
        if name.endswith(".parquet"):
            yield from _parquet(path)
        elif name.endswith((".jsonl", ".json")):
            with _opened(path) as stream:
                yield from _json_lines(stream, path)
        elif name.endswith(".txt"):
            with _opened(path) as stream:
                yield from ({field: block} for block in _blocks(stream))
        else:
            raise InputError(
                f"{path}: unknown format; expected .jsonl, .json (one object per line) or .txt, "
                "each plain, .gz or .zst; or .parquet"
            )
    except _unreadable(path) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _unreadable(path: Path) -> tuple[type[Exception], ...]:
    """What reading a damaged file of this kind raises."""
    usual = (OSError, UnicodeDecodeError, EOFError, zlib.error)
    if path.suffix != ".zst":
        return usual
    import zstandard

    return (*usual, zstandard.ZstdError)


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    if path.suffix == ".zst":
        import zstandard

        raw: IO[bytes] = zstandard.open(path, "rb")
        return io.TextIOWrapper(raw, encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    block: list[str] = []
    for line in lines:
        if line.strip():
            block.append(line)
        elif block:
            yield "".join(block).rstrip("\r\n")
            block = []
    if block:
        yield "".join(block).rstrip("\r\n")


def _json_lines(stream: IO[str], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path} line {number} is a {type(row).__name__}, not an object")
        yield row


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file: {error}") from error
