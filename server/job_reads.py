"""Reading jobs: one, a page of them, how many; as `JobView`s, and as the JSON that is sent.

A page is found in two steps. The ids come from an index alone, whatever the filters; then the
jobs are read by their ids. The JSON of what has ended is there already (see `ended_views`), and
comes with the ids.
"""

from collections.abc import Sequence
from typing import Any, get_args

import sqlalchemy as sa

from server import queue
from server.ended_views import is_current
from server.job_views import job_view, job_views
from server.queue import again_if_lost
from server.queue_position import Forecast
from server.store_protocol import JobFilters
from server.tables import ended_views, job_labels, jobs
from server.wire import TERMINAL, JobList, JobStatus, JobView

_IDS = "ids"
# As a literal: of a parameter Postgres would suppose a tenth of the table, and plan for that.
_LIMIT: sa.BindParameter[int] = sa.bindparam("limit", type_=sa.Integer, literal_execute=True)


class JobReads:
    """Thread-safe; nothing here writes."""

    def __init__(self, engine: sa.Engine, forecast: Forecast) -> None:
        """Read through `engine`; `forecast` adds what is known of waiting jobs."""
        self._engine = engine
        self._forecast = forecast
        self._workflows = queue.workflow_status_table(engine)
        self._views = job_views(self._workflows)
        self._bodies = sa.select(ended_views.c.job_id, ended_views.c.body).where(
            ended_views.c.job_id.in_(_bound_ids()), is_current()
        )
        of_it = sa.and_(ended_views.c.job_id == jobs.c.id, is_current())
        with_body = self._views.outerjoin(ended_views, of_it).add_columns(ended_views.c.body)
        self._one = with_body.where(jobs.c.id == sa.bindparam("id"))
        self._some = self._views.where(jobs.c.id.in_(_bound_ids())).order_by(jobs.c.id.desc())
        self._statements: dict[Any, sa.Select[Any]] = {}

    @again_if_lost
    def get(self, job_id: str) -> JobView | None:
        """One job as it stands now."""
        with self._engine.connect() as connection:
            row = connection.execute(self._one, {"id": job_id}).first()
        if row is None:
            return None
        if row.body is not None:
            return JobView.model_validate_json(row.body)
        return self._forecast.add_to([job_view(row)])[0]

    @again_if_lost
    def get_json(self, job_ids: Sequence[str]) -> dict[str, bytes]:
        """As `get`, as JSON, for several jobs; without those that are not there."""
        with self._engine.connect() as connection:
            rows = connection.execute(self._bodies, {_IDS: job_ids}).all()
            known = {row.job_id: row.body for row in rows}
            live = self._read(connection, [job_id for job_id in job_ids if job_id not in known])
        known |= self._as_json(live)
        return {job_id: body.encode() for job_id, body in known.items()}

    def page(
        self, filters: JobFilters, after: str | None, limit: int
    ) -> tuple[list[JobView], bool]:
        """Jobs, newest first, and whether there are more.

        Args:
            filters: Which jobs.
            after: The jobs older than this one; None: from the newest.
            limit: How many.
        """
        page = JobList.model_validate_json(self.page_json(filters, after, limit))
        return page.data, page.has_more

    @again_if_lost
    def page_json(self, filters: JobFilters, after: str | None, limit: int) -> bytes:
        """As `page`, as the JSON of a `JobList`."""
        with self._engine.connect() as connection:
            found = self._found(connection, filters, after, limit)
            unknown = [job_id for job_id, body in found[:limit] if body is None]
            live = self._read(connection, unknown)
        known = {job_id: body for job_id, body in found[:limit]} | self._as_json(live)
        page = ",".join(body for body in known.values() if body is not None)  # None: just removed
        more = "true" if len(found) > limit else "false"
        return f'{{"object":"list","data":[{page}],"has_more":{more}}}'.encode()

    def _as_json(self, views: Sequence[JobView]) -> dict[str, str]:
        if not views:
            return {}
        return {view.id: view.model_dump_json() for view in self._forecast.add_to(views)}

    @again_if_lost
    def count(self) -> dict[tuple[str, str], int]:
        """How many jobs there are by queue and status; nothing for those there are none of.

        Cost: a scan of one index for what has ended, and the open jobs.
        """
        columns = jobs.c.queue, jobs.c.end_event
        ended = sa.select(*columns, sa.func.count()).where(jobs.c.end_event.is_not(None))
        open_ = (
            sa.select(jobs.c.queue, self._workflows.c.status, sa.func.count())
            .join(self._workflows, self._workflows.c.workflow_uuid == jobs.c.id)
            .where(jobs.c.end_event.is_(None))
        )
        counts: dict[tuple[str, str], int] = {}
        with self._engine.connect() as connection:
            for queue_name, end_event, number in connection.execute(ended.group_by(*columns)):
                counts[queue_name, end_event.removeprefix("job.")] = number
            by = jobs.c.queue, self._workflows.c.status
            for queue_name, status, number in connection.execute(open_.group_by(*by)):
                key = queue_name, queue.job_status(status)
                counts[key] = counts.get(key, 0) + number
        return counts

    def count_by_status(self) -> dict[str, int]:
        """How many jobs are in each state, zeros included."""
        counts: dict[str, int] = dict.fromkeys(get_args(JobStatus), 0)
        for (_queue, status), number in self.count().items():
            counts[status] += number
        return counts

    def _read(self, connection: sa.Connection, ids: Sequence[str]) -> list[JobView]:
        if not ids:
            return []
        return [job_view(row) for row in connection.execute(self._some, {_IDS: ids})]

    def _found(
        self, connection: sa.Connection, filters: JobFilters, after: str | None, limit: int
    ) -> Sequence[Any]:
        """The newest ids that pass, one more than the limit, and what is sent of ended jobs."""
        labels = list((filters.get("labels") or {}).items())
        values: dict[str, Any] = {"limit": limit + 1, "after": after}
        values |= {"kind": filters.get("kind"), "queue": filters.get("queue")}
        for number, (key, value) in enumerate(labels):
            values |= {f"key{number}": key, f"value{number}": value}
        given = frozenset(name for name, value in values.items() if value is not None)
        # Kept, because SQLAlchemy takes longer to make one than the database to answer it.
        shape = filters.get("status"), given, len(labels)
        statement = self._statements.get(shape)
        if statement is None:
            statement = self._statements[shape] = _with_bodies(self._statement(*shape))
        return connection.execute(statement, values).all()

    def _statement(
        self, status: str | None, given: frozenset[str], num_labels: int
    ) -> sa.Select[Any]:
        ends = _ends(status, "queue" in given)
        parts = [self._part(end, status, given, num_labels) for end in ends]
        if len(parts) == 1:
            return parts[0]
        # Each part comes ordered out of its index and ends after `limit` rows. As one condition
        # the database would sort every job of a state, or read all jobs to find a rare one.
        both = sa.union_all(*(sa.select(part.subquery()) for part in parts)).subquery()
        return sa.select(both).order_by(both.c.id.desc()).limit(_LIMIT)

    def _part(
        self, end: str | None, status: str | None, given: frozenset[str], num_labels: int
    ) -> sa.Select[Any]:
        reads_jobs = end is not None or bool(given & {"kind", "queue"})
        if end == "" or not num_labels:
            query, order = _of_jobs(num_labels)
        else:
            query, order = _by_label(num_labels, reads_jobs)
        if end == "":
            query = query.where(jobs.c.end_event.is_(None))
            if status is not None:
                of_dbos = self._workflows.c.status.in_(queue.dbos_statuses(status))
                query = query.join(self._workflows, self._workflows.c.workflow_uuid == jobs.c.id)
                query = query.where(of_dbos)
        elif end is not None:
            query = query.where(jobs.c.end_event == end)
        for name, column in (("kind", jobs.c.kind), ("queue", jobs.c.queue)):
            if name in given:
                query = query.where(column == sa.bindparam(name))
        if "after" in given:
            # Of both: neither planner passes it on, and either side may be the one read in order.
            both = {order, query.selected_columns[0]}
            query = query.where(*(job_id < sa.bindparam("after") for job_id in both))
        return query.order_by(order.desc()).limit(_LIMIT)


