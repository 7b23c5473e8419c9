"""The hub's own cache, laid out as huggingface_hub lays it out, is trimmed only where asked to."""

import os

import pytest
from huggingface_hub import constants

from probe.checkpoints.hub import fetch_revision
from probe.checkpoints.hub_cache import hold_revision, trim_hub_cache
from probe.errors import ConfigError
from probe.result import CheckpointRef

SIZE = 1000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_CACHE_DIR", str(tmp_path / "ours"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("PROBE_HUB_CACHE_LIMIT", raising=False)
    return tmp_path / "hub"


def add_revision(cache, letter, *, read_at, repo="o--r"):
    """One revision of one file, last read at a time; returns its snapshot directory."""
    root = cache / f"models--{repo}"
    commit = letter * 40
    snapshot, blob = root / "snapshots" / commit, root / "blobs" / f"b{letter}"
    for directory in (snapshot, blob.parent, root / "refs"):
        directory.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(letter.encode() * SIZE)
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(blob, snapshot))
    (root / "refs" / f"step-{letter}").write_text(commit)
    os.utime(blob, (read_at, read_at))
    return snapshot


def test_without_the_variable_nothing_is_removed(cache):
    kept = [add_revision(cache, letter, read_at=1) for letter in "abc"]
    trim_hub_cache()
    assert all(path.exists() for path in kept)
    assert hold_revision(kept[0]) is None  # and nothing is written anywhere


def test_the_one_read_longest_ago_goes_first_and_its_file_with_it(cache, monkeypatch):
    old = add_revision(cache, "a", read_at=1000)
    older = add_revision(cache, "b", read_at=500)
    new = add_revision(cache, "c", read_at=2000, repo="o--other")
    monkeypatch.setenv("PROBE_HUB_CACHE_LIMIT", str(2 * SIZE))
    trim_hub_cache()
    assert (old.exists(), older.exists(), new.exists()) == (True, False, True)
    assert not (cache / "models--o--r" / "blobs" / "bb").exists()
    assert (old / "model.safetensors").read_bytes() == b"a" * SIZE


def let_the_clock_tick(directory):
    """Until files get a later time: the kernel counts it in steps of milliseconds."""
    file = directory / "now"
    file.touch()
    before = file.stat().st_mtime_ns
    while file.stat().st_mtime_ns == before:
        file.touch()


def test_what_we_measure_stays_and_counts_as_used_now(cache, monkeypatch, caplog):
    measured = add_revision(cache, "a", read_at=1)
    fetched_ahead = add_revision(cache, "b", read_at=2)
    idle = add_revision(cache, "c", read_at=3)
    monkeypatch.setenv("PROBE_HUB_CACHE_LIMIT", str(SIZE))
    lock = hold_revision(measured)
    assert lock is not None
    let_the_clock_tick(cache)
    ahead = hold_revision(fetched_ahead)
    trim_hub_cache()
    assert (measured.exists(), fetched_ahead.exists(), idle.exists()) == (True, True, False)
    assert "all in use" in caplog.text
    del lock, ahead
    trim_hub_cache()
    assert not measured.exists()  # held before the other one
    assert fetched_ahead.exists()


def test_fetching_a_revision_holds_it_and_trims_the_others(cache, monkeypatch):
    before = add_revision(cache, "a", read_at=1)
    now = add_revision(cache, "b", read_at=2)
    monkeypatch.setenv("PROBE_HUB_CACHE_LIMIT", "1500")
    monkeypatch.setattr("probe.checkpoints.fetch.snapshot_download", lambda *_, **__: str(now))
    fetched = fetch_revision(CheckpointRef(source="hub", location="o/r", revision="step-b"))
    assert (before.exists(), now.exists()) == (False, True)
    monkeypatch.setenv("PROBE_HUB_CACHE_LIMIT", "1")
    trim_hub_cache()
    assert fetched.directory.exists()


def test_a_limit_that_is_no_size_is_named(monkeypatch):
    monkeypatch.setenv("PROBE_HUB_CACHE_LIMIT", "lots")
    with pytest.raises(ConfigError, match="PROBE_HUB_CACHE_LIMIT"):
        trim_hub_cache()


def test_no_cache_yet_is_fine(monkeypatch):
    monkeypatch.setenv("PROBE_HUB_CACHE_LIMIT", "1GB")
    trim_hub_cache()
