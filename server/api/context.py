"""What every route needs: the store, the settings, and query strings without typing errors."""

import difflib
import re
from typing import Annotated

from fastapi import Depends, Request

from server.api.problems import invalid, job_not_found
from server.settings import Settings
from server.store import Store
from server.wire import FieldProblem, JobView

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")


# The three that wait for nothing are coroutines: FastAPI runs plain functions in a thread each.
async def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _job(request: Request, store: Annotated[Store, Depends(_store)], job_id: str) -> JobView:
    job = store.get_job(job_id) if is_job_id(job_id) else None
    if job is None:
        raise job_not_found(job_id)
    return job


def is_job_id(text: str) -> bool:
    """Whether a job can have it; others might hold what a database refuses."""
    return _JOB_ID.fullmatch(text) is not None


async def known_query(request: Request) -> None:
    """Refuse query parameters the route does not have: a typing error must not be ignored.

    Raises:
        ProblemError: 422 with the nearest valid name.
    """
    if not request.scope["query_string"]:
        return
    valid = [field.alias for field in request.scope["route"].dependant.query_params]
    unknown = request.query_params.keys() - valid
    if not unknown:
        return
    problems = []
    for name in sorted(unknown):
        close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        choices = f"; valid: {', '.join(valid)}" if valid else ""
        shown = name[:60].encode("ascii", "backslashreplace").decode()
        problems.append(FieldProblem(field=f"query.{shown}", message=f"unknown{hint}{choices}"))
    raise invalid(problems, "validation_error")


StoreDep = Annotated[Store, Depends(_store)]
SettingsDep = Annotated[Settings, Depends(_settings)]
JobDep = Annotated[JobView, Depends(_job)]