def _of_jobs(num_labels: int) -> tuple[sa.Select[Any], sa.ColumnElement[str]]:
    """Jobs, their labels looked up one by one: right where few are open; and what orders them."""
    query = sa.select(jobs.c.id)
    for number in range(num_labels):
        label = job_labels.alias()
        query = query.where(sa.exists().where(label.c.job_id == jobs.c.id, *_has(label, number)))
    return query, jobs.c.id


def _by_label(num_labels: int, reads_jobs: bool) -> tuple[sa.Select[Any], sa.ColumnElement[str]]:
    """Jobs by their first label's index, so that a rare one is found at once."""
    first, *others = labels = [job_labels.alias() for _ in range(num_labels)]
    query = sa.select(jobs.c.id if reads_jobs else first.c.job_id.label("id"))
    if reads_jobs:
        query = query.join(first, first.c.job_id == jobs.c.id)
    for label in others:
        query = query.join(label, label.c.job_id == first.c.job_id)
    for number, label in enumerate(labels):
        query = query.where(*_has(label, number))
    return query, first.c.job_id


def _has(label: sa.FromClause, number: int) -> list[sa.ColumnElement[bool]]:
    pair = {"key": label.c.key, "value": label.c.value}
    return [column == sa.bindparam(f"{name}{number}") for name, column in pair.items()]


def _ends(status: str | None, by_queue: bool) -> list[str | None]:
    """The closing events to look for one by one, "" for none yet; [None] for whichever."""
    if status is None and not by_queue:
        return [None]
    if status is None:
        return ["", *sorted(f"job.{word}" for word in TERMINAL)]
    # A job that DBOS has ended may not have its closing event yet.
    return ["", f"job.{status}"] if status in TERMINAL else [""]


def _with_bodies(statement: sa.Select[Any]) -> sa.Select[Any]:
    found = statement.subquery()
    of_it = sa.and_(ended_views.c.job_id == found.c.id, is_current())
    query = sa.select(found.c.id, ended_views.c.body).select_from(found)
    return query.outerjoin(ended_views, of_it).order_by(found.c.id.desc())


def _bound_ids() -> sa.BindParameter[Any]:
    return sa.bindparam(_IDS, expanding=True)
