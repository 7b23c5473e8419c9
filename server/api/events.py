"""A job's events as a stream (SSE) that a client can leave and join again without a gap."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import Response
from sse_starlette import EventSourceResponse

from server.api.context import JobDep, StoreDep, known_query
from server.api.event_hub import EventHub
from server.api.problems import responses
from server.api.reading import read
from server.wire import TERMINAL

router = APIRouter(prefix="/v1/jobs/{job_id}", dependencies=[Depends(known_query)])

_EventId = Annotated[int | None, Query(ge=0, le=2**63 - 1, description="Id of the last one seen.")]
_LastEventId = Annotated[
    int | None,
    Header(alias="Last-Event-ID", ge=0, le=2**63 - 1, description="Takes precedence over after."),
]


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
    first = await read(store.events_after, job.id, seen)
    if not first and job.status in TERMINAL:
        return Response(None, 204)  # tells EventSource not to come back
    hub: EventHub = request.app.state.event_hub
    # Its stream is cancelled when the client goes away or the server stops.
    return EventSourceResponse(hub.stream(job.id, seen, first), ping=request.app.state.heartbeat_s)
