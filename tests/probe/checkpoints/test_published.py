"""Optimizer states published beside the hub: fetched when asked for, warm-up where not there."""

import os
from types import SimpleNamespace

import pytest
import torch

from probe.checkpoints import open_checkpoint
from probe.checkpoints.download import Patience
from probe.checkpoints.published import PublishedSource, fetch_states
from probe.disk_cache import make_room
from probe.errors import CheckpointError, CheckpointUnavailableError
from probe.moments import CheckpointMoments, WarmupMoments, choose_moments
from probe.result import CheckpointRef
from probe.spec import AdamW
from tests.probe.checkpoints.http_files import file_server, md5_etag
from tests.probe.checkpoints.olmo_states import optim_safetensors


def optimizer_file(trained):
    names = trained.model.named_parameters()
    states = {name: trained.optimizer.state[parameter] for name, parameter in names}
    return optim_safetensors(states, trained.model.config.num_hidden_layers)


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


@pytest.fixture
def weights(saved, monkeypatch):
    """The hub's copy of the checkpoint: weights and tokenizer, no optimizer state."""
    (saved / "optimizer.safetensors").unlink()
    monkeypatch.setattr("probe.checkpoints.fetch.snapshot_download", lambda *_, **__: str(saved))
    return saved


@pytest.fixture
def patience():
    return Patience(tries=2, wait=lambda _: None)


def ref(server):
    return CheckpointRef(
        source="hub", location="o/r", revision="step2", step=2, moments_url=f"{server.url}/step2/"
    )


def shards(trained):
    return [
        SimpleNamespace(name=name, lo=0, hi=p.numel(), base=p.detach().flatten())
        for name, p in trained.model.named_parameters()
    ]


def test_published_moments_are_read_bit_for_bit(server, weights, trained):
    content = optimizer_file(trained)
    server.add("/step2/optim.safetensors", content, etag=md5_etag(content))
    source = open_checkpoint(ref(server))
    assert server.requests == []  # not before they are asked for
    assert source.has_moments
    for name, parameter in trained.model.named_parameters():
        state = trained.optimizer.state[parameter]
        for kind in ("exp_avg", "exp_avg_sq"):
            flat = state[kind].flatten()
            assert torch.equal(source.read(name, kind), flat)
            assert torch.equal(source.read(name, kind, 1, len(flat) - 1), flat[1:-1])
        assert source.hyper(name) == {"step": 2}
        assert torch.equal(source.read(name, "weight"), parameter.detach().flatten())
    assert server.paths() == ["/step2/optim.safetensors"]
    moments = choose_moments(AdamW(), source, shards(trained), label="step 2")
    assert isinstance(moments, CheckpointMoments)
    assert f"{server.url}/step2/optim.safetensors (sha256 " in moments.detail
    assert "checked by the server's ETag, an md5), saved at optimizer step 2." in moments.detail


def test_they_are_fetched_once_and_kept(server, weights, trained):
    server.add("/step2/optim.safetensors", optimizer_file(trained))
    for _ in range(2):
        assert open_checkpoint(ref(server)).has_moments
    assert server.paths().count("/step2/optim.safetensors") == 1


def test_jobs_that_want_no_saved_moments_fetch_none(server, weights, trained):
    server.add("/step2/optim.safetensors", optimizer_file(trained))
    source = open_checkpoint(ref(server))
    found = choose_moments(AdamW(moments="warmup"), source, shards(trained), label="step 2")
    assert isinstance(found, WarmupMoments)
    assert server.requests == []


def test_where_there_are_none_moments_are_accumulated_and_the_result_says_why(
    server, weights, trained
):
    source = open_checkpoint(ref(server))
    moments = choose_moments(AdamW(), source, shards(trained), label="step 2")
    assert isinstance(moments, WarmupMoments)
    assert f"{server.url}/step2/optim.safetensors: 404" in moments.detail
    assert server.paths() == ["/step2/optim.safetensors", "/step2/optim.pt"]
    with pytest.raises(CheckpointError, match="404") as caught:
        choose_moments(AdamW(moments="checkpoint"), source, shards(trained), label="step 2")
    assert not caught.value.retryable


def test_a_server_that_does_not_answer_fails_a_job_that_needs_them_for_now(
    server, weights, trained, patience
):
    server.add("/step2/optim.safetensors", b"", statuses=[503] * 9)
    source = PublishedSource(ref(server), weights, patience)
    moments = choose_moments(AdamW(), source, shards(trained), label="step 2")
    assert isinstance(moments, WarmupMoments)
    assert "503" in moments.detail
    with pytest.raises(CheckpointUnavailableError, match="503"):
        choose_moments(AdamW(moments="checkpoint"), source, shards(trained), label="step 2")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "truncated"),
        (lambda content: content[:5], "no safetensors header"),
        (lambda content: b"<html>captive portal</html>", "no safetensors header"),
    ],
)
def test_a_damaged_file_is_fetched_once_more_and_then_not_used(
    server, weights, trained, damage, message
):
    server.add("/step2/optim.safetensors", damage(optimizer_file(trained)))
    source = open_checkpoint(ref(server))
    assert not source.has_moments
    assert message in str(source.moments_failure)
    assert server.paths().count("/step2/optim.safetensors") == 2
    server.add("/step2/optim.safetensors", optimizer_file(trained))
    assert open_checkpoint(ref(server)).has_moments  # nothing broken was kept


def test_the_state_of_another_model_is_an_error(server, weights, trained, make_model):
    other = make_model(seed=3, hidden_size=24, num_attention_heads=4)
    kinds = ("exp_avg", "exp_avg_sq")
    state = {
        p: {k: torch.zeros_like(p) for k in kinds} | {"step": torch.ones(())}
        for p in other.parameters()
    }
    strange = SimpleNamespace(model=other, optimizer=SimpleNamespace(state=state))
    server.add("/step2/optim.safetensors", optimizer_file(strange))
    source = open_checkpoint(ref(server))
    with pytest.raises(CheckpointError, match="optimizer state is another model's"):
        source.read("model.norm.weight", "exp_avg")


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_a_hostile_pickle_runs_nothing(server, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    path = tmp_path / "optim.pt"
    torch.save({"state": {}, "param_groups": Bomb()}, path)
    server.add("/step2/optim.pt", path.read_bytes())
    source = open_checkpoint(ref(server))
    assert not source.has_moments
    assert "cannot be read" in str(source.moments_failure)
    assert not (tmp_path / "exploded").exists()


def test_moments_in_use_are_not_removed_from_a_full_cache(
    server, weights, trained, monkeypatch, tmp_path
):
    content = optimizer_file(trained)
    for step in (2, 3):
        server.add(f"/step{step}/optim.safetensors", content)
    monkeypatch.setenv("PROBE_CACHE_LIMIT", str(len(content) + 2000))
    source = open_checkpoint(ref(server))
    assert source.has_moments
    with pytest.raises(CheckpointError, match="do not fit"):
        fetch_states(f"{server.url}/step3/")
    assert torch.equal(
        source.read("model.norm.weight", "exp_avg"),
        trained.optimizer.state[trained.model.model.norm.weight]["exp_avg"],
    )
    del source  # the unit is over: its file makes room for the next one
    assert fetch_states(f"{server.url}/step3/").file.num_bytes == len(content)
    kept = list((tmp_path / "cache" / "optimizer-states").glob("*/optim.safetensors"))
    assert len(kept) == 1
    make_room(1000)
