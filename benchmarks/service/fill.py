"""A database of many finished jobs: a few are made as the service makes them, SQL copies them.

Every table that has a job's row gets one for each copy, DBOS's among them, so that indices and
pages are as large as they would be. Copies are older than anything submitted later.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from safetensors.numpy import save_file

from probe.line_search import SearchOutcome
from probe.plan import make_plan
from probe.result import Measurement, Plan, Provenance, Summary, Unit, UnitResult
from probe.spec_load import parse_spec
from server import queue
from server.store import SqlStore
from server.tables import jobs
from server.wire import JobError

NUM_UNITS = 2
TEAMS = ("data", "infra", "scaling")
_ENDS = ("SUCCESS",) * 7 + ("ERROR", "CANCELLED", "SUCCESS")  # 80 % succeeded
# Table, and the column that names its job.
_OF_A_JOB = (
    ("jobs", "id"),
    ("job_labels", "job_id"),
    ("ended_views", "job_id"),
    ("unit_results", "job_id"),
    ("events", "job_id"),
)
_OF_A_WORKFLOW = ("workflow_status", "workflow_input", "workflow_output", "operation_outputs")
_APART_MS = 1000  # between two jobs


def write_series(directory: Path) -> dict[str, Any]:
    """Checkpoints and text small enough to be nothing but files; a spec that names them."""
    for step in (100, 200):
        checkpoint = directory / "runs" / f"step-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text(json.dumps({"model_type": "llama"}))
        save_file({"w": np.zeros((2, 2), np.float32)}, str(checkpoint / "model.safetensors"))
    text = directory / "text.jsonl"
    text.write_text('{"text": "hello"}\n')
    return {
        "kind": "checkpoint_series",
        "name": "a series of two checkpoints",
        "labels": {"team": "data", "experiment": "annealing-7"},
        "checkpoints": {"source": "local", "path": str(directory / "runs" / "step-*")},
        "optimizer": {"name": "adamw", "warmup_steps": 2},
        "batches": {
            "sources": [{"type": "files", "name": "words", "paths": [str(text)]}],
            "sequence_length": 16,
            "batch_sequences": 4,
            "held_out_sequences": 4,
        },
        "measurement": {"loss_batch": "both"},
    }


def fill(database_url: str, spec: dict[str, Any], num_jobs: int) -> list[str]:
    """Fill a new database; the ids of its jobs, oldest first."""
    store = SqlStore(database_url)
    templates = [_finished_job(store, spec, number) for number in range(len(_ENDS))]
    with store.engine.begin() as connection:
        connection.execute(sa.text("CREATE TEMPORARY TABLE copies (n INTEGER PRIMARY KEY)"))
        connection.execute(sa.text(_NUMBERS), {"last": num_jobs - 1})
        for table, key in _OF_A_JOB:
            _copy(connection, table, None, key, templates)
        schema = None if queue.is_sqlite(store.engine) else queue.DBOS_SCHEMA
        for table in _OF_A_WORKFLOW:
            _copy(connection, table, schema, "workflow_uuid", templates)
        for job_id in templates:
            connection.execute(sa.delete(jobs).where(jobs.c.id == job_id))
            workflows = queue.workflow_status_table(store.engine)
            connection.execute(sa.delete(workflows).where(workflows.c.workflow_uuid == job_id))
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        # What autovacuum and a closed connection do in time.
        connection.exec_driver_sql(
            "PRAGMA optimize" if queue.is_sqlite(store.engine) else "VACUUM ANALYZE"
        )
    store.close()
    return [_copy_id(number) for number in range(num_jobs)]


_NUMBERS = """
INSERT INTO copies
WITH RECURSIVE counted(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM counted WHERE n < :last)
SELECT n FROM counted
"""


def _copy_id(number: int) -> str:
    return f"job_{number:026d}"


def _copy(
    connection: sa.Connection, table: str, schema: str | None, key: str, templates: list[str]
) -> None:
    names = [column["name"] for column in sa.inspect(connection).get_columns(table, schema)]
    copies = sa.table("copies", sa.column("n", sa.Integer))
    source = sa.table(table, *(sa.column(name) for name in names), schema=schema)
    digits = sa.cast(copies.c.n, sa.Text)
    zeros = sa.func.substr("0" * 26, 1, 26 - sa.func.length(digits))
    new = {name: source.c[name] for name in names}
    new[key] = sa.literal("job_") + zeros + digits
    shift = copies.c.n * _APART_MS
    for name in ("created_at", "started_at", "ended_at", "completed_at", "at", "recorded_at"):
        if name in new:
            new[name] = new[name] - sa.literal(10**9) + shift
    for number, template in enumerate(templates):
        if "body" in names:  # a copy's view keeps the times of the job it is a copy of
            new["body"] = sa.func.replace(source.c.body, template, new[key])
        rows = (
            sa.select(*(value.label(name) for name, value in new.items()))
            .select_from(source.join(copies, sa.true()))
            .where(source.c[key] == template, copies.c.n % len(templates) == number)
        )
        connection.execute(sa.insert(source).from_select(names, rows))


def _finished_job(store: SqlStore, spec: dict[str, Any], number: int) -> str:
    team = TEAMS[number % len(TEAMS)]
    plan = make_plan(parse_spec(spec | {"labels": spec["labels"] | {"team": team}}))
    job, _ = store.create_job(plan=plan, idempotency_key=None, body_sha256="0" * 64)
    end = _ENDS[number]
    workflows = queue.workflow_status_table(store.engine)
    owned = {"status": "PENDING", "executor_id": "bench-0"}
    _set(store, sa.update(workflows).where(workflows.c.workflow_uuid == job.id).values(**owned))
    store.mark_running(job.id, "bench-0")
    for unit in plan.units:
        about = {"unit_id": unit.unit_id, "index": unit.index}
        store.append_event(job.id, "unit.started", about | {"attempt": 1, "device": "cpu"})
        progress = {"phase": "search", "done": 2, "total": 3, "num_forward_passes": 2}
        store.append_event(job.id, "unit.progress", about | progress)
        if end == "SUCCESS":
            store.record_unit(job.id, result_of(plan, unit))
    if end == "ERROR":
        store.record_error(job.id, JobError(code="unit_crashed", message="rank 0 ended"))
    ended = {"status": end, "completed_at": sa.literal_column("updated_at")}
    _set(store, sa.update(workflows).where(workflows.c.workflow_uuid == job.id).values(**ended))
    store.settle(job.id)
    return job.id


def _set(store: SqlStore, statement: sa.Update) -> None:
    with store.engine.begin() as connection:
        connection.execute(statement)


def result_of(plan: Plan, unit: Unit) -> UnitResult:
    """A result of the size real ones have."""
    measurements = [
        Measurement(
            repeat=repeat,
            loss_batch=loss_batch,
            outcome=SearchOutcome.CONVERGED,
            eta_c=0.5,
            eta_lower=0.48,
            eta_upper=0.51,
            eta_interpolated=0.5,
            lambda_c=4.0,
            loss_at_zero=3.0,
            slope=-1.0,
            num_forward_passes=4,
            num_extra_sign_changes=0,
            trials=[(0.4, 2.9), (0.48, 2.99), (0.51, 3.01)],
            loss_resolution=1e-7,
            update_batch_sha256="1" * 64,
            loss_batch_sha256="2" * 64,
            duration_s=0.1,
        )
        for repeat in range(2)
        for loss_batch in ("update", "held_out")
    ]
    summaries = [
        Summary(
            loss_batch=loss_batch,
            num_repeats=2,
            num_converged=2,
            lambda_c_mean=4.0,
            lambda_c_standard_error=0.0,
            lambda_c_values=[4.0, 4.0],
            lambda_c_lower=3.9,
            lambda_c_upper=4.2,
            loss_mean=3.0,
            outcomes={"converged": 2},
            num_forward_passes=8,
        )
        for loss_batch in ("update", "held_out")
    ]
    now = "2026-01-01T00:00:00Z"
    return UnitResult(
        unit=unit,
        spec=plan.spec,
        measurements=measurements,
        summaries=summaries,
        num_forward_passes=16,
        num_backward_passes=2,
        duration_s=1.0,
        memory_bytes=10**9,
        provenance=Provenance(
            spec_sha256=plan.spec_sha256,
            versions={"torch": "2.13.0", "transformers": "5.17.0"},
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
        ),
    )
