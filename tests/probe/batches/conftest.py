"""A byte-pair tokenizer trained on the spot, and files of numbered documents."""

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from probe.spec import Batches

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "Question: how many foxes are there? Answer: there are three foxes",
    "one two three four five six seven eight nine ten",
]


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(eos_token="</s>")


def numbered(num_documents: int, words: str = "the quick brown fox") -> list[dict[str, Any]]:
    """Documents that say which they are, so that no two are equal."""
    return [{"text": f"document {i} {words} end {i}."} for i in range(num_documents)]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Rows in the format the suffix names."""
    rows = list(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
        return path
    if path.name.endswith((".txt", ".txt.gz")):
        raw = "\n\n".join(row["text"] for row in rows).encode()
    else:
        raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    elif path.suffix == ".zst":
        raw = zstandard.compress(raw)
    path.write_bytes(raw)
    return path


def make_spec(*sources: dict[str, Any], **options: Any) -> Batches:
    defaults = {"sequence_length": 16, "batch_sequences": 4, "seed": 3}
    named = [{"type": "files", "name": f"source{i}"} | source for i, source in enumerate(sources)]
    return Batches.model_validate(defaults | options | {"sources": named})


MakeSpec = Callable[..., Batches]
