"""Every format gives the same rows, and every fault is named with its place."""

import gzip
from functools import partial

import pytest

from probe.batches.readers import find_files, read_rows
from probe.errors import BatchError

from .conftest import numbered, write_rows

SUFFIXES = ["jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "parquet", "txt", "txt.gz"]

# Without the time, which would be in the names of tests: each process has to find the same.
gzipped = partial(gzip.compress, mtime=0)


def rows(path, columns=("text",)):
    return [row.fields for row in read_rows(path, "text", columns)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    expected = numbered(20)
    assert rows(write_rows(tmp_path / f"a.{suffix}", expected)) == expected


def test_text_blocks_are_parted_by_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\n\none\nstill one\n \n\ntwo\r\n\r\nthree")
    found = list(read_rows(tmp_path / "a.txt", "text", ["text"]))
    assert [row.fields["text"] for row in found] == ["one\nstill one", "two", "three"]
    assert [row.place.rpartition(", ")[2] for row in found] == ["line 3", "line 7", "line 9"]


def test_text_without_blank_lines_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("probe.batches.readers.MAX_BLOCK_CHARS", 10)
    (tmp_path / "a.txt").write_text("123456\n" * 5)
    assert [row["text"] for row in rows(tmp_path / "a.txt")] == ["123456\n123456"] * 2 + ["123456"]


def test_parquet_reads_only_what_is_wanted(tmp_path):
    path = write_rows(tmp_path / "a.parquet", [{"text": "x", "image": "y"}])
    assert rows(path) == [{"text": "x"}]
    assert set(rows(path, ("missing",))[0]) == {"text", "image"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'\n["x"]\n', r"a\.jsonl, line 2: expected a JSON object, found list"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl, line 1: not UTF-8|line 2"),
        ("a.jsonl.gz", gzipped(b'{"text": "x"}\n' * 9)[:-9], "cannot be read"),
        ("a.jsonl.gz", b"plain", "cannot be read"),
        ("a.jsonl.gz", gzipped(b"x")[:10] + b"\xff" * 9, r"a\.jsonl\.gz, .* cannot be read"),
        ("a.jsonl.zst", b"plain", "cannot be read"),
        ("a.parquet", b"plain", "not readable"),
        ("a.csv", b"text\nx\n", r"unknown format; expected \.jsonl"),
        ("a.parquet.gz", b"", "unknown format"),
    ],
)
def test_faults_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BatchError, match=message):
        rows(tmp_path / name)


def test_globs_are_sorted_and_each_file_counts_once(tmp_path):
    names = [f"{letter}.jsonl" for letter in "hgbcadfe"]
    for name in [*names, "x.txt"]:
        (tmp_path / name).write_text("")
    found = find_files([f"{tmp_path}/*.jsonl", f"{tmp_path}/a.jsonl"])
    assert [path.name for path in found] == sorted(names)
    with pytest.raises(BatchError, match=r"holds a\.jsonl, b\.jsonl, .* and 1 more"):
        find_files([f"{tmp_path}/*.parquet"])
    with pytest.raises(BatchError, match="no such file"):
        find_files([f"{tmp_path}/a.jsonl", f"{tmp_path}/none/x.jsonl"])
