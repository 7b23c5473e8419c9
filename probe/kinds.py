"""Every kind of job: the one place that lists them (torch-free)."""

from typing import Literal

from probe.spec import CheckpointSeriesSpec, DataSource
from probe.spec_mix import MixScanSpec
from probe.spec_train import MixTrainSpec

JobSpec = CheckpointSeriesSpec | MixScanSpec | MixTrainSpec
JobKind = Literal["checkpoint_series", "mix_scan", "mix_train"]
KINDS: dict[str, type[JobSpec]] = {
    "checkpoint_series": CheckpointSeriesSpec,
    "mix_scan": MixScanSpec,
    "mix_train": MixTrainSpec,
}


def data_sources(spec: JobSpec) -> dict[str, DataSource]:
    """Every data source of a job, by its dotted path in the spec."""
    if isinstance(spec, CheckpointSeriesSpec):
        return {f"batches.sources.{i}": source for i, source in enumerate(spec.batches.sources)}
    drawn = {f"mixture.sources.{i}": source for i, source in enumerate(spec.mixture.sources)}
    return drawn | {f"eval_tasks.{i}.data": task.data for i, task in enumerate(spec.eval_tasks)}
