"""Fixtures several packages' tests share: hand-made unit results with known numbers."""

import datetime as dt
import signal
from collections.abc import Callable
from typing import Any

import pytest

from probe.line_search import SearchOutcome
from probe.plan_continual import expand_continual_units
from probe.result import CheckpointRef, Measurement, Provenance, RunRef, Summary, Unit, UnitResult
from probe.result_continual import (
    LAYER_SIGNALS,
    RUN_SIGNALS,
    ContinualUnitResult,
    RunRecord,
    RunTask,
    Windows,
)
from probe.result_mix import MixMeasurement, MixUnitResult
from probe.spec_continual import ContinualLearningSpec
from probe.spec_load import parse_spec, resolved, spec_sha256

# A shell that runs the tests in the background has them ignore Ctrl-C, and what they start too.
signal.signal(signal.SIGINT, signal.default_int_handler)

MakeUnitResult = Callable[..., UnitResult]
REL_TOL = 1 / 16


@pytest.fixture
def series_spec() -> dict[str, Any]:
    """A small, complete `checkpoint_series` spec as a user would send it."""
    return {
        "kind": "checkpoint_series",
        "name": "demo series",
        "labels": {"project": "demo"},
        "checkpoints": {"source": "local", "path": "runs/a/step-*"},
        "batches": {
            "sources": [{"type": "files", "name": "c4", "paths": ["c4.jsonl"]}],
            "sequence_length": 128,
            "batch_sequences": 4,
            "held_out_sequences": 16,
        },
        "measurement": {"loss_batch": "both", "repeats": 2},
        "schedule": {
            "type": "warmup_stable_decay",
            "peak": 0.01,
            "warmup_steps": 100,
            "decay_start": 400,
            "total_steps": 600,
        },
    }


@pytest.fixture
def make_unit_result(series_spec: dict[str, Any]) -> MakeUnitResult:
    """Builds a `UnitResult` from the eta_c of every repeat, by loss batch (or an outcome)."""

    def make(
        index: int = 0,
        step: int | None = 120,
        etas: dict[str, list[float | str]] | None = None,
        *,
        learning_rate: float | None = 0.01,
        spec: dict[str, Any] | None = None,
        location: str | None = None,
    ) -> UnitResult:
        etas = {"update": [0.1], "held_out": [0.02]} if etas is None else etas
        job = parse_spec(series_spec if spec is None else spec)
        measurements = [
            _measurement(repeat, loss_batch, value)
            for loss_batch, values in etas.items()
            for repeat, value in enumerate(values)
        ]
        return UnitResult(
            unit=Unit(
                index=index,
                unit_id=f"{index:04d}-step-{step}",
                checkpoint=CheckpointRef(
                    source="local", location=location or f"runs/a/step-{step}", step=step
                ),
                learning_rate=learning_rate,
            ),
            spec=resolved(job),
            measurements=measurements,
            summaries=[_summary(batch, measurements) for batch in etas],
            stability_threshold=None if learning_rate is None else 2 / learning_rate,
            num_forward_passes=sum(m.num_forward_passes for m in measurements),
            num_backward_passes=1,
            duration_s=1.5,
            memory_bytes=10**8,
            provenance=_provenance(spec_sha256(job)),
        )

    return make


def _provenance(spec_sha256: str) -> Provenance:
    now = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
    return Provenance(
        spec_sha256=spec_sha256,
        versions={"probe": "0.1.0"},
        git_commit=None,
        device="cpu (1 thread)",
        dtype="float32",
        attention="sdpa",
        moments="checkpoint",
        moments_detail="read from the checkpoint",
        num_parameters=1000,
        hostname="here",
        started_at=now,
        finished_at=now,
    )


def _measurement(repeat: int, loss_batch: Any, value: float | str) -> Measurement:
    eta = value if isinstance(value, float) else None
    # eta_c is the bracket's midpoint, and the bracket is as wide as rel_tol allows.
    upper = None if eta is None else 2 * eta / (2 - REL_TOL)
    return Measurement(
        repeat=repeat,
        loss_batch=loss_batch,
        outcome=SearchOutcome.CONVERGED if eta is not None else SearchOutcome(value),
        eta_c=eta,
        eta_lower=0.0 if upper is None else upper * (1 - REL_TOL),
        eta_upper=upper,
        eta_interpolated=eta,
        lambda_c=None if eta is None else 2 / eta,
        loss_at_zero=4.0,
        slope=-0.5,
        num_forward_passes=4,
        num_extra_sign_changes=0,
        trials=[(1e-3, 3.9), (1e-1, None)],
        loss_resolution=1e-7,
        update_batch_sha256="a" * 64,
        loss_batch_sha256="b" * 64,
        duration_s=0.5,
    )


