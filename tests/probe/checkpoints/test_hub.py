"""The hub is a folder here: `snapshot_download` is replaced by one that filters like it."""

import fnmatch
import shutil

import httpx
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from probe.checkpoints import open_checkpoint
from probe.errors import CheckpointError, CheckpointUnavailableError
from probe.result import CheckpointRef

REF = CheckpointRef(source="hub", location="someone/model", revision="step2", step=2)


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """A repository holding `saved`, and what was asked of it."""
    for name in ("pytorch_model.bin", "modeling.py", "consolidated.safetensors", "merges.txt"):
        (saved / name).write_bytes(b"x")
    asked = []

    def snapshot_download(repo, *, revision, allow_patterns, ignore_patterns):
        asked.append((repo, revision))
        target = tmp_path / "snapshot"
        target.mkdir(exist_ok=True)
        for path in saved.iterdir():
            wanted = any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(path.name, p) for p in ignore_patterns):
                shutil.copy(path, target)
        return str(target)

    monkeypatch.setattr("probe.checkpoints.fetch.snapshot_download", snapshot_download)
    return asked


def test_fetches_the_revision_and_reads_it(hub, trained):
    source = open_checkpoint(REF)
    assert hub == [("someone/model", "step2")]
    assert (source.ref.location, source.ref.revision) == ("someone/model", "step2")
    assert source.ref.has_moments
    loaded = source.load_model(torch.float32, "sdpa")
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


def test_never_downloads_pickles_or_code(hub):
    names = {path.name for path in open_checkpoint(REF).directory.iterdir()}
    assert names >= {"config.json", "model.safetensors", "optimizer.safetensors", "merges.txt"}
    assert not names & {"pytorch_model.bin", "modeling.py", "consolidated.safetensors"}


def test_a_revision_is_required(hub):
    with pytest.raises(CheckpointError, match="needs a revision"):
        open_checkpoint(REF.model_copy(update={"revision": None}))


@pytest.mark.parametrize(
    ("error", "retryable"),
    [
        (httpx.ConnectError("no route"), True),
        (LocalEntryNotFoundError("not cached, and no network"), True),
        (ValueError("bad revision"), False),
    ],
)
def test_download_failures_say_whether_to_try_again(monkeypatch, error, retryable):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("probe.checkpoints.fetch.snapshot_download", fail)
    with pytest.raises(CheckpointError, match="someone/model at step2: ") as caught:
        open_checkpoint(REF)
    assert isinstance(caught.value, CheckpointUnavailableError) is retryable
