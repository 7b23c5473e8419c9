"""Fixtures several packages' tests share: hand-made unit results with known numbers."""

import datetime as dt
from collections.abc import Callable
from typing import Any

import pytest

from probe.line_search import SearchOutcome
from probe.result import CheckpointRef, Measurement, Provenance, Summary, Unit, UnitResult
from probe.spec_load import parse_spec, resolved, spec_sha256

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
        now = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
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
            provenance=Provenance(
                spec_sha256=spec_sha256(job),
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
            ),
        )

    return make


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
