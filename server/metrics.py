"""The whole service's metrics, from its database, so that one server tells of all workers.

Gauges are read when they are asked for. Counters and histograms begin at zero with the server and
follow the events of all jobs since, as Prometheus expects of a process that starts again.
"""

import threading
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from server import tables
from server.job_reads import JobReads
from server.metric_events import EventFollower, Happening
from server.settings import Queue
from server.tables import workers
from server.wire import JobStatus

WAIT_BUCKETS = (0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)
UNIT_BUCKETS = (0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 4 * 3600)


class ServiceMetrics(Collector):
    """Feeds one registry; collecting it is thread-safe."""

    def __init__(
        self,
        registry: CollectorRegistry,
        engine: sa.Engine,
        reads: JobReads,
        worker_stale_s: float,
    ) -> None:
        """Counting begins here.

        Args:
            registry: Gets every metric.
            engine: Of the database.
            reads: Tells how many jobs there are.
            worker_stale_s: A worker silent for longer is not alive.
        """
        self._engine = engine
        self._reads = reads
        self._worker_stale_s = worker_stale_s
        self._follower = EventFollower(engine)
        self._lock = threading.Lock()
        self._workers = sa.select(workers, tables.now_ms(engine).label("now"))
        # This first: it lets the counters, collected after it, catch up.
        registry.register(self)
        self._make_counters(registry)
        ProcessCollector(registry=registry)

    def _make_counters(self, registry: CollectorRegistry) -> None:
        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(name, about, labels, registry=registry)

        def histogram(name: str, about: str, label: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, about, [label], buckets=buckets, registry=registry)

        self._wait = histogram(
            "probe_queue_wait_seconds",
            "From a job's submission to its first start",
            *("queue", WAIT_BUCKETS),
        )
        self._unit_seconds = histogram(
            "probe_unit_seconds", "Duration of finished units", "kind", UNIT_BUCKETS
        )
        self._passes = counter(
            "probe_forward_passes", "Forward passes of finished units, when they finish", "kind"
        )
        self._tokens = counter(
            "probe_tokens",
            "Tokens of those passes, each counted at the size of the job's largest loss batch",
            "kind",
        )
        self._ended = counter("probe_jobs_ended", "Jobs that have ended", "status", "kind")
        self._retries = counter("probe_unit_retries", "Units tried again, by what failed", "code")
        self._failures = counter("probe_job_failures", "Jobs that failed, by their error", "code")
        self._memory = Gauge(
            "probe_unit_memory_bytes",
            "Peak memory of the unit finished last: of its GPU, or the process on a CPU",
            ["kind"],
            registry=registry,
        )

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Nothing: registering must not read the database."""
        return ()

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The gauges, read now."""
        with self._lock:
            for happening in self._follower.news():
                self._count(happening)
        yield self._jobs()
        yield from self._of_workers()

    def _count(self, happening: Happening) -> None:
        kind = happening.kind
        if happening.queue_wait_s is not None:
            self._wait.labels(happening.queue).observe(happening.queue_wait_s)
        if happening.type == "unit.finished":
            self._unit_seconds.labels(kind).observe(happening.duration_s or 0.0)
            self._passes.labels(kind).inc(happening.num_forward_passes)
            self._tokens.labels(kind).inc(happening.num_tokens)
            if happening.memory_bytes is not None:
                self._memory.labels(kind).set(happening.memory_bytes)
        elif happening.type == "unit.retrying":
            self._retries.labels(happening.code or "unknown").inc()
        elif happening.type != "job.running":
            self._ended.labels(happening.type.removeprefix("job."), kind).inc()
            if happening.type == "job.failed":
                self._failures.labels(happening.code or "unknown").inc()

    def _jobs(self) -> GaugeMetricFamily:
        jobs = GaugeMetricFamily("probe_jobs", "Jobs by state", labels=["status", "queue"])
        counts = self._reads.count()
        # Zeros too: an alert on a series that is not there never fires.
        names = [(queue, status) for queue in get_args(Queue) for status in get_args(JobStatus)]
        for queue, status in sorted({*names, *counts}):
            jobs.add_metric([status, queue], counts.get((queue, status), 0))
        return jobs

    def _of_workers(self) -> Iterable[GaugeMetricFamily]:
        with self._engine.connect() as connection:
            rows = connection.execute(self._workers.where(~workers.c.stopped)).all()
        age = GaugeMetricFamily(
            "probe_worker_heartbeat_age_seconds",
            "Since a worker's last heartbeat, on the database's clock; stopped ones are left out",
            labels=["worker"],
        )
        running = GaugeMetricFamily(
            "probe_worker_jobs", "Jobs that a worker runs, at its last heartbeat", labels=["worker"]
        )
        alive = GaugeMetricFamily("probe_workers_alive", "Workers with a fresh heartbeat")
        num_alive = 0
        for row in rows:
            age_s = (row.now - row.last_heartbeat) / 1000
            is_alive = age_s <= self._worker_stale_s
            num_alive += is_alive
            age.add_metric([row.name], age_s)
            num_jobs = len(row.view.get("current_job_ids", ())) if is_alive else 0
            running.add_metric([row.name], num_jobs)
        alive.add_metric([], num_alive)
        yield alive
        yield age
        yield running
        yield from gpu_memory({row.name: row.view.get("gpus", ()) for row in rows})


def gpu_memory(gpus: Mapping[str, Iterable[Any]]) -> Iterable[GaugeMetricFamily]:
    """Memory of the GPUs by worker; no series where no tool tells it."""
    labels = ["worker", "gpu", "name"]
    used = GaugeMetricFamily(
        "probe_gpu_memory_used_bytes", "Of whatever runs on the GPU", labels=labels
    )
    total = GaugeMetricFamily("probe_gpu_memory_total_bytes", "The GPU's memory", labels=labels)
    for worker, found in gpus.items():
        for gpu in found:
            names = [worker, str(gpu["index"]), gpu["name"]]
            used.add_metric(names, gpu["memory_used_bytes"])
            total.add_metric(names, gpu["memory_total_bytes"])
    return used, total
