"""Routes that give a job's results as tables and charts."""

import threading
from collections import OrderedDict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query
from fastapi.responses import JSONResponse, Response

from probe.chart_style import Theme, to_png, to_svg, to_vega
from probe.reports import long_form, result_chart
from server.api.context import JobDep, StoreDep, known_query
from server.api.media import choose_format
from server.api.problems import ProblemError, responses
from server.wire import ResultList

router = APIRouter(prefix="/v1/jobs/{job_id}", dependencies=[Depends(known_query)])

VEGA_LITE = "application/vnd.vegalite.v6+json"
RESULT_TYPES = {
    "json": ("application/json",),
    "csv": ("text/csv",),
    "parquet": ("application/vnd.apache.parquet",),
}
CHART_TYPES = {
    "vega": (
        VEGA_LITE,
        "application/vnd.vegalite.v5+json",  # what older clients ask for
        "application/vnd.vegalite+json",
        "application/json",
    ),
    "svg": ("image/svg+xml",),
    "png": ("image/png",),
}
Accept = Annotated[str | None, Header(include_in_schema=False)]


def _contents(types: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    return {names[0]: {"schema": {}} for names in types.values()}


@router.get(
    "/results",
    response_model=ResultList,
    responses={
        200: {"content": {name: {} for name in ("text/csv", RESULT_TYPES["parquet"][0])}},
        **responses(404, 406, 422, 503),
    },
    tags=["results"],
)
def job_results(
    job: JobDep,
    store: StoreDep,
    format: Annotated[
        Literal["json", "csv", "parquet"] | None, Query(description="Instead of Accept.")
    ] = None,
    accept: Accept = None,
) -> Response:
    """Results of the units finished so far: JSON, or one row per search as CSV or Parquet.

    Of a training grid one row per run and task, of continual learning one per run, task, window
    and layer.
    """
    chosen = choose_format(format, accept, RESULT_TYPES)
    results = store.unit_results(job.id)
    headers = {"Vary": "Accept"}
    if chosen == "json":
        listed = ResultList.of(job.id, job.status, results)
        return Response(listed.model_dump_json(), 200, headers, media_type="application/json")
    headers["Content-Disposition"] = f'attachment; filename="{job.id}.{chosen}"'
    table = long_form(job.kind, results)
    content = table.csv() if chosen == "csv" else table.parquet()
    return Response(content, 200, headers, media_type=RESULT_TYPES[chosen][0])


class _Drawn:
    """The charts drawn last. Results are only ever added, so their number names a drawing."""

    def __init__(self, size: int = 64) -> None:
        self._lock = threading.Lock()
        self._size = size
        self._charts: OrderedDict[tuple[str, int, str, str], bytes] = OrderedDict()

    def get(self, key: tuple[str, int, str, str]) -> bytes | None:
        with self._lock:
            return self._charts.get(key)

    def put(self, key: tuple[str, int, str, str], content: bytes) -> None:
        with self._lock:
            self._charts[key] = content
            while len(self._charts) > self._size:
                self._charts.popitem(last=False)


_drawn = _Drawn()


@router.get(
    "/chart",
    response_class=Response,
    responses={
        200: {"description": "The chart", "content": _contents(CHART_TYPES)},
        304: {"description": "Not changed since the ETag sent in If-None-Match"},
        **responses(404, 406, 409, 422, 503),
    },
    tags=["results"],
)
def job_chart(
    job: JobDep,
    store: StoreDep,
    format: Annotated[
        Literal["vega", "svg", "png"] | None, Query(description="Instead of Accept.")
    ] = None,
    theme: Annotated[Theme, Query(description="Colours for a light or a dark page.")] = "light",
    units: Annotated[
        int | None, Query(description="Changes nothing; gives a newer drawing its own address.")
    ] = None,
    accept: Accept = None,
    if_none_match: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> Response:
    """Critical sharpness against the step, with 2/eta and the loss, as far as it is measured.

    Of a mix scan: against the ratio, one line per task, with the sweet spot. Of a training grid:
    heat maps of ratio against learning rate, two per task. Of continual learning: accuracy per
    task over seeds, effective steps against their bounds per layer, and signals.
    """
    chosen = choose_format(format, accept, CHART_TYPES)
    if job.num_units_finished == 0:
        raise ProblemError(
            409,
            "no_results",
            f"job {job.id} is {job.status} and has no finished unit yet, so there is nothing to "
            "draw; GET its /events to see when there is",
        )
    key = (job.id, job.num_units_finished, chosen, theme)
    headers = {
        "Vary": "Accept",
        "Cache-Control": "no-cache",
        "ETag": f'"{job.num_units_finished}-{chosen}-{theme}"',
    }
    if if_none_match == headers["ETag"]:
        return Response(None, 304, headers)
    content = _drawn.get(key)
    if content is None:
        chart = result_chart(store.unit_results(job.id), theme)
        if chosen == "vega":
            content = bytes(JSONResponse(to_vega(chart)).body)
        else:
            content = to_svg(chart).encode() if chosen == "svg" else to_png(chart)
        _drawn.put(key, content)
    return Response(content, 200, headers, media_type=CHART_TYPES[chosen][0])
