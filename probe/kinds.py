"""Every kind of job: the one place that lists them (torch-free)."""

from probe.spec import CheckpointSeriesSpec

JobSpec = CheckpointSeriesSpec
KINDS: dict[str, type[JobSpec]] = {"checkpoint_series": CheckpointSeriesSpec}
