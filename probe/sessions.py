"""Which engine measures which kind of job."""

from probe.engine import Session
from probe.kinds import JobSpec
from probe.mix_engine import MixSession
from probe.spec_mix import MixScanSpec


def open_session(spec: JobSpec) -> Session | MixSession:
    """The session that measures the units of a job.

    Raises:
        ConfigError: As `probe.workbench.Workbench`.
    """
    return MixSession(spec) if isinstance(spec, MixScanSpec) else Session(spec)
