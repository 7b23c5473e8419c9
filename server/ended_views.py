"""The view of every ended job as JSON, written with its closing event and sent as it stands.

What has ended does not change any more. A page of such jobs costs one query of one narrow table,
no parsing and no JSON. Jobs without a row here (open ones, and those that ended under a program
with another `VIEW_VERSION`) are read from their columns, until `fill` has been there.
"""

import logging

import sqlalchemy as sa

from server import queue
from server.job_views import job_view, job_views
from server.tables import ended_views, jobs

logger = logging.getLogger(__name__)

# Raise it with every change of what a JobView says of an ended job: older rows then count as none.
VIEW_VERSION = 1


class EndedViews:
    """Statements are made once: that takes longer than running them."""

    def __init__(self, engine: sa.Engine) -> None:
        """Of the jobs in this database."""
        self._engine = engine
        workflows = queue.workflow_status_table(engine)
        self._view = job_views(workflows).where(
            jobs.c.id == sa.bindparam("of_job"), jobs.c.end_event.is_not(None)
        )
        insert = queue.insert(engine, ended_views)
        new = {name: insert.excluded[name] for name in ("version", "body")}
        self._upsert = insert.on_conflict_do_update(index_elements=["job_id"], set_=new)

    def write(self, connection: sa.Connection, job_id: str) -> None:
        """Keep the view of a job that has ended, in the transaction that ended it or later."""
        row = connection.execute(self._view, {"of_job": job_id}).first()
        if row is None:  # removed meanwhile
            return
        values = {
            "job_id": job_id,
            "version": VIEW_VERSION,
            "body": job_view(row).model_dump_json(),
        }
        connection.execute(self._upsert, values)

    def fill(self, before: str | None, limit: int) -> str | None:
        """Write views that are missing or of another version, the newest jobs first.

        Args:
            before: Of the jobs older than this one; None: from the newest.
            limit: How many, in one transaction.

        Returns:
            The oldest job done; None where nothing was left.
        """
        has_one = sa.exists().where(ended_views.c.job_id == jobs.c.id, is_current())
        query = sa.select(jobs.c.id).where(jobs.c.end_event.is_not(None), sa.not_(has_one))
        if before is not None:
            query = query.where(jobs.c.id < before)
        with self._engine.connect() as connection:
            job_ids = connection.scalars(query.order_by(jobs.c.id.desc()).limit(limit)).all()
        with self._engine.begin() as connection:
            for job_id in job_ids:
                try:
                    self.write(connection, job_id)
                except (KeyError, ValueError):  # as when a newer release has written it
                    logger.warning("the view of %s cannot be made here", job_id, exc_info=True)
        return job_ids[-1] if job_ids else None


def is_current() -> sa.ColumnElement[bool]:
    """Whether a row was written by this version of the program."""
    return ended_views.c.version == VIEW_VERSION
