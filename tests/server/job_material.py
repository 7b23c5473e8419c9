"""Plans and results for tests of the store, the queue and the worker; no checkpoint is read."""

import datetime as dt
from typing import Any

from probe.line_search import SearchOutcome
from probe.result import (
    CheckpointRef,
    Measurement,
    Plan,
    Provenance,
    Summary,
    Unit,
    UnitResult,
)


def make_unit(index: int) -> Unit:
    checkpoint = CheckpointRef(source="local", location=f"/checkpoints/step-{index}", step=index)
    return Unit(index=index, unit_id=f"{index:04d}-step-{index}", checkpoint=checkpoint)


def make_plan(
    num_units: int = 3, *, labels: dict[str, str] | None = None, device: str = "auto", **spec: Any
) -> Plan:
    return Plan(
        kind="checkpoint_series",
        spec={
            "kind": "checkpoint_series",
            "name": "a series",
            "labels": labels or {},
            "model": {"device": device},
            **spec,
        },
        spec_sha256="0" * 64,
        units=[make_unit(index) for index in range(num_units)],
        num_forward_passes=4 * num_units,
        max_forward_passes=40 * num_units,
        num_backward_passes=num_units,
        num_tokens_per_pass=1024,
    )


def make_result(unit: Unit, *, eta_c: float | None = 0.5, num_forward_passes: int = 4) -> UnitResult:
    outcome = SearchOutcome.CONVERGED if eta_c else SearchOutcome.NO_CROSSING
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    measurement = Measurement(
        repeat=0,
        loss_batch="held_out",
        outcome=outcome,
        eta_c=eta_c,
        eta_lower=0.4,
        eta_upper=0.6,
        eta_interpolated=eta_c,
        lambda_c=2 / eta_c if eta_c else None,
        loss_at_zero=3.0,
        slope=-1.0,
        num_forward_passes=num_forward_passes,
        num_extra_sign_changes=0,
        trials=[(0.4, 2.9), (0.6, None)],
        loss_resolution=1e-7,
        update_batch_sha256="1" * 64,
        loss_batch_sha256="2" * 64,
        duration_s=0.1,
    )
    summary = Summary(
        loss_batch="held_out",
        num_repeats=1,
        num_converged=1 if eta_c else 0,
        lambda_c_mean=measurement.lambda_c,
        lambda_c_standard_error=None,
        lambda_c_values=[measurement.lambda_c],
        lambda_c_lower=None,
        lambda_c_upper=None,
        loss_mean=3.0,
        outcomes={outcome.value: 1},
        num_forward_passes=num_forward_passes,
    )
    provenance = Provenance(
        spec_sha256="0" * 64,
        versions={},
        git_commit=None,
        device="cpu",
        dtype="float32",
        attention="sdpa",
        moments="none",
        moments_detail="none",
        num_parameters=1,
        hostname="here",
        started_at=now,
        finished_at=now,
    )
    return UnitResult(
        unit=unit,
        spec={},
        measurements=[measurement],
        summaries=[summary],
        num_forward_passes=num_forward_passes,
        num_backward_passes=1,
        duration_s=0.1,
        memory_bytes=1,
        provenance=provenance,
    )
