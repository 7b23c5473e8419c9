"""Errors of the HTTP client: one class per kind of answer a caller may want to treat apart."""

from typing import ClassVar

from probe.errors import ProbeError
from server.wire import FieldProblem, JobView, Problem


class ClientError(ProbeError):
    """Base class of everything `ProbeClient` raises."""

    code = "client_error"


class ServerUnavailableError(ClientError):
    """No server answered: nothing listens there, or it went away and did not come back."""

    code = "server_unavailable"
    retryable = True


class ProtocolError(ClientError):
    """Something answered, but not as a Sharpness Probe server does."""

    code = "protocol_error"


class WaitTimeoutError(ClientError):
    """A job had not ended within the time the caller gave; the job itself goes on."""

    code = "wait_timeout"
    retryable = True


class JobFailedError(ClientError):
    """A job that was waited for ended as failed or cancelled; `job` is its last state."""

    code = "job_failed"

    def __init__(self, job: JobView) -> None:
        """Say how the job ended and, where it failed, why."""
        self.job = job
        reason = f": {job.error.code}: {job.error.message}" if job.error else ""
        super().__init__(f"job {job.id} {job.status}{reason}")


class ApiError(ClientError):
    """The server refused a request; `status`, `code`, `detail` and `errors` say why.

    Attributes:
        status: HTTP status.
        code: Stable code of the problem, for programs (shadows the class's own).
        detail: One sentence for people.
        errors: What is wrong with which field; empty unless the input was bad.
    """

    code = "api_error"
    statuses: ClassVar[frozenset[int]] = frozenset()

    def __init__(self, problem: Problem) -> None:
        """Build the message from the problem's detail and its fields."""
        self.status = problem.status
        self.code = problem.code  # type: ignore[misc]
        self.detail = problem.detail
        self.errors: list[FieldProblem] = problem.errors
        fields = [f"{e.field}: {e.message}" for e in problem.errors]
        more = [f"  {field}" for field in fields if field not in problem.detail]
        super().__init__("\n".join([problem.detail or problem.title, *more]))


class BadInputError(ApiError):
    """The request itself is wrong (400, 413, 415, 422): sending it again cannot help."""

    code = "bad_input"
    statuses = frozenset({400, 413, 415, 422})


class UnauthorizedError(ApiError):
    """The API key is missing, wrong, or not allowed to do this (401, 403)."""

    code = "unauthorized"
    statuses = frozenset({401, 403})


class NotFoundError(ApiError):
    """There is no such job or page (404)."""

    code = "not_found"
    statuses = frozenset({404})


class ConflictError(ApiError):
    """The request contradicts what is stored (409)."""

    code = "conflict"
    statuses = frozenset({409})


class OverloadedError(ApiError):
    """The server takes no more just now (429, 502, 503, 504): trying later can help."""

    code = "overloaded"
    retryable = True
    statuses = frozenset({429, 502, 503, 504})


def api_error_for(problem: Problem) -> ApiError:
    """The exception for a problem, chosen by its HTTP status."""
    for kind in ApiError.__subclasses__():
        if problem.status in kind.statuses:
            return kind(problem)
    return ApiError(problem)