def _summary(loss_batch: Any, measurements: list[Measurement]) -> Summary:
    chosen = [m for m in measurements if m.loss_batch == loss_batch]
    found = [m for m in chosen if m.lambda_c is not None]
    values = [m.lambda_c for m in found if m.lambda_c is not None]
    mean = sum(values) / len(values) if values else None
    error = None
    if mean is not None and len(values) > 1:
        variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        error = (variance / len(values)) ** 0.5
    outcomes: dict[str, int] = {}
    for m in chosen:
        outcomes[m.outcome.value] = outcomes.get(m.outcome.value, 0) + 1
    return Summary(
        loss_batch=loss_batch,
        num_repeats=len(chosen),
        num_converged=len(found),
        lambda_c_mean=mean,
        lambda_c_standard_error=error,
        lambda_c_values=[m.lambda_c for m in chosen],
        lambda_c_lower=2 / max(m.eta_upper for m in found if m.eta_upper) if found else None,
        lambda_c_upper=2 / min(m.eta_lower for m in found) if found else None,
        loss_mean=4.0,
        outcomes=outcomes,
        num_forward_passes=sum(m.num_forward_passes for m in chosen),
    )


@pytest.fixture
def mix_spec() -> dict[str, Any]:
    """A small, complete `mix_scan` spec as a user would send it."""
    web = {"type": "files", "name": "web", "paths": ["web.jsonl"]}
    gsm8k = {
        "type": "files",
        "name": "gsm8k",
        "paths": ["gsm8k.jsonl"],
        "format": {"type": "question_answer"},
    }
    return {
        "kind": "mix_scan",
        "name": "demo scan",
        "labels": {"project": "demo"},
        "checkpoints": {"source": "local", "path": "runs/a/step-300"},
        "optimizer": {"moments": "warmup", "warmup_steps": 3},
        "mixture": {"sources": [web, gsm8k], "ratios": [0.0, 0.5, 1.0]},
        "eval_tasks": [
            {"data": web | {"name": "web_task"}, "sequences": 8},
            {"data": gsm8k | {"name": "gsm8k_test"}, "sequences": 16},
        ],
        "batches": {"sequence_length": 128, "batch_sequences": 4},
        "measurement": {"repeats": 2},
    }


# eta_c of every repeat by ratio, or an outcome without one. The least eta_c is 0.1 (web), 0.2
# (gsm8k) and none, so the sweet spot is 0.5. log eta_c differs by -3 log 2 at 0 and by log 2 at
# 0.5, so straight lines cross three quarters of the way, at 0.375, where eta_c is 0.1 * 4^0.75.
CURVES: dict[str, dict[float, list[float | str]]] = {
    "web_task": {0.0: [0.1, 0.1], 0.5: [0.4, 0.4], 1.0: [2.0, 1.0]},
    "gsm8k_test": {
        0.0: [0.8, 0.8],
        0.5: [0.2, 0.2],
        1.0: ["not_a_descent_direction", "not_a_descent_direction"],
    },
}


@pytest.fixture
def make_mix_result(mix_spec: dict[str, Any]) -> Callable[..., MixUnitResult]:
    """Builds a `MixUnitResult` from eta_c values: `make()` gives `CURVES`."""

    def make(
        index: int = 0,
        step: int | None = 300,
        *,
        ratio: float | None = None,
        curves: dict[str, dict[float, list[float | str]]] | None = None,
    ) -> MixUnitResult:
        values = CURVES if curves is None else curves
        spec = parse_spec(mix_spec)
        ratios = sorted({r for by_ratio in values.values() for r in by_ratio})
        ratios = ratios if ratio is None else [ratio]
        num_repeats = max(len(v) for by_ratio in values.values() for v in by_ratio.values())
        measurements = [
            _mix_measurement(repeat, at, task, values[task][at][repeat])
            for repeat in range(num_repeats)
            for at in ratios
            for task in values
        ]
        checkpoint = CheckpointRef(source="local", location=f"runs/a/step-{step}", step=step)
        suffix = "" if ratio is None else f"-ratio-{ratio:g}"
        return MixUnitResult(
            unit=Unit(
                index=index,
                unit_id=f"{index:04d}-step-{step}{suffix}",
                checkpoint=checkpoint,
                ratio=ratio,
            ),
            spec=resolved(spec),
            measurements=measurements,
            num_forward_passes=3 * len(measurements),
            num_backward_passes=12,
            duration_s=2.0,
            direction_s=0.5,
            memory_bytes=1 << 20,
            provenance=_provenance(spec_sha256(spec)),
        )

    return make


def _mix_measurement(repeat: int, ratio: float, task: str, value: float | str) -> MixMeasurement:
    eta_c = value if isinstance(value, float) else None
    # As `_measurement`: eta_c is the bracket's midpoint, as wide as rel_tol allows.
    outcome = SearchOutcome.CONVERGED if eta_c else SearchOutcome(value)
    upper = None if eta_c is None else 2 * eta_c / (2 - REL_TOL)
    return MixMeasurement(
        repeat=repeat,
        ratio=ratio,
        task=task,
        shares=[ratio, 1 - ratio],
        outcome=outcome,
        eta_c=eta_c,
        eta_lower=0.0 if upper is None else upper * (1 - REL_TOL),
        eta_upper=upper,
        eta_interpolated=eta_c,
        lambda_c=None if eta_c is None else 2 / eta_c,
        loss_at_zero=3.0,
        slope=0.5 if outcome is SearchOutcome.NOT_A_DESCENT_DIRECTION else -0.5,
        num_forward_passes=0 if outcome is SearchOutcome.NOT_A_DESCENT_DIRECTION else 3,
        num_extra_sign_changes=0,
        trials=[],
        loss_resolution=1e-7,
        update_batch_sha256=["a" * 64, "b" * 64],
        loss_batch_sha256="c" * 64,
        duration_s=0.1,
    )


