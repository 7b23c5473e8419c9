"""What is told of a worker's jobs and units beside their events: logs, metrics, spans."""

from collections.abc import Iterator
from contextlib import contextmanager

from probe.json_log import log_fields
from probe.result import Plan, Unit
from probe.unit_results import AnyUnitResult
from server import tracing
from server.worker.metrics import WorkerMetrics


class Observation:
    """Wraps what the job runner does; one per worker."""

    def __init__(self, worker: str) -> None:
        """Nothing is counted yet.

        Args:
            worker: Its name.
        """
        self.metrics = WorkerMetrics()
        self._worker = worker

    @contextmanager
    def job(self, job_id: str, traceparent: str | None) -> Iterator[None]:
        """Around one execution of a job, part of the trace of its submission."""
        span = tracing.span("job", parent=traceparent, job_id=job_id, worker=self._worker)
        with log_fields(job_id=job_id), span:
            yield

    @contextmanager
    def unit(self, job_id: str, plan: Plan, unit: Unit) -> Iterator["UnitObservation"]:
        """Around all tries of one unit."""
        made = tracing.span("unit", job_id=job_id, unit_id=unit.unit_id, kind=plan.kind)
        with log_fields(unit_id=unit.unit_id), made as span:
            yield UnitObservation(self.metrics, span)


class UnitObservation:
    """One unit under way."""

    def __init__(self, metrics: WorkerMetrics, span: tracing.Span) -> None:
        """Tell `metrics` and `span`."""
        self._metrics = metrics
        self._span = span

    def finished(self, result: AnyUnitResult) -> None:
        """Its result was recorded, for the first time."""
        self._metrics.unit_finished(result)
        self._span.set(
            num_forward_passes=result.num_forward_passes,
            duration_s=result.duration_s,
            memory_bytes=result.memory_bytes,
        )
