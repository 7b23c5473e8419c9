"""The cache keeps its limit and what is in use, also by other processes."""

import os
import subprocess
import sys

import pytest

from probe.disk_cache import Entry, hold, limit_from, make_room, only_one, parse_size
from probe.errors import CheckpointError, ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("PROBE_CACHE_LIMIT", raising=False)
    return tmp_path / "cache"


def fill(key: str, num_bytes: int, *, age_s: int = 0, kind: str = "optimizer-states") -> Entry:
    entry = hold(kind, key)
    (entry.directory / "file").write_bytes(bytes(num_bytes))
    for lock in (entry.directory.parents[1] / "locks").glob(f"{kind}.{entry.directory.name}"):
        then = lock.stat().st_mtime - age_s
        os.utime(lock, (then, then))
    return entry


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("500GB", 500 * 10**9), ("20GiB", 20 * 2**30), ("1.5 t", 1500 * 10**9)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["much", "-1", "5 XB", "GB"])
def test_what_is_no_size_names_the_variable(text, monkeypatch):
    monkeypatch.setenv("PROBE_CACHE_LIMIT", text)
    with pytest.raises(ConfigError, match=r"PROBE_CACHE_LIMIT.*500GB"):
        limit_from("PROBE_CACHE_LIMIT")


def test_without_a_limit_nothing_is_removed():
    directories = [fill(str(i), 1000).directory for i in range(3)]
    make_room(10**15)
    assert all(directory.exists() for directory in directories)


def test_the_one_used_longest_ago_goes_first_and_only_as_many_as_needed(monkeypatch):
    old = fill("old", 400, age_s=300, kind="gguf")
    older = fill("older", 400, age_s=900)
    new = fill("new", 400, age_s=10)
    directories = {name: e.directory for name, e in (("old", old), ("older", older), ("new", new))}
    for entry in (old, older, new):
        entry.close()
    monkeypatch.setenv("PROBE_CACHE_LIMIT", "1500")
    make_room(300)  # 1200 + 300 fit
    assert all(directory.exists() for directory in directories.values())
    make_room(301)
    left = {name for name, directory in directories.items() if directory.exists()}
    assert left == {"old", "new"}


def test_holding_an_entry_makes_it_the_latest(monkeypatch):
    first, second = fill("first", 400, age_s=900), fill("second", 400, age_s=100)
    first.close()
    second.close()
    hold("optimizer-states", "first").close()
    monkeypatch.setenv("PROBE_CACHE_LIMIT", "900")
    make_room(400)
    assert first.directory.exists()
    assert not second.directory.exists()


def test_what_is_in_use_stays_and_the_error_says_so(monkeypatch):
    used = fill("used", 400, age_s=900)
    idle = fill("idle", 400)
    idle.close()
    monkeypatch.setenv("PROBE_CACHE_LIMIT", "500")
    with pytest.raises(CheckpointError, match="PROBE_CACHE_LIMIT=500: 400 bytes there are in use"):
        make_room(200)
    assert used.directory.exists()
    assert not idle.directory.exists()
    del used  # letting go of the object is enough
    make_room(200)


def test_what_another_process_uses_stays_until_that_process_is_killed(monkeypatch):
    entry = fill("theirs", 400)
    entry.close()
    code = (
        "from probe.disk_cache import hold; import sys; "
        "e = hold('optimizer-states', 'theirs'); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        monkeypatch.setenv("PROBE_CACHE_LIMIT", "100")
        with pytest.raises(CheckpointError, match="in use"):
            make_room(50)
        child.kill()
        child.wait()
        make_room(50)
    assert not entry.directory.exists()


def test_assets_and_other_files_of_the_directory_are_never_touched(cache, monkeypatch):
    cache.mkdir()
    (cache / "tokenizer.json").write_bytes(bytes(5000))
    monkeypatch.setenv("PROBE_CACHE_LIMIT", "100")
    make_room(50)
    assert (cache / "tokenizer.json").exists()


def test_a_block_runs_in_one_process_at_a_time():
    code = (
        "from probe.disk_cache import only_one\n"
        "print('began', flush=True)\n"
        "with only_one('thing'): print('inside', flush=True)\n"
    )
    with only_one("thing"):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"began\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=0.5)
    out, _ = child.communicate(timeout=30)
    assert out == b"inside\n"


def test_a_cache_that_cannot_be_written_says_so(cache):
    cache.write_text("a file, not a directory")
    with pytest.raises(CheckpointError, match="cannot be kept"):
        hold("gguf", "x")