@pytest.fixture
def continual_spec() -> dict[str, Any]:
    """A small, complete `continual_learning` spec: 2 x 2 x 2 runs of one shape, 5 tasks."""
    return {
        "kind": "continual_learning",
        "name": "demo stream",
        "stream": {
            "type": "random_labels",
            "data": {"type": "packaged", "name": "digits"},
            **{"num_images": 100, "num_tasks": 5, "epochs": 3, "batch_size": 32},
        },
        "model": {"hidden": [8, 4]},
        "methods": [
            {"name": "L2", "regularizers": [{"type": "l2", "strength": 1e-3}]},
            {"name": "leaky", "activation": "leaky_relu", "leak": 0.1},
        ],
        "controls": [{"name": "vanilla"}, {"name": "scheduler", "scheduler": {}}],
        "seeds": [0, 1],
        "tasks_per_unit": 2,
    }


# Of a run and a task: its accuracy, None where it diverged; the share of violations per bound.
OfTask = Callable[[RunRef, int], Any]


def _known_accuracy(run: RunRef, task: int) -> float:
    """L2 falls by 0.1 a task, leaky rises by 0.05; the scheduler adds 0.2, the seed 0.02."""
    start = 0.7 - 0.1 * task if run.method == "L2" else 0.2 + 0.05 * task
    return start + (0.2 if run.control == "scheduler" else 0.0) + 0.02 * run.seed


def _known_shares(run: RunRef, task: int) -> dict[str, float]:
    """The combined bound is right about L2 and wrong about leaky; the curvature's says nothing."""
    return {"gradient": (0.1 * task) ** 2, "curvature": 0.5, "combined": 0.1 * task}


@pytest.fixture
def make_continual_results(
    continual_spec: dict[str, Any],
) -> Callable[..., list[ContinualUnitResult]]:
    """Builds a result per unit of a spec, from accuracies and shares by run and task."""

    def make(
        accuracy: OfTask = _known_accuracy,
        shares: OfTask = _known_shares,
        spec: dict[str, Any] | None = None,
    ) -> list[ContinualUnitResult]:
        job = parse_spec(continual_spec if spec is None else spec)
        assert isinstance(job, ContinualLearningSpec)
        return [
            _continual_result(job, unit, accuracy, shares) for unit in expand_continual_units(job)
        ]

    return make


def _continual_result(
    job: ContinualLearningSpec, unit: Unit, accuracy: OfTask, shares: OfTask
) -> ContinualUnitResult:
    assert unit.runs and unit.num_tasks and unit.first_task is not None  # noqa: PT018
    layers = [*(f"fc{number + 1}" for number in range(len(job.model.hidden) + 1)), "network"]
    steps = job.epochs_of(job.control(unit.runs[0].control)) * 4  # 100 images in batches of 32
    tasks = range(unit.first_task, unit.first_task + unit.num_tasks)
    return ContinualUnitResult(
        unit=unit,
        spec=resolved(job),
        layer_names=layers,
        runs=[
            RunRecord(
                run=run,
                tasks=[
                    _run_task(task, steps, layers, accuracy(run, task), shares(run, task))
                    for task in tasks
                ],
            )
            for run in unit.runs
        ],
        num_steps_per_task=steps,
        resumed_at_task=None,
        num_forward_passes=len(unit.runs) * unit.num_tasks,
        num_backward_passes=len(unit.runs) * unit.num_tasks * steps,
        duration_s=2.0,
        memory_bytes=1 << 20,
        provenance=_provenance(spec_sha256(job)),
    )


def _run_task(
    task: int,
    steps: int,
    layers: list[str],
    accuracy: float | None,
    shares: dict[Any, float] | None,
) -> RunTask:
    """Two windows. A signal is 1 + its place among the signals + 10 x layer + 100 x window."""
    is_finite = accuracy is not None
    loss = None if accuracy is None else 2.0 - accuracy
    return RunTask(
        task=task,
        outcome="finished" if is_finite else "diverged",
        accuracy=accuracy,
        accuracy_end=accuracy,
        loss=loss,
        loss_end=loss,
        violation_share=shares if is_finite else None,
        windows=Windows(
            last_step=[steps // 2, steps] if is_finite else [],
            runs={
                name: [0.01 * place, 0.01 * place + 0.001] if is_finite else []
                for place, name in enumerate(RUN_SIGNALS)
            },
            layers={
                name: [
                    [1.0 + place + 10 * layer + 100 * window for window in range(2)]
                    for layer in range(len(layers))
                ]
                if is_finite
                else []
                for place, name in enumerate(LAYER_SIGNALS)
            },
        ),
    )
