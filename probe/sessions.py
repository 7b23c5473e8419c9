"""Which engine measures which kind of job."""

from typing import TYPE_CHECKING

from probe.engine import Session
from probe.kinds import JobSpec
from probe.mix_engine import MixSession
from probe.mix_train import MixTrainSession
from probe.spec_continual import ContinualLearningSpec
from probe.spec_mix import MixScanSpec
from probe.spec_train import MixTrainSpec

if TYPE_CHECKING:
    from probe.continual.session import ContinualSession


def open_session(spec: JobSpec) -> "Session | MixSession | MixTrainSession | ContinualSession":
    """The session that measures the units of a job.

    Raises:
        ConfigError: As `probe.workbench.Workbench`.
    """
    if isinstance(spec, ContinualLearningSpec):
        from probe.continual.session import ContinualSession

        return ContinualSession(spec)
    if isinstance(spec, MixTrainSpec):
        return MixTrainSession(spec)
    return MixSession(spec) if isinstance(spec, MixScanSpec) else Session(spec)
