"""The same run in every local format gives the same numbers as its safetensors directories."""

import pytest
import torch
from series_formats import (
    write_dcp,
    write_deepspeed,
    write_olmo_core,
    write_olmo_unsharded,
    write_trainer,
)

from probe.engine import Session
from probe.plan import expand_units
from probe.spec_load import parse_spec


def measure(series, checkpoints: dict) -> list[dict]:
    raw = series.spec(checkpoints=checkpoints | {"last_step": 12})
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
    measured = measure(series, {"source": "local", "path": str(series.directory / "step-*")})
    assert [m["outcome"] for m in measured] == ["converged", "converged"]
    return measured


@pytest.mark.parametrize(
    "write", [write_dcp, write_deepspeed, write_olmo_core, write_olmo_unsharded, write_trainer]
)
def test_the_numbers_are_those_of_the_safetensors(series, expected, tmp_path, write):
    assert measure(series, write(series, tmp_path)) == expected
