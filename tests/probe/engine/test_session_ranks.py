"""A session on two ranks gives the numbers of a session on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from probe.engine import Session
from probe.plan import expand_units
from probe.spec_load import parse_spec

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[3]
RANKS = Path(__file__).with_name("session_ranks.py")
TIMEOUT_S = 120
WORLD_SIZE = 2
CASES = ["float32", "bfloat16", "warmup recomputed"]


@pytest.fixture(scope="module")
def specs(series):
    return [
        series.spec(model__dtype="float32"),
        series.spec(model__dtype="bfloat16"),
        series.spec(optimizer__moments="warmup", model__activation_checkpointing=True),
    ]


@pytest.fixture(scope="module")
def by_rank(specs, tmp_path_factory):
    """Results of every rank, one list of units per spec."""
    root = tmp_path_factory.mktemp("session")
    (root / "specs.json").write_text(json.dumps(specs))
    children = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(root / "specs.json"), str(rank), str(WORLD_SIZE)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    try:
        errors = [child.communicate(timeout=TIMEOUT_S)[1] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert [child.returncode for child in children] == [0] * WORLD_SIZE, "\n".join(errors)
    return [json.loads((root / f"results-{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


def numbers(unit):
    return [
        {key: value for key, value in m.items() if key != "duration_s"}
        for m in unit["measurements"]
    ]


@pytest.mark.parametrize("case", range(len(CASES)), ids=CASES)
def test_two_ranks_measure_what_one_does(specs, by_rank, case):
    spec = parse_spec(specs[case])
    session = Session(spec)
    for index, unit in enumerate(expand_units(spec)[:2]):
        truth = session.measure(unit).model_dump(mode="json")
        first, second = (rank[case][index] for rank in by_rank)
        assert numbers(first) == numbers(second)
        assert first["provenance"]["backend"] == "fsdp2"
        assert first["provenance"]["num_ranks"] == WORLD_SIZE
        for key in ("dtype", "head_path", "num_parameters", "moments"):
            assert first["provenance"][key] == truth["provenance"][key]
        for key in ("num_forward_passes", "num_backward_passes"):
            assert first[key] == truth[key]
        for found, expected in zip(numbers(first), numbers(truth), strict=True):
            for key in ("outcome", "loss_at_zero", "loss_resolution", "loss_batch_sha256"):
                assert found[key] == expected[key]
            # Gradients differ by the order in which micro-batches are added in fp32.
            for key in ("eta_c", "eta_lower", "eta_upper", "slope"):
                assert found[key] == pytest.approx(expected[key], rel=1e-5), key


def torchrun(directory, spec):
    (directory / "job.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={WORLD_SIZE}", "-m", "probe.rank"]
    return subprocess.run(
        [*command, "--spec", "job.json", "--out", "out.jsonl"],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def test_torchrun_measures_a_job_and_rank_0_reports_it(specs, by_rank, tmp_path):
    done = torchrun(tmp_path, specs[0])
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    results = [event["result"] for event in events if event["type"] == "result"]
    assert [event["type"] for event in events if event["type"] in ("ready", "done")] == [
        "ready",
        "done",
    ]
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == results
    assert len(results) == 3
    assert numbers(results[0]) == numbers(by_rank[0][0][0])


def test_a_failed_unit_ends_all_ranks(series, tmp_path):
    spec = series.spec(optimizer__no_decay=["matches nothing"])
    done = torchrun(tmp_path, spec)
    assert done.returncode != 0
    errors = [json.loads(line) for line in done.stdout.splitlines() if '"error"' in line]
    # Each rank tells its own; the first to end has torchrun end the other, perhaps before its word.
    assert {error["code"] for error in errors} == {"config_error"}
    assert len({error["rank"] for error in errors}) == len(errors) in (1, 2)
