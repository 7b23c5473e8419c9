"""The next checkpoint comes while the present one is measured: by the order of requests."""

import os
import subprocess
import sys
import threading

import pytest

from probe.prefetch import Prefetcher, prefetch
from probe.rank import Measurer
from probe.result import CheckpointRef, Unit
from tests.probe.checkpoints.http_files import file_server

CONTENT = b"\x02\x00\x00\x00\x00\x00\x00\x00{}"  # a safetensors file of nothing


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PROBE_LOOPBACK_HTTP", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("PROBE_CACHE_LIMIT", raising=False)


@pytest.fixture
def server():
    with file_server() as running:
        yield running


def local(path):
    return CheckpointRef(source="local", location=str(path))


@pytest.fixture
def advised(monkeypatch):
    """Files the kernel was asked to read ahead."""
    names = []

    def fadvise(descriptor, offset, length, advice):
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_WILLNEED)
        names.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    return names


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "step-2" / "optim").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "optim/__0_0.distcp"):
        (tmp_path / "step-2" / name).write_bytes(b"x")
    return tmp_path / "step-2"


def test_local_files_are_read_ahead(advised, checkpoint):
    prefetch(local(checkpoint), wants_moments=True)
    assert sorted(advised) == ["__0_0.distcp", "config.json", "model.safetensors"]


def test_one_checkpoint_is_begun_once(advised, checkpoint):
    prefetcher = Prefetcher(wants_moments=True)
    for _ in range(3):
        prefetcher.begin(local(checkpoint))
        prefetcher.join()
    assert len(advised) == 3


def test_what_goes_wrong_is_only_logged(tmp_path, caplog, monkeypatch):
    prefetcher = Prefetcher(wants_moments=True)
    prefetcher.begin(CheckpointRef(source="gguf", location=str(tmp_path / "gone.gguf")))
    prefetcher.join()
    assert "gone.gguf is not fetched ahead" in caplog.text

    def surprise(*_, **__):
        raise RuntimeError("a library's own")

    monkeypatch.setattr("probe.prefetch.prefetch", surprise)
    prefetcher.begin(local(tmp_path))
    prefetcher.join()
    assert "RuntimeError: a library's own" in caplog.text


class FakeSession:
    """Opens its checkpoint as a real one does, then measures until the server has seen enough."""

    def __init__(self, server, log):
        self.server, self.log = server, log

    def measure(self, unit, *, eta_init, on_progress):
        from probe.checkpoints import open_checkpoint

        on_progress({"phase": "load"})
        source = open_checkpoint(unit.checkpoint)
        on_progress({"phase": "load"})
        assert not source.has_moments  # the file of nothing is fetched, and is no optimizer state
        self.log.append(f"measuring {unit.checkpoint.step}")
        on_progress({"phase": "gradient"})
        following = f"/step{unit.checkpoint.step + 1}/optim.safetensors"
        if following in self.server.files:
            self.server.wait_for(lambda: following in self.server.paths())
            self.log.append(f"{following} asked for")
        on_progress({"phase": "search"})
        self.log.append(f"measured {unit.checkpoint.step}")
        raise RuntimeError("no result is needed here")


def test_the_next_unit_is_fetched_while_this_one_is_measured(server, saved_weights, monkeypatch):
    """The measurement of unit 1 does not end before the server was asked for unit 2."""
    fetched = []

    def snapshot(_repo, *, revision, **_):
        fetched.append(revision)
        return str(saved_weights)

    monkeypatch.setattr("probe.checkpoints.fetch.snapshot_download", snapshot)
    units = []
    for step in (1, 2):
        server.add(f"/step{step}/optim.safetensors", CONTENT, etag=None)
        server.add(f"/step{step}/optim.pt", b"", statuses=[404] * 9)
        ref = CheckpointRef(
            source="hub", location="o/r", revision=f"r{step}", step=step,
            moments_url=f"{server.url}/step{step}/",
        )  # fmt: skip
        units.append(Unit(index=step - 1, unit_id=f"u{step}", checkpoint=ref))
    log, events = [], []
    measurer = Measurer(events.append)
    measurer._session = FakeSession(server, log)
    measurer._prefetcher = Prefetcher(wants_moments=True)
    measurer.measure(units[0].model_dump(mode="json"), None, units[1].model_dump(mode="json"))
    measurer._prefetcher.join()
    asked = [path for path in server.paths() if path.endswith("optim.safetensors")]
    assert asked == [f"/step{n}/optim.safetensors" for n in (1, 1, 2, 2)]  # broken: twice each
    measurer.measure(units[1].model_dump(mode="json"), None, None)
    assert log == [
        "measuring 1", "/step2/optim.safetensors asked for", "measured 1",
        "measuring 2", "measured 2",
    ]  # fmt: skip
    assert fetched == ["r1", "r2", "r2"]


def test_a_unit_waits_for_its_own_prefetch_and_fetches_nothing_twice(server, tmp_path):
    from probe.checkpoints.published import fetch_states

    gate = threading.Event()
    content = b"\x40\x00\x00\x00\x00\x00\x00\x00" + (
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(64) + bytes(4)
    )
    server.add("/step2/optim.safetensors", content, etag=None, gate=gate)
    first = threading.Thread(target=fetch_states, args=(f"{server.url}/step2/",))
    first.start()
    server.wait_for(lambda: len(server.requests) == 1)
    threading.Timer(0.2, gate.set).start()
    assert fetch_states(f"{server.url}/step2/").file.num_bytes == len(content)
    first.join()
    assert server.paths().count("/step2/optim.safetensors") == 1


def test_a_process_ends_while_its_prefetch_hangs(server, tmp_path):
    """A gang that is killed or done does not wait for a download, nor leave one behind."""
    gate = threading.Event()
    server.add("/f", bytes(1 << 20), gate=gate)
    code = (
        "import sys; from pathlib import Path\n"
        "import probe.prefetch\n"
        "from probe.checkpoints.download import download\n"
        "from probe.result import CheckpointRef\n"
        "url, target = sys.argv[1], Path(sys.argv[2])\n"
        "probe.prefetch.prefetch = lambda ref, wants_moments: download(url, target)\n"
        "probe.prefetch.Prefetcher(wants_moments=True).begin("
        "CheckpointRef(source='local', location='x'))\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, f"{server.url}/f", str(tmp_path / "f")]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        server.wait_for(lambda: len(server.requests) == 1)
        assert child.stdin is not None
        child.stdin.close()
        try:
            assert child.wait(timeout=60) == 0  # the body is held back for longer
        finally:
            child.kill()
    assert not gate.is_set()


@pytest.fixture
def saved_weights(tmp_path):
    """A hub snapshot that opens: a config, and a safetensors file of one weight."""
    directory = tmp_path / "snapshot"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "olmo2"}')
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    size = len(header).to_bytes(8, "little")
    (directory / "model.safetensors").write_bytes(size + header + bytes(4))
    return directory
