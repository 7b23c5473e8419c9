"""A plan says beforehand what can be known to go wrong."""

import copy
from typing import Any

import pytest

from probe.plan import make_plan
from probe.plan_parts import file_notes
from probe.result import Plan
from probe.spec_load import parse_spec


def test_a_data_file_that_is_not_here_is_named(series_spec: dict[str, Any], tmp_path) -> None:
    here = tmp_path / "here.jsonl"
    here.write_text('{"text": "a"}\n')
    raw = copy.deepcopy(series_spec)
    missing = str(tmp_path / "gone.jsonl")
    raw["batches"]["sources"][0]["paths"] = [str(here), missing, str(tmp_path / "*.parquet")]
    notes = file_notes(parse_spec(raw).batches.sources)
    assert len(notes) == 1
    assert missing in notes[0]


def hub_plan(series_spec: dict[str, Any], revisions: list[str], **schedule: Any) -> Plan:
    raw = copy.deepcopy(series_spec)
    repo = "allenai/OLMo-2-1124-13B"
    raw["checkpoints"] = {"source": "hub", "repo": repo, "revisions": revisions}
    raw["schedule"] = schedule
    return make_plan(parse_spec(raw))


def test_a_plan_says_whose_learning_rates_it_takes(series_spec: dict[str, Any]) -> None:
    revisions = ["stage2-ingredient4-step17880-tokens150B", "stage2-ingredient4-step1000-tokens9B"]
    plan = hub_plan(series_spec, revisions)
    assert plan.units[1].learning_rate == pytest.approx(9e-5 / 2)
    source = "allenai/OLMo configs/official-1124/OLMo2-13B-stage2-seed2662-300B.yaml"
    assert plan.units[1].learning_rate_source == source
    assert f"learning rates for 2/eta are those of {source}" in plan.notes


def test_a_schedule_the_job_states_wins_over_the_known_one(series_spec: dict[str, Any]) -> None:
    revision = "stage1-step102500-tokens860B"
    stated = hub_plan(series_spec, [revision], type="constant", peak=7e-4)
    assert (stated.units[0].learning_rate, stated.units[0].learning_rate_source) == (7e-4, "spec")
    assert not any("2/eta" in note for note in stated.notes)


def test_a_plan_says_where_optimizer_states_would_be_fetched(series_spec: dict[str, Any]) -> None:
    revision = "stage2-ingredient4-step1000-tokens9B"
    url = "https://olmo-checkpoints.org/ai2-llm/peteish13/stage2/olmo-13b-1124_stage2_ingredient4"
    assert any(url in note for note in hub_plan(series_spec, [revision]).notes)
    series_spec["optimizer"] = {"name": "adamw", "moments": "warmup"}
    assert not any(url in note for note in hub_plan(series_spec, [revision]).notes)
