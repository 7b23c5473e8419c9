"""Routes that move a job to another server: its plan, its whole log of events, and the import."""

import tempfile
from collections.abc import Iterator
from typing import IO, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from probe.result import Plan
from server.api.context import JobDep, StoreDep, known_query
from server.api.export_format import read_archive
from server.api.problems import ProblemError, job_not_found, responses
from server.store import SqlStore, Store
from server.transfer import import_job
from server.wire import ARCHIVE_TYPE, JobView

router = APIRouter(prefix="/v1", dependencies=[Depends(known_query)], tags=["transfer"])

EVENT_LOG_TYPE = "application/x-ndjson"
_PAGE = 1000
_IN_MEMORY_BYTES = 1 << 20
_ARCHIVE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {ARCHIVE_TYPE: {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.get("/jobs/{job_id}/plan", response_model=Plan, responses=responses(404, 422, 503))
def job_plan(job: JobDep, store: StoreDep) -> Plan:
    """Units, passes and memory of a job, as they were planned when it was submitted."""
    plan = store.get_plan(job.id)
    if plan is None:  # removed since
        raise job_not_found(job.id)
    return plan


@router.get(
    "/jobs/{job_id}/event-log",
    response_class=Response,
    responses={
        200: {"description": "One Event a line", "content": {EVENT_LOG_TYPE: {}}},
        **responses(404, 422, 503),
    },
)
def event_log(job: JobDep, store: StoreDep) -> StreamingResponse:
    """Every event so far, one JSON object a line; does not wait for more."""
    return StreamingResponse(_lines(store, job.id), media_type=EVENT_LOG_TYPE)


def _lines(store: Store, job_id: str) -> Iterator[bytes]:
    seen = 0
    while page := store.events_after(job_id, seen, _PAGE):
        seen = page[-1].id
        yield b"".join(event.model_dump_json().encode() + b"\n" for event in page)


@router.post(
    "/jobs:import",
    status_code=201,
    response_model=JobView,
    responses={
        200: {"model": JobView, "description": "The same job is here already"},
        **responses(409, 413, 415, 422, 503),
    },
    openapi_extra=_ARCHIVE,
)
async def import_route(request: Request, response: Response, store: StoreDep) -> JobView:
    """Take in a job that another server has exported, with its results and events.

    The body is a tar archive of manifest.json, job.json, results.json and events.jsonl. The job
    keeps its id; nothing is queued. Needs a key of scope admin.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != ARCHIVE_TYPE:
        raise ProblemError(
            415,
            "unsupported_media_type",
            f"send Content-Type: {ARCHIVE_TYPE}, found {media_type[:80]!r}",
        )
    with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES) as file:
        await _receive(request, file, request.app.state.settings.max_import_bytes)
        job, created = await run_in_threadpool(_import, store, file)
    response.status_code = 201 if created else 200
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job


async def _receive(request: Request, file: IO[bytes], max_bytes: int) -> None:
    stated = request.headers.get("content-length", "")
    size = int(stated[:20]) if stated.isdecimal() else 0
    if size <= max_bytes:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > max_bytes:
                break
            file.write(chunk)
    if size > max_bytes:
        raise ProblemError(
            413,
            "body_too_large",
            f"an export may have {max_bytes:,} bytes here; PROBE_MAX_IMPORT_BYTES of the server "
            "says how many",
        )


def _import(store: Store, file: IO[bytes]) -> tuple[JobView, bool]:
    assert isinstance(store, SqlStore)
    file.seek(0)
    return import_job(store, read_archive(file))
