"""docs/observability.md names every metric as it is, and no other."""

import re
from pathlib import Path

import pytest
import yaml
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from server.api.operations import CountRequests
from server.store import SqlStore
from server.wire import GpuView, WorkerView
from server.worker.metrics import WorkerMetrics

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "observability.md").read_text()
ROW = re.compile(r"^\| `(probe_\w+)` \| (\w+) \|([^|]*)\|", re.MULTILINE)
GPU = GpuView(index=0, name="g", memory_used_bytes=1, memory_total_bytes=2)
NOW = "2026-01-01T00:00:00Z"
WORKER = WorkerView(
    name="w",
    hostname="h",
    pid=1,
    queues=["gpu"],
    device="d",
    started_at=NOW,
    last_heartbeat=NOW,
    alive=True,
    gpus=[GPU],
)


def table(heading):
    """{name: (type, labels)} of the table under a heading cell."""
    start = PAGE.index(f"| {heading} |")
    text = PAGE[start : PAGE.index("\n\n", start)]
    return {
        name: (kind, tuple(sorted(re.findall(r"`(\w+)`", labels))))
        for name, kind, labels in ROW.findall(text)
    }


def exposed(registry):
    """The same of a registry: labels as the metrics were made, or as their samples have them."""
    labels = {
        collector._name: tuple(sorted(collector._labelnames))
        for collector in set(registry._collector_to_names)
        if hasattr(collector, "_labelnames")
    }
    found = {}
    for family in registry.collect():
        if family.name.startswith("probe_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            known = [tuple(sorted(sample.labels)) for sample in family.samples]
            found[name] = (family.type, labels.get(family.name) or (known or [()])[0])
    return found


@pytest.fixture
def store(tmp_path):
    store = SqlStore(f"sqlite:///{tmp_path / 'probe.db'}")
    yield store
    store.close()


def test_the_server_s_metrics(store):
    registry = CollectorRegistry()
    CountRequests(FastAPI(), registry)
    store.feed_metrics(registry)
    with store.engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO workers (name, last_heartbeat, stopped, view) VALUES ('w', 0, 0, ?)",
            (WORKER.model_dump_json(),),
        )
    assert table("metric of the server") == exposed(registry)


def test_a_worker_s_metrics():
    metrics = WorkerMetrics()
    metrics.show(lambda: WORKER, lambda: 0.0)
    assert table("metric of a worker") == exposed(metrics.registry)


def test_alerts_and_examples_ask_for_metrics_that_exist():
    known = table("metric of the server")
    rules = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in alerts}) == len(alerts) >= 5
    examples = re.findall(r"`([^`\n]*\([^`\n]*probe_[^`\n]*)`", PAGE)
    for text in [rule["expr"] for rule in alerts] + examples:
        assert text.count("(") == text.count(")")
        for name in re.findall(r"probe_\w+", text):
            kind, labels = known[re.sub(r"_(bucket|count|sum)$", "", name)]
            assert (kind == "histogram") == bool(re.search(r"_(bucket|count|sum)$", name))
            for selector in re.findall(name + r"\{(\w+)", text):
                assert selector in labels
        for by in re.findall(r"by \(([^)]*)\)", text):
            every = {label for _, labels in known.values() for label in labels} | {"le"}
            assert set(by.split(", ")) <= every
