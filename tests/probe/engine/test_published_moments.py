"""Moments fetched from elsewhere give the numbers of the same moments saved beside the weights."""

import re
import shutil

import pytest
from safetensors.torch import load_file

from probe.engine import Session
from probe.plan import expand_units
from probe.spec_load import parse_spec
from tests.probe.checkpoints.http_files import file_server, md5_etag
from tests.probe.checkpoints.olmo_states import optim_safetensors


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PROBE_LOOPBACK_HTTP", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with file_server() as running:
        yield running


@pytest.fixture
def hub(series, tmp_path, monkeypatch):
    """The series as hub revisions: the same weights, no optimizer state."""

    def snapshot(_repo, *, revision, **_):
        target = tmp_path / revision
        if not target.exists():
            without = shutil.ignore_patterns("optimizer*")
            shutil.copytree(series.directory / revision, target, ignore=without)
        return str(target)

    monkeypatch.setattr("probe.checkpoints.fetch.snapshot_download", snapshot)


def states_of(series, step):
    stored = load_file(series.directory / f"step-{step}" / "optimizer.safetensors")
    names = {key.rpartition(".")[0] for key in stored}
    kinds = ("exp_avg", "exp_avg_sq", "step")
    return {name: {kind: stored[f"{name}.{kind}"] for kind in kinds} for name in names}


def measured(raw, unit_index=0):
    spec = parse_spec(raw)
    return Session(spec).measure(expand_units(spec)[unit_index])


def test_a_series_measured_on_published_states_is_the_series_measured_on_saved_ones(
    series, server, hub
):
    content = optim_safetensors(states_of(series, 4), 2)
    url = server.add("/step4/optim.safetensors", content, etag=md5_etag(content))
    checkpoints = {
        "source": "hub", "repo": "o/r", "revisions": ["step-4", "step-12"],
        "step_pattern": r"step-(\d+)", "optimizer_states": f"{server.url}/step{{step}}/",
    }  # fmt: skip
    options = {"measurement": {"loss_batch": "update", "repeats": 1}}
    saved = measured(series.spec(**options))
    published = measured(series.spec(checkpoints=checkpoints, **options))
    assert [m.trials for m in published.measurements] == [m.trials for m in saved.measurements]
    assert published.provenance.moments == saved.provenance.moments == "checkpoint"
    assert re.fullmatch(
        rf"Read from {re.escape(url)} \(sha256 [0-9a-f]{{64}}, checked by the server's ETag, an "
        r"md5\), saved at optimizer step 4\.",
        published.provenance.moments_detail,
    )
    absent = measured(series.spec(checkpoints=checkpoints, **options), 1)
    assert absent.provenance.moments == "warmup"
    assert f"{server.url}/step12/optim.safetensors: 404" in absent.provenance.moments_detail
