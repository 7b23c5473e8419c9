"""Routes that submit, list, show and cancel jobs, and plan one without queueing it."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from probe.kinds import JobKind, JobSpec
from probe.plan import make_plan
from probe.result import Plan
from probe.series import list_checkpoints
from probe.spec import CheckpointSeriesSpec
from probe.spec_base import DEFAULT_PRIORITY
from probe.spec_load import SpecError, parse_spec
from server.api.bodies import read_json, sha256_of
from server.api.callers import Caller, caller_of
from server.api.context import JobDep, SettingsDep, StoreDep, is_job_id, known_query
from server.api.guard import require
from server.api.problems import invalid, job_not_found, responses
from server.api.reading import read, read_together
from server.api.roots import refusals_as_problems
from server.confinement import Confinement
from server.settings import Queue, Settings
from server.store import Store
from server.store_protocol import JobFilters
from server.webhooks import fault_of_webhook
from server.wire import CheckpointList, FieldProblem, JobList, JobStatus, JobView

router = APIRouter(prefix="/v1", dependencies=[Depends(known_query)])

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[!-~]+$",
        description="The same key and body again give the same job; another body is refused.",
    ),
]
_Label = Annotated[str, Query(pattern=r"^[A-Za-z0-9._/-]{1,63}=[^\x00]{0,255}$")]
_MOST_LABELS = 32  # a job has no more; each is a join, of which SQLite takes 63
_BODY_PROBLEMS = responses(400, 413, 415, 422, 503)


def json_body(schema: str) -> dict[str, Any]:
    """OpenAPI for a body that the route reads by itself."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": True, "content": content}}


@router.post(
    "/jobs",
    status_code=202,
    response_model=JobView,
    responses={
        200: {"model": JobView, "description": "The job this key and body made earlier"},
        **_BODY_PROBLEMS,
    },
    openapi_extra=json_body("JobSpec"),
    tags=["jobs"],
)
async def submit_job(
    request: Request,
    response: Response,
    store: StoreDep,
    settings: SettingsDep,
    idempotency_key: IdempotencyKey = None,
) -> JobView:
    """Queue a job; answers at once with its id and `Location`."""
    body = await read_json(request)
    caller = caller_of(request.scope)
    job, created = await run_in_threadpool(_submit, store, settings, caller, body, idempotency_key)
    response.status_code = 202 if created else 200
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job


def _submit(
    store: Store, settings: Settings, caller: Caller, body: Any, idempotency_key: str | None
) -> tuple[JobView, bool]:
    body_sha256 = sha256_of(body)
    if idempotency_key is not None:
        # Looked for before planning: its checkpoints may be gone by now, the job is not.
        earlier = store.earlier_job(idempotency_key, body_sha256)
        if earlier is not None:
            return earlier, False
    spec = parse_spec(body)
    if spec.priority < DEFAULT_PRIORITY:
        require(caller, "admin", f"a priority below {DEFAULT_PRIORITY}")
    _check_webhook(spec, settings)
    return store.create_job(
        plan=_plan(settings, spec),
        idempotency_key=idempotency_key,
        body_sha256=body_sha256,
        submitted_by=caller.name,
        webhook=spec.webhook,
    )


def _check_webhook(spec: JobSpec, settings: Settings) -> None:
    if spec.webhook is None:
        return
    fault = fault_of_webhook(
        spec.webhook, settings.webhook_hosts, has_secret=settings.webhook_secret is not None
    )
    if fault is not None:
        raise invalid([FieldProblem(field="webhook", message=fault)], "webhook_not_allowed")


def _plan(settings: Settings, spec: JobSpec) -> Plan:
    confinement = Confinement.of(settings)
    with refusals_as_problems():
        confinement.check_spec(spec)
    plan = make_plan(spec)
    with refusals_as_problems():
        confinement.check_found(
            unit.checkpoint for unit in plan.units if unit.checkpoint is not None
        )
    return plan


@router.post(
    "/jobs:plan",
    response_model=Plan,
    responses=_BODY_PROBLEMS,
    openapi_extra=json_body("JobSpec"),
    tags=["jobs"],
)
async def plan_job(request: Request, settings: SettingsDep) -> Plan:
    """Units, forward passes and memory a job would take; nothing is queued."""
    body = await read_json(request)
    return await run_in_threadpool(lambda: _plan(settings, parse_spec(body)))


@router.get("/jobs", response_model=JobList, responses=responses(422, 503), tags=["jobs"])
async def list_jobs(
    store: StoreDep,
    status: Annotated[JobStatus | None, Query()] = None,
    kind: Annotated[JobKind | None, Query()] = None,
    queue: Annotated[Queue | None, Query()] = None,
    label: Annotated[
        list[_Label] | None,
        Query(max_length=_MOST_LABELS, description="key=value; all must match"),
    ] = None,
    after: Annotated[
        str | None,
        Query(pattern=r"^[A-Za-z0-9_-]{1,100}$", description="Id of the last job seen."),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Response:
    """Jobs, newest first, a page at a time."""
    labels = dict(pair.split("=", 1) for pair in label or ())
    filters = JobFilters(status=status, kind=kind, queue=queue, labels=labels)
    body = await read(store.list_jobs_json, after=after, limit=limit, **filters)
    return Response(body, media_type="application/json")


@router.get(
    "/jobs/{job_id}", response_model=JobView, responses=responses(404, 422, 503), tags=["jobs"]
)
async def show_job(job_id: str, store: StoreDep) -> Response:
    """One job as it stands now."""
    job = await read_together(store.get_jobs_json, job_id) if is_job_id(job_id) else None
    if job is None:
        raise job_not_found(job_id)
    return Response(job, media_type="application/json")


@router.post(
    "/jobs/{job_id}/cancel",
    response_model=JobView,
    responses=responses(404, 422, 503),
    tags=["jobs"],
)
def cancel_job(job: JobDep, store: StoreDep) -> JobView:
    """Cancel a queued or running job; one that has ended is returned unchanged."""
    cancelled = store.cancel_job(job.id)
    if cancelled is None:
        raise job_not_found(job.id)
    return cancelled


@router.post(
    "/checkpoints",
    response_model=CheckpointList,
    responses=_BODY_PROBLEMS,
    openapi_extra=json_body("Checkpoints"),
    tags=["checkpoints"],
)
async def list_series(request: Request, settings: SettingsDep) -> CheckpointList:
    """The checkpoints a `checkpoints:` section stands for, in order, before a job is made."""
    body = await read_json(request)
    return await run_in_threadpool(_list_series, settings, body)


# What a job needs beside its checkpoints; used to check that section in the words of a job's.
_REST_OF_A_JOB: dict[str, Any] = {
    "kind": "checkpoint_series",
    "name": "listing",
    "batches": {
        "sources": [{"type": "files", "name": "none", "paths": ["none.txt"]}],
        "sequence_length": 8,
        "batch_sequences": 1,
    },
    "measurement": {"loss_batch": "update"},
}


def _list_series(settings: Settings, body: Any) -> CheckpointList:
    try:
        spec = parse_spec(_REST_OF_A_JOB | {"checkpoints": body})
    except SpecError as error:
        raise SpecError(
            [p | {"field": p["field"].removeprefix("checkpoints.")} for p in error.problems]
        ) from None
    assert isinstance(spec, CheckpointSeriesSpec)
    confinement = Confinement.of(settings)
    with refusals_as_problems():
        confinement.check_checkpoints(spec.checkpoints, field="")
    found = list_checkpoints(spec.checkpoints)
    with refusals_as_problems():
        confinement.check_found(found)
    return CheckpointList(data=found)
