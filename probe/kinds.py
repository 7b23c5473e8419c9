"""Every kind of job: the one place that lists them (torch-free)."""

from typing import Literal

from probe.spec import CheckpointSeriesSpec, DataSource
from probe.spec_mix import MixScanSpec

JobSpec = CheckpointSeriesSpec | MixScanSpec
JobKind = Literal["checkpoint_series", "mix_scan"]
KINDS: dict[str, type[CheckpointSeriesSpec] | type[MixScanSpec]] = {
    "checkpoint_series": CheckpointSeriesSpec,
    "mix_scan": MixScanSpec,
}


def data_sources(spec: JobSpec) -> dict[str, DataSource]:
    """Every data source of a job, by its dotted path in the spec."""
    if isinstance(spec, CheckpointSeriesSpec):
        return {f"batches.sources.{i}": source for i, source in enumerate(spec.batches.sources)}
    drawn = {f"mixture.sources.{i}": source for i, source in enumerate(spec.mixture.sources)}
    return drawn | {f"eval_tasks.{i}.data": task.data for i, task in enumerate(spec.eval_tasks)}
