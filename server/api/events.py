"""A job's events as a stream (SSE) that a client can leave and join again without a gap."""

from collections.abc import AsyncIterator
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from sse_starlette import EventSourceResponse, ServerSentEvent

from server.api.context import JobDep, StoreDep, known_query
from server.api.problems import responses
from server.store import Store
from server.wire import TERMINAL, Event

router = APIRouter(prefix="/v1/jobs/{job_id}", dependencies=[Depends(known_query)])

_EventId = Annotated[int | None, Query(ge=0, le=2**63 - 1, description="Id of the last one seen.")]
_LastEventId = Annotated[
    int | None,
    Header(alias="Last-Event-ID", ge=0, le=2**63 - 1, description="Takes precedence over after."),
]
_SLOWEST_POLL_S = 1.0


@router.get(
    "/events",
    response_class=EventSourceResponse,
    responses={
        200: {"description": "id: number, event: type, data: Event", "model": None},
        204: {"description": "The job has ended and every event of it has been seen"},
        **responses(404, 422, 503),
    },
    tags=["jobs"],
)
async def job_events(
    request: Request,
    job: JobDep,
    store: StoreDep,
    after: _EventId = None,
    last_event_id: _LastEventId = None,
) -> Response:
    """Every event after the one named, each once, then those to come until the job ends."""
    seen = last_event_id if last_event_id is not None else after or 0
    first = await run_in_threadpool(store.events_after, job.id, seen)
    if not first and job.status in TERMINAL:
        return Response(None, 204)  # tells EventSource not to come back
    return EventSourceResponse(
        _stream(store, job.id, seen, first, request.app.state.event_poll_s),
        ping=request.app.state.heartbeat_s,
    )


async def _stream(
    store: Store, job_id: str, seen: int, pending: list[Event], poll_s: float
) -> AsyncIterator[ServerSentEvent]:
    # Cancelled by EventSourceResponse when the client goes away or the server stops; a call to
    # the store runs in a thread and is not held by a waiting client.
    pause = poll_s
    while True:
        for event in pending:
            yield ServerSentEvent(id=str(event.id), event=event.type, data=event.model_dump_json())
            seen, pause = event.id, poll_s
            if event.type.removeprefix("job.") in TERMINAL:
                return
        if not pending:
            await anyio.sleep(pause)
            pause = min(pause * 1.3, max(poll_s, _SLOWEST_POLL_S))
        pending = await run_in_threadpool(store.events_after, job_id, seen)
