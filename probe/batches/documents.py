"""The documents of one data source: filtered, without exact duplicates, shuffled by a seed."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from probe.batches.hub_rows import read_hub_rows
from probe.batches.readers import Row, find_files, read_rows
from probe.batches.tasks import Document, columns_of, to_document
from probe.spec import FileData, HubData, TextFormat

SHUFFLE_DOCUMENTS = 8192
SHUFFLE_CHARS = 1 << 26  # 64 Mi characters; whichever limit comes first


@dataclass(slots=True)
class Tally:
    """What became of the rows read so far."""

    num_rows: int = 0
    num_blank: int = 0
    num_duplicates: int = 0
    num_too_long: int = 0  # questions with answers longer than a sequence
    num_tokens: int = 0

    def __str__(self) -> str:
        """One phrase for messages."""
        return (
            f"{self.num_rows} rows read ({self.num_blank} blank, {self.num_duplicates} exact "
            f"duplicates, {self.num_too_long} longer than a sequence left out), "
            f"{self.num_tokens} tokens"
        )


def read_documents(source: FileData | HubData, seed: int, tally: Tally) -> Iterator[Document]:
    """Documents of a source in the order of the seed, read as they are needed.

    Args:
        source: Files or a hub data set.
        seed: Fixes the order, together with the source's name.
        tally: Counts rows as they are read.

    Yields:
        Each distinct document once.

    Raises:
        BatchError: See `readers`, `hub_rows` and `tasks`.

    Cost: memory for the shuffle buffer, and 16 bytes for every document read.
    """
    rng = random.Random(f"{seed}/{source.name}")  # text seeds go through SHA-512, not hash()
    return shuffle(_distinct(_rows(source), source, tally), rng)


def shuffle(documents: Iterable[Document], rng: random.Random) -> Iterator[Document]:
    """Documents in random order, through a buffer of bounded size.

    A source smaller than the buffer is shuffled uniformly; in a larger one a document moves up
    by at most the buffer's size, so that a file of any length can be streamed.
    """
    buffer: list[Document] = []
    num_chars = 0
    for document in documents:
        buffer.append(document)
        num_chars += document.num_chars
        while len(buffer) > SHUFFLE_DOCUMENTS or (num_chars > SHUFFLE_CHARS and len(buffer) > 1):
            drawn = _draw(buffer, rng)
            num_chars -= drawn.num_chars
            yield drawn
    while buffer:
        yield _draw(buffer, rng)


def _draw(buffer: list[Document], rng: random.Random) -> Document:
    index = int(rng.random() * len(buffer))  # random() is the one stream Python promises to keep
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()


def _distinct(rows: Iterable[Row], source: FileData | HubData, tally: Tally) -> Iterator[Document]:
    seen: set[bytes] = set()
    for row in rows:
        tally.num_rows += 1
        document = to_document(row, source.format)
        if document is None:
            tally.num_blank += 1
            continue
        digest = document.digest
        if digest in seen:
            tally.num_duplicates += 1
            continue
        seen.add(digest)
        yield document


def _rows(source: FileData | HubData) -> Iterator[Row]:
    if isinstance(source, HubData):
        yield from read_hub_rows(source)
        return
    task = source.format
    text_field = task.field if isinstance(task, TextFormat) else "text"
    for path in find_files(source.paths):
        yield from read_rows(path, text_field, columns_of(task))
