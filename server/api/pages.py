"""The dashboard: pages made on the server, so that they work without scripts and escape by default.

`server/web/app.js` keeps them fresh: it listens to the job's event stream and swaps in the same
pages' newer content. Everything comes from this server; nothing is fetched from elsewhere.
"""

import datetime as dt
import json
import math
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from probe import continual_text, mix_text, train_text
from probe.continual_summary import summarise_continual
from probe.mix_summary import summarise_scans
from probe.reports import continual_results, mix_results, series_results, train_results
from probe.tables import summary_rows
from probe.train_summary import summarise_training
from server.api.callers import COOKIE, of_key, session_cookie
from server.api.context import JobDep, StoreDep
from server.api.limits import network_of
from server.api.openapi import operations_of
from server.api.problems import ProblemError
from server.wire import TERMINAL, JobStatus

WEB = Path(__file__).resolve().parent.parent / "web"
router = APIRouter(include_in_schema=False)

_STATIC = {"app.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}
_PAGE_SIZE = 25
_EVENTS_SHOWN = 50
_FRESH = {"Cache-Control": "no-cache"}
_MAX_FORM_BYTES = 4096
_ALT_TEXT = {  # of a chart, by kind of job
    "checkpoint_series": "Critical sharpness of each checkpoint against the training step, with "
    "2/eta",
    "mix_scan": "Relative critical sharpness of each task against the share of the varied source, "
    "with the sweet spot",
    "mix_train": "Heat maps of ratio against learning rate: how far each task's loss and accuracy "
    "moved from the checkpoint, red worse, blue better",
    "continual_learning": "Accuracy of every task over seeds, then per method what bounds predict, "
    "effective steps against the bounds per layer, and signals",
}


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table; an em dash where there is none."""
    if value is None:
        return "\N{EM DASH}"
    if value == 0 or not 1e-4 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}" if value else "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def moment(value: dt.datetime | None) -> str:
    """A point in time, UTC, for people."""
    return (
        "\N{EM DASH}" if value is None else value.astimezone(dt.UTC).strftime("%Y-%m-%d %H:%M:%S")
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "number": number,
        "moment": moment,
        "pretty": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
    }
    environment.filters |= {
        "grid": mix_text.grid,
        "tasks": mix_text.tasks_of,
        "outcome": mix_text.outcome_words,
        "sweet_spot": mix_text.sweet_spot_sentence,
        "crossings": mix_text.crossing_sentences,
        "runs": train_text.runs_of,
        "change": train_text.change_text,
        "harmless": train_text.harmless_sentences,
        "accuracy": continual_text.accuracy_text,
        "correlation": continual_text.correlation_text,
        "edges": continual_text.edge_titles,
        "learned": continual_text.summary_sentences,
    }
    environment.globals["TERMINAL"] = TERMINAL
    return environment


_templates = _environment()


def _page(template: str, status_code: int = 200, **values: Any) -> HTMLResponse:
    return HTMLResponse(_templates.get_template(template).render(**values), status_code, _FRESH)


@router.get("/")
def jobs_page(
    store: StoreDep,
    status: Annotated[JobStatus | None, Query()] = None,
    after: Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_-]{1,100}$")] = None,
) -> HTMLResponse:
    """Every job, newest first, and the workers."""
    jobs, has_more = store.list_jobs(status=status, after=after, limit=_PAGE_SIZE)
    return _page(
        "jobs.html",
        jobs=jobs,
        has_more=has_more,
        status=status,
        after=after,
        counts=store.count_jobs(),
        workers=store.list_workers(),
    )


@router.get("/jobs/{job_id}")
def job_page(job: JobDep, store: StoreDep) -> HTMLResponse:
    """One job: progress, chart, table, events."""
    # Progress is left out by the database: a long job has hundreds of thousands of such events.
    events, last_event_id = store.notable_events(job.id, _EVENTS_SHOWN)
    results = store.unit_results(job.id)
    return _page(
        "job.html",
        job=job,
        rows=summary_rows(series_results(results)),
        scans=summarise_scans(mix_results(results)),
        trainings=summarise_training(train_results(results)),
        continual=summarise_continual(continual_results(results)),
        alt_text=_ALT_TEXT.get(job.kind, "What the job has measured"),
        events=events,
        last_event_id=last_event_id,
    )


@router.post("/jobs/{job_id}/cancel")
def cancel_from_page(job: JobDep, store: StoreDep) -> Response:
    """The button's form, for browsers without scripts too."""
    store.cancel_job(job.id)
    return RedirectResponse(f"/jobs/{job.id}", 303)


@router.get("/static/{name}")
def static_file(name: str) -> Response:
    """The pages' script and style."""
    if name not in _STATIC:
        raise ProblemError(404, "not_found", f"there is no file {name[:60]!r}")
    return FileResponse(WEB / name, media_type=_STATIC[name], headers=_FRESH)


@router.get("/docs")
def docs_page(request: Request) -> HTMLResponse:
    """The API's description; FastAPI's own page would load its scripts from a CDN."""
    document = request.app.openapi()
    return _page("docs.html", document=document, operations=operations_of(document))


@router.get("/login")
def login_page() -> HTMLResponse:
    """Asks for an API key."""
    return _page("login.html", wrong=False)


@router.post("/login")
async def log_in(request: Request) -> Response:
    """Exchange an API key for a session cookie."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_FORM_BYTES:
            raise ProblemError(413, "body_too_large", "a key is shorter than that")
    given = parse_qs(body.decode("utf-8", "replace")).get("key", [""])[0].strip()
    address = network_of(request.client.host if request.client else "")
    if await request.app.state.gate.identify(of_key(given), address) is None:
        return _page("login.html", 401, wrong=True)
    response = RedirectResponse("/", 303)
    response.set_cookie(
        COOKIE,
        session_cookie(given),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
        max_age=30 * 24 * 3600,
    )
    return response
