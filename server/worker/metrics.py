"""One worker's own metrics, from its memory: they are there when the database is not."""

import logging
import time
from collections.abc import Callable, Iterable
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from probe.errors import ConfigError
from probe.unit_results import AnyUnitResult
from server.job_views import finished_data
from server.metrics import UNIT_BUCKETS, gpu_memory
from server.settings import Settings
from server.wire import WorkerView

logger = logging.getLogger(__name__)


class WorkerMetrics(Collector):
    """Counts what this process does. Thread-safe."""

    def __init__(self) -> None:
        """Everything is zero; nothing is served."""
        self.registry = CollectorRegistry()
        self._view: Callable[[], WorkerView] | None = None
        self._beaten_at: Callable[[], float | None] = lambda: None
        self._server: WSGIServer | None = None
        registry = self.registry
        self._seconds = Histogram(
            "probe_worker_unit_seconds",
            "Duration of units finished here",
            ["kind"],
            buckets=UNIT_BUCKETS,
            registry=registry,
        )
        self._passes = Counter(
            "probe_worker_forward_passes", "Of units finished here", ["kind"], registry=registry
        )
        self._tokens = Counter(
            "probe_worker_tokens", "Of those passes, as probe_tokens", ["kind"], registry=registry
        )
        self._failures = Counter(
            "probe_worker_unit_failures", "Tries that failed here", ["code"], registry=registry
        )
        registry.register(self)
        ProcessCollector(registry=registry)

    def serve(self, settings: Settings) -> None:
        """Answer at the settings' address, if they have one; a thread of its own.

        Raises:
            ConfigError: The address cannot be had.
        """
        port, host = settings.worker_metrics_port, settings.worker_metrics_host
        if port is None:
            return
        try:
            self._server, _ = start_http_server(port, host, self.registry)
        except OSError as error:
            raise ConfigError(
                f"PROBE_WORKER_METRICS_PORT: cannot listen on {host}:{port}: {error.strerror}. "
                "Choose another port, or leave it out"
            ) from error
        logger.info("metrics at http://%s:%d/metrics", host, self._server.server_port)

    def stop(self) -> None:
        """Answer no more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def unit_finished(self, result: AnyUnitResult) -> None:
        """A unit's result was recorded."""
        data = finished_data(result)
        self._seconds.labels(result.kind).observe(result.duration_s)
        self._passes.labels(result.kind).inc(result.num_forward_passes)
        self._tokens.labels(result.kind).inc(data["num_tokens"])

    def unit_failed(self, code: str) -> None:
        """A try of a unit failed."""
        self._failures.labels(code).inc()

    def show(self, view: Callable[[], WorkerView], beaten_at: Callable[[], float | None]) -> None:
        """Have the gauges tell of this worker.

        Args:
            view: As heartbeats write it.
            beaten_at: When the last one was written, by `time.monotonic`.
        """
        self._view, self._beaten_at = view, beaten_at

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Nothing: there is no worker yet."""
        return ()

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The gauges, as they are now."""
        age = GaugeMetricFamily(
            "probe_worker_heartbeat_age_seconds",
            "Since this worker's last heartbeat that reached the database",
            labels=["worker"],
        )
        running = GaugeMetricFamily(
            "probe_worker_jobs", "Jobs that this worker runs", labels=["worker"]
        )
        if self._view is None:
            return
        view, beaten_at = self._view(), self._beaten_at()
        if beaten_at is not None:
            age.add_metric([view.name], time.monotonic() - beaten_at)
        running.add_metric([view.name], len(view.current_job_ids))
        yield age
        yield running
        yield from gpu_memory({view.name: [gpu.model_dump() for gpu in view.gpus]})
