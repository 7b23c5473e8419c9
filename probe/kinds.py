"""Every kind of job: the one place that lists them (torch-free)."""

from typing import Literal

from probe.spec import CheckpointSeriesSpec, DataSource
from probe.spec_continual import ContinualLearningSpec, IdxImages, NpzImages
from probe.spec_mix import MixScanSpec
from probe.spec_train import MixTrainSpec

# Jobs that measure checkpoints of a language model; the others begin from nothing.
CheckpointJobSpec = CheckpointSeriesSpec | MixScanSpec | MixTrainSpec
JobSpec = CheckpointJobSpec | ContinualLearningSpec
JobKind = Literal["checkpoint_series", "mix_scan", "mix_train", "continual_learning"]
KINDS: dict[str, type[JobSpec]] = {
    "checkpoint_series": CheckpointSeriesSpec,
    "mix_scan": MixScanSpec,
    "mix_train": MixTrainSpec,
    "continual_learning": ContinualLearningSpec,
}


def data_sources(spec: CheckpointJobSpec) -> dict[str, DataSource]:
    """Every data source of a job, by its dotted path in the spec."""
    if isinstance(spec, CheckpointSeriesSpec):
        return {f"batches.sources.{i}": source for i, source in enumerate(spec.batches.sources)}
    drawn = {f"mixture.sources.{i}": source for i, source in enumerate(spec.mixture.sources)}
    return drawn | {f"eval_tasks.{i}.data": task.data for i, task in enumerate(spec.eval_tasks)}


def image_files(spec: ContinualLearningSpec) -> dict[str, str]:
    """Every file of images or labels of a job, by its dotted path in the spec; no globs."""
    images = spec.stream.data
    if isinstance(images, IdxImages):
        return {"stream.data.images": images.images, "stream.data.labels": images.labels}
    return {"stream.data.path": images.path} if isinstance(images, NpzImages) else {}
