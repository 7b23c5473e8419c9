"""Errors of the server and the worker, beside those of `probe.errors`."""

from typing import ClassVar

from probe.errors import ProbeError
from server.wire import Readiness


class IdempotencyConflictError(ProbeError):
    """An Idempotency-Key came again with another body."""

    code = "idempotency_conflict"
    http_status: ClassVar[int] = 422


class StoreNotReadyError(ProbeError):
    """The database does not answer, or its tables are not there."""

    code = "store_not_ready"
    retryable = True
    http_status: ClassVar[int] = 503

    def __init__(self, message: str, state: Readiness | None = None) -> None:
        """`state`: what does not hold, where it was looked at."""
        super().__init__(message)
        self.state = state


class InvalidExportError(ProbeError):
    """What is to be imported is no export of a job, or does not fit together."""

    code = "export_invalid"
    http_status: ClassVar[int] = 422


class ExportHashError(InvalidExportError):
    """A file of an export is not the one its manifest lists."""

    code = "export_hash_mismatch"


class ExportIncompleteError(InvalidExportError):
    """An export of a job that had not ended."""

    code = "export_incomplete"


class JobExistsError(ProbeError):
    """A job of that id is here, with other contents."""

    code = "job_exists"
    http_status: ClassVar[int] = 409


class StoreVersionError(ProbeError):
    """The database was written by a newer version of this program."""

    code = "store_version"


class WorkerNameTakenError(ProbeError):
    """Another worker already runs under this name."""

    code = "worker_name_taken"


class WorkerStuckError(ProbeError):
    """The queue gave this worker a job and never began it, again and again."""

    code = "worker_stuck"


class JobTakenError(ProbeError):
    """The job has been taken over by another worker, or was cancelled."""

    code = "job_taken"


class PlacementError(ProbeError):
    """The machines a gang needs cannot be had now."""

    code = "placement_error"
    retryable = True
