"""A rank that is given a continual-learning job: alone, without checkpoints, by the plan."""

import pytest

from probe.plan import make_plan
from probe.rank import Measurer
from probe.result_continual import ContinualUnitResult
from probe.spec_load import parse_spec, resolved
from probe.unit_results import parse_result


@pytest.fixture
def spec(continual_spec, tmp_path, monkeypatch):
    """One group of four small runs, 3 tasks in 2 units."""
    monkeypatch.setenv("PROBE_CACHE_DIR", str(tmp_path))
    continual_spec["stream"] |= {"num_tasks": 3, "num_images": 70}
    continual_spec["methods"] = continual_spec["methods"][:1]
    continual_spec["signals"] = {"log_every": 3, "control_every": 3, "rank_samples": 8}
    return parse_spec(continual_spec)


def test_every_unit_is_trained_and_costs_what_was_planned(spec):
    heard = []
    measurer = Measurer(heard.append)
    plan = make_plan(spec)
    raw = [unit.model_dump(mode="json") for unit in plan.units]
    assert measurer.start_job(resolved(spec))
    for unit, upcoming in zip(raw, [*raw[1:], None], strict=True):
        measurer.measure(unit, {}, upcoming)  # a unit after it without a checkpoint to fetch
    found = [parse_result(m["result"]) for m in heard if m["type"] == "result"]
    assert [type(result) for result in found] == [ContinualUnitResult] * 2
    assert sum(result.num_backward_passes for result in found) == plan.num_backward_passes
    assert sum(result.num_forward_passes for result in found) == plan.num_forward_passes
    assert found[0].provenance.num_parameters == plan.num_parameters
    assert found[0].num_steps_per_task == 9  # 3 epochs of ceil(70 / 32) batches
    steps = [
        m["data"] for m in heard if m["type"] == "progress" and m["unit_id"] == raw[0]["unit_id"]
    ]
    trained = [data["done"] for data in steps if data["phase"] == "train"]
    assert {data["total"] for data in steps if data["phase"] == "train"} == {18}
    assert trained == sorted(trained)
    assert trained[-1] == 18


def test_it_wants_no_other_ranks(spec, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    heard = []
    assert not Measurer(heard.append).start_job(resolved(spec))
    (error,) = heard
    assert error["code"] == "config_error"
    assert "runs in one process, but 2 were started" in error["message"]


def test_nothing_is_fetched_for_it_after_a_job_that_did(spec, series_spec):
    """The rank that measured a series keeps no prefetcher that would look for a checkpoint."""
    heard = []
    measurer = Measurer(heard.append)
    assert measurer.start_job(resolved(parse_spec(series_spec)))
    assert measurer._prefetcher is not None
    assert measurer.start_job(resolved(spec))
    assert measurer._prefetcher is None
