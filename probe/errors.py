"""Every error the project raises on purpose, each with a stable `code`.

Errors are for broken input or broken machinery. A measurement without an answer is not an
error: it is an outcome (`probe.line_search.SearchOutcome`). The worker decides from
`retryable` whether a unit is tried again; HTTP and the command line show `code`.
"""

from typing import ClassVar


class ProbeError(Exception):
    """Base class: `code` never changes once released, `retryable` says if trying again can help."""

    code: ClassVar[str] = "probe_error"
    retryable: ClassVar[bool] = False


class ConfigError(ProbeError):
    """A job spec, an argument or a setting is wrong; the message names the field."""

    code = "config_error"


class CheckpointError(ProbeError):
    """A checkpoint is missing, unreadable, unsafe, or lacks what the measurement needs."""

    code = "checkpoint_error"


class CheckpointUnavailableError(CheckpointError):
    """A checkpoint could not be fetched now (network, hub): trying later can help."""

    code = "checkpoint_unavailable"
    retryable = True


class BatchError(ProbeError):
    """Text, questions or images cannot be turned into the batches asked for."""

    code = "batch_error"


class BatchUnavailableError(BatchError):
    """A data set could not be read now (network, hub): trying later can help."""

    code = "batch_unavailable"
    retryable = True


class DirectionError(ProbeError):
    """No update direction can be formed from this optimizer, gradient or mapping."""

    code = "direction_error"


class NonFiniteLossError(ProbeError):
    """The loss at the unperturbed parameters is NaN or infinite, so no ray can be measured."""

    code = "non_finite_loss"


class ParallelismError(ProbeError):
    """Ranks disagree, a rank died, or a back-end cannot run here."""

    code = "parallelism_error"
    retryable = True


class UnitCrashedError(ProbeError):
    """The process measuring a unit ended without a result (killed, out of memory, crash)."""

    code = "unit_crashed"
    retryable = True


class OutOfMemoryError(ProbeError):
    """A measurement did not fit into memory; trying again with the same spec cannot help."""

    code = "out_of_memory"


class DiskFullError(ProbeError):
    """A file could not be written because its disk is full: it may have room later."""

    code = "disk_full"
    retryable = True


class StorageError(ProbeError):
    """A file or directory cannot be read or written: read-only, not permitted, broken."""

    code = "storage_error"


def error_class_for(code: str) -> type[ProbeError]:
    """The error class whose `code` this is; `ProbeError` for a code not known here."""
    pending: list[type[ProbeError]] = [ProbeError]
    while pending:
        candidate = pending.pop()
        if candidate.code == code:
            return candidate
        pending.extend(candidate.__subclasses__())
    return ProbeError
