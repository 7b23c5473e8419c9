"""Reading jobs: one, a page of them, how many; as `JobView`s, and as the JSON that is sent.

A page is found in two steps. The ids come from an index alone, whatever the filters; then the
jobs are read by their ids. What has ended does not change any more, so its JSON is made once and
kept, and a page of such jobs costs one query and no parsing.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, get_args

import sqlalchemy as sa

from server import queue
from server.job_views import job_view, job_views
from server.queue_position import Forecast
from server.store_protocol import JobFilters
from server.tables import job_labels, jobs
from server.wire import TERMINAL, JobStatus, JobView

_KEPT_BYTES = 32 * 2**20  # some 15,000 jobs
_IDS = "ids"


class JobReads:
    """Thread-safe; nothing here writes."""

    def __init__(self, engine: sa.Engine, forecast: Forecast) -> None:
        """Read through `engine`; `forecast` adds what is known of waiting jobs."""
        self._engine = for_reading(engine)
        self._forecast = forecast
        self._workflows = queue.workflow_status_table(engine)
        self._views = job_views(self._workflows)
        self._ended_views = _of_ended(self._views)
        self._one = self._views.where(jobs.c.id == sa.bindparam("id"))
        self._some = self._views.where(jobs.c.id.in_(_bound_ids())).order_by(jobs.c.id.desc())
        self._statements: dict[Any, sa.Select[Any]] = {}
        self._kept = _Kept(_KEPT_BYTES)

    def get(self, job_id: str) -> JobView | None:
        """One job as it stands now."""
        with self._engine.connect() as connection:
            row = connection.execute(self._one, {"id": job_id}).first()
        return None if row is None else self._forecast.add_to([job_view(row)])[0]

    def get_json(self, job_id: str) -> bytes | None:
        """As `get`, as JSON."""
        with self._engine.connect() as connection:
            row = connection.execute(self._ended_views, {_IDS: [job_id]}).first()
        if row is not None:
            return _json_of(row)
        view = self.get(job_id)
        return None if view is None else view.model_dump_json().encode()

    def page(
        self, filters: JobFilters, after: str | None, limit: int
    ) -> tuple[list[JobView], bool]:
        """Jobs, newest first, and whether there are more.

        Args:
            filters: Which jobs.
            after: The jobs older than this one; None: from the newest.
            limit: How many.
        """
        with self._engine.connect() as connection:
            found = self._ids(connection, filters, after, limit)
            views = self._read(connection, [row.id for row in found[:limit]])
        return self._forecast.add_to(views), len(found) > limit

    def page_json(
        self, filters: JobFilters, after: str | None, limit: int
    ) -> tuple[list[bytes], bool]:
        """As `page`, each job as JSON."""
        with self._engine.connect() as connection:
            found = self._ids(connection, filters, after, limit)
            # The time of an import is part of the name: an id may come back after a removal.
            names = {row.id: (row.id, row.imported_at) for row in found[:limit]}
            ended = [row.id for row in found[:limit] if row.end_event is not None]
            known = self._kept.get({job_id: names[job_id] for job_id in ended})
            unread = [job_id for job_id in ended if job_id not in known]
            if unread:
                rows = connection.execute(self._ended_views, {_IDS: unread}).all()
                made = {row.id: _json_of(row) for row in rows}
                self._kept.put({names[job_id]: made[job_id] for job_id in made})
                known |= made
            live = self._read(connection, [job_id for job_id in names if job_id not in known])
        known |= {v.id: v.model_dump_json().encode() for v in self._forecast.add_to(live)}
        return [known[job_id] for job_id in names if job_id in known], len(found) > limit

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

    def _ids(
        self, connection: sa.Connection, filters: JobFilters, after: str | None, limit: int
    ) -> Sequence[Any]:
        """The newest ids that pass, one more than the limit."""
        labels = list((filters.get("labels") or {}).items())
        values: dict[str, Any] = {"limit": limit + 1, "after": after}
        values |= {"kind": filters.get("kind"), "queue": filters.get("queue")}
        for number, (key, value) in enumerate(labels):
            values |= {f"key{number}": key, f"value{number}": value}
        given = frozenset(name for name, value in values.items() if value is not None)
        statement = self._statement(filters.get("status"), given, len(labels))
        return connection.execute(statement, values).all()

    def _statement(
        self, status: str | None, given: frozenset[str], num_labels: int
    ) -> sa.Select[Any]:
        # Kept, because SQLAlchemy takes longer to make one than the database to answer it.
        shape = status, given, num_labels
        found = self._statements.get(shape)
        if found is None:
            parts = [self._part(end, *shape) for end in _ends(status, "queue" in given)]
            if len(parts) == 1:
                found = parts[0]
            else:
                # Each part comes ordered out of its index and ends after `limit` rows. As one
                # condition the database would sort every job of a state, or read all jobs to
                # find a rare one.
                both = sa.union_all(*(sa.select(part.subquery()) for part in parts)).subquery()
                found = (
                    sa.select(both)
                    .order_by(both.c.id.desc())
                    .limit(sa.bindparam("limit", type_=sa.Integer))
                )
            self._statements[shape] = found
        return found

    def _part(
        self, end: str | None, status: str | None, given: frozenset[str], num_labels: int
    ) -> sa.Select[Any]:
        query = sa.select(jobs.c.id, jobs.c.end_event, jobs.c.imported_at)
        order: sa.ColumnElement[str] = jobs.c.id
        for number in range(num_labels):
            label = job_labels.alias()
            query = query.join(label, label.c.job_id == jobs.c.id).where(
                label.c.key == sa.bindparam(f"key{number}"),
                label.c.value == sa.bindparam(f"value{number}"),
            )
            # By the label's index, so that a rare label is found at once.
            order = label.c.job_id if number == 0 else order
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
            query = query.where(order < sa.bindparam("after"))
        return query.order_by(order.desc()).limit(sa.bindparam("limit", type_=sa.Integer))


def for_reading(engine: sa.Engine) -> sa.Engine:
    """The same connections, without a transaction around single reads of Postgres.

    Its begin and end are two more trips to the database. SQLite's driver begins none for reads.
    """
    if queue.is_sqlite(engine):
        return engine
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def _ends(status: str | None, by_queue: bool) -> list[str | None]:
    """The closing events to look for one by one, "" for none yet; [None] for whichever."""
    if status is None and not by_queue:
        return [None]
    if status is None:
        return ["", *sorted(f"job.{word}" for word in TERMINAL)]
    # A job that DBOS has ended may not have its closing event yet.
    return ["", f"job.{status}"] if status in TERMINAL else [""]


def _of_ended(views: sa.Select[Any]) -> sa.Select[Any]:
    """The views of the ended jobs among `ids`, their JSON columns as text."""
    columns = [
        sa.cast(column, sa.Text).label(column.key) if isinstance(column.type, sa.JSON) else column
        for column in views.selected_columns
    ]
    return views.with_only_columns(*columns).where(
        jobs.c.id.in_(_bound_ids()), jobs.c.end_event.is_not(None)
    )


def _bound_ids() -> sa.BindParameter[Any]:
    return sa.bindparam(_IDS, expanding=True)


def _json_of(row: Any) -> bytes:
    """An ended job's row as JSON; the spec is passed on as it is stored."""
    columns = SimpleNamespace(**row._mapping)
    columns.spec, columns.labels = json.loads(row.spec), json.loads(row.labels)
    view = job_view(columns).model_dump_json(exclude={"spec"})
    return f'{view[:-1]},"spec":{row.spec}}}'.encode()


class _Kept:
    """The JSON of ended jobs that was sent last, up to a number of bytes."""

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._left = size
        self._texts: OrderedDict[Any, bytes] = OrderedDict()

    def get(self, names: Mapping[str, Any]) -> dict[str, bytes]:
        found = {}
        with self._lock:
            for job_id, name in names.items():
                text = self._texts.get(name)
                if text is not None:
                    self._texts.move_to_end(name)
                    found[job_id] = text
        return found

    def put(self, texts: Mapping[Any, bytes]) -> None:
        with self._lock:
            for name, text in texts.items():
                if name not in self._texts:
                    self._texts[name] = text
                    self._left -= len(text)
            while self._left < 0:
                _, dropped = self._texts.popitem(last=False)
                self._left += len(dropped)
