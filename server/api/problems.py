"""Every error as RFC 9457 problem+json with a stable `code`, and never with a secret in it."""

import http
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError, OperationalError
from starlette.exceptions import HTTPException

from probe.errors import (
    BatchError,
    CheckpointError,
    CheckpointUnavailableError,
    ConfigError,
    ProbeError,
)
from probe.spec_load import SpecError
from server.errors import (
    IdempotencyConflictError,
    InvalidExportError,
    JobExistsError,
    StoreNotReadyError,
)
from server.redaction import redact
from server.wire import FieldProblem, Problem

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
_RETRY_AFTER_S = "5"
_MOST_SHOWN = 50  # of the problems of one request: an answer must not outgrow it

# Codes of errors that HTTP itself gives a meaning.
_HTTP_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    413: "body_too_large",
    415: "unsupported_media_type",
}
# The first match counts, so a subclass stands before its base.
_PROBE_STATUS: tuple[tuple[type[ProbeError], int], ...] = (
    (IdempotencyConflictError, 422),
    (InvalidExportError, 422),
    (JobExistsError, 409),
    (StoreNotReadyError, 503),
    (CheckpointUnavailableError, 503),
    (CheckpointError, 422),
    (BatchError, 422),
    (ConfigError, 422),
)


class ProblemError(Exception):
    """Raised by routes: the problem to answer with."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        errors: Sequence[FieldProblem] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Keep what the answer is made of."""
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail
        self.errors = list(errors)
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        """The answer."""
        problem = Problem(
            title=http.HTTPStatus(self.status).phrase,
            status=self.status,
            detail=redact(self.detail),
            code=self.code,
            errors=[FieldProblem(field=e.field, message=redact(e.message)) for e in self.errors],
        )
        return JSONResponse(
            problem.model_dump(mode="json"), self.status, self.headers, media_type=MEDIA_TYPE
        )


def job_not_found(job_id: str) -> ProblemError:
    """404 for a job id, shortened: ids are at most 30 characters."""
    return ProblemError(404, "not_found", f"there is no job {job_id[:60]!r}")


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of these statuses: each one a problem."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": http.HTTPStatus(status).phrase, "content": content}
        for status in statuses
    }


def install(app: FastAPI) -> None:
    """Make the app answer every error as a problem."""
    app.add_exception_handler(ProblemError, _problem)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(ProbeError, _probe_error)
    app.add_exception_handler(DBAPIError, _database_error)
    app.add_exception_handler(Exception, _unexpected_error)


async def _problem(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ProblemError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    detail = str(error.detail)
    if error.status_code == 404:
        detail = f"there is nothing at {request.url.path[:200]}; GET /docs lists what there is"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        detail = f"{request.method[:20]} is not possible here; allowed: {allowed}"
    code = _HTTP_CODES.get(error.status_code, "http_error")
    return ProblemError(error.status_code, code, detail, headers=error.headers).response()


async def _validation_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = [
        FieldProblem(field=".".join(str(part) for part in e["loc"]), message=str(e["msg"]))
        for e in error.errors()
    ]
    return invalid(problems, "validation_error").response()


def invalid(problems: Sequence[FieldProblem], code: str) -> ProblemError:
    """422 with what is wrong with which field."""
    detail = "; ".join(f"{p.field}: {p.message}" for p in problems[:3])
    if len(problems) > 3:
        detail += f"; and {len(problems) - 3} more in `errors`"
    return ProblemError(422, code, detail, errors=problems[:_MOST_SHOWN])


async def _probe_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ProbeError)
    if isinstance(error, SpecError):
        problems = [FieldProblem(**problem) for problem in error.problems]
        return invalid(problems, error.code).response()
    status = next((status for kind, status in _PROBE_STATUS if isinstance(error, kind)), None)
    if status is None:
        return await _unexpected_error(request, error)
    if isinstance(error, StoreNotReadyError):
        return await _database_error(request, error)
    headers = {"Retry-After": _RETRY_AFTER_S} if status == 503 else {}
    return ProblemError(status, error.code, str(error), headers=headers).response()


async def _database_error(request: Request, error: Exception) -> JSONResponse:
    # A lost connection is not always one: Postgres ends a session that was idle too long in a
    # transaction, as a machine's that slept is, with an InternalError.
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    if lost or isinstance(error, OperationalError | StoreNotReadyError):
        return database_problem(error).response()
    return await _unexpected_error(request, error)


def database_problem(error: Exception) -> ProblemError:
    """503 for a database that does not answer; logs what it said."""
    # The driver's own words can name hosts and users: they go to the log.
    log.error("the database does not answer", exc_info=error, extra={"event": "store_not_ready"})
    return ProblemError(
        503,
        StoreNotReadyError.code,
        "the database does not answer now; the request can be repeated",
        headers={"Retry-After": _RETRY_AFTER_S},
    )


def with_members(error: StoreNotReadyError, members: Mapping[str, Any]) -> JSONResponse:
    """The problem of a database that is not ready, with more members than problems have."""
    problem = database_problem(error).response()
    content = json.loads(bytes(problem.body)) | dict(members)
    headers = {"Retry-After": _RETRY_AFTER_S}
    return JSONResponse(content, problem.status_code, headers, media_type=MEDIA_TYPE)


async def _unexpected_error(request: Request, error: Exception) -> JSONResponse:
    log.error(
        "unexpected error in %s %s",
        request.method,
        request.url.path,
        exc_info=error,
        extra={"event": "internal_error"},
    )
    return ProblemError(
        500, "internal_error", "something went wrong on the server; its log has the details"
    ).response()
