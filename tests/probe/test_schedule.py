"""The schedule's values, each from its formula."""

import math

import pytest

from probe.result import CheckpointRef
from probe.schedule import learning_rate_at, rate_function, run_learning_rate
from probe.spec import Schedule

WSD = Schedule(
    type="warmup_stable_decay",
    peak=1e-2,
    warmup_steps=100,
    decay_start=400,
    total_steps=600,
    final=0.0,
)
COSINE = Schedule(type="cosine", peak=4e-4, warmup_steps=2000, total_steps=10_000, final=4e-5)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        (WSD, 0, 0.0),
        (WSD, 50, 0.5e-2),
        (WSD, 100, 1e-2),
        (WSD, 400, 1e-2),
        (WSD, 500, 0.5e-2),
        (WSD, 600, 0.0),
        (WSD, 700, 0.0),
        (COSINE, 2000, 4e-4),
        (COSINE, 6000, (4e-4 + 4e-5) / 2),
        (COSINE, 8000, 4e-5 + (4e-4 - 4e-5) * 0.5 * (1 + math.cos(0.75 * math.pi))),
        (COSINE, 10_000, 4e-5),
        (Schedule(type="linear", peak=1.0, total_steps=4, final=0.5), 1, 0.875),
        (Schedule(type="constant", peak=0.1), None, 0.1),
        (Schedule(type="constant", peak=0.1, warmup_steps=10, start=0.02), 5, 0.06),
    ],
)
def test_value_at_a_step(schedule, step, expected):
    assert learning_rate_at(schedule, step) == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("schedule", [Schedule(), WSD, COSINE], ids=["none", "wsd", "cosine"])
def test_without_a_step_there_is_no_answer(schedule):
    assert learning_rate_at(schedule, None) is None


def hub(revision, step, repo="allenai/OLMo-2-1124-7B"):
    return CheckpointRef(source="hub", location=repo, revision=revision, step=step)


ANNEAL = hub("stage2-ingredient1-step5959-tokens25B", 5959)  # half of 11920 steps


def test_a_published_run_needs_no_schedule():
    rate, source = run_learning_rate(Schedule(), ANNEAL)
    assert rate == pytest.approx(6.1499e-5 / 2, rel=1e-12)
    assert source == "allenai/OLMo configs/official-1124/OLMo2-7B-stage2-seed*.yaml"


def test_a_stated_schedule_wins_and_none_means_none():
    stated = Schedule(type="constant", peak=0.25)
    assert run_learning_rate(stated, ANNEAL) == (0.25, "spec")
    assert run_learning_rate(Schedule(type="none"), ANNEAL) == (None, None)


@pytest.mark.parametrize(
    "checkpoint",
    [
        hub("main", None),
        hub("stage1-step150-tokens1B", 150, repo="someone/else"),
        hub("stage1-step150-tokens1B", 1),  # a step_pattern that found the tokens
        CheckpointRef(source="local", location="allenai/OLMo-2-1124-7B", step=150),
    ],
)
def test_nothing_is_guessed(checkpoint):
    assert run_learning_rate(Schedule(), checkpoint) == (None, None)


def test_between_checkpoints_the_line_follows_the_stage_of_the_run():
    rate, _ = rate_function(Schedule(), ANNEAL)
    assert rate is not None
    assert rate(2979) == pytest.approx(6.1499e-5 * 0.75, rel=1e-12)
    assert rate(None) is None
