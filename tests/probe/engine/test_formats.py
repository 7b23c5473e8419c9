"""The same run in every local format gives the same numbers as its safetensors directories."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from probe.engine import Session
from probe.plan import expand_units
from probe.spec_load import parse_spec

STEPS = (4, 12)


def measure(series, path: str, **changes) -> list[dict]:
    changes = {"checkpoints": {"source": "local", "path": path, "last_step": 12}} | changes
    raw = series.spec(**changes)
    raw["measurement"] = {"loss_batch": "update", "repeats": 1}
    raw["optimizer"]["moments"] = "checkpoint"
    raw["model"] = {"tokenizer": str(series.directory / "step-4")}
    spec = parse_spec(raw)
    session = Session(spec)
    results = [session.measure(unit) for unit in expand_units(spec)]
    volatile = {"duration_s"}
    return [result.measurements[0].model_dump(exclude=volatile) for result in results]


@pytest.fixture(scope="module")
def expected(series) -> list[dict]:
    torch.set_num_threads(1)
    measured = measure(series, str(series.directory / "step-*"))
    assert [m["outcome"] for m in measured] == ["converged", "converged"]
    return measured


def tensors_of(directory: Path) -> tuple[dict, dict]:
    return load_file(directory / "model.safetensors"), load_file(
        directory / "optimizer.safetensors"
    )


def dcp_save(state: dict, directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process, on purpose
        dcp.save(state, checkpoint_id=directory, no_dist=True)


def test_torch_dcp(series, expected, tmp_path):
    for step in STEPS:
        weights, state = tensors_of(series.directory / f"step-{step}")
        flat = {f"optim.state.{key}": value for key, value in state.items()}
        dcp_save({f"model.{k}": v for k, v in weights.items()} | flat, tmp_path / f"step-{step}")
    checkpoints = {
        "source": "local",
        "path": str(tmp_path / "step-*"),
        "config": str(series.directory / "step-4"),
    }
    assert measure(series, "", checkpoints=checkpoints) == expected
