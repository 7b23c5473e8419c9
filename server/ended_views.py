"""The view of every ended job as JSON, written with its closing event and sent as it stands.

What has ended does not change any more. A page of such jobs costs one query of one narrow table,
no parsing and no JSON; a job without a row here (open, or ended under another program's version)
is read from its columns.
"""

import sqlalchemy as sa

from server.job_views import job_view, job_views
from server.tables import ended_views, jobs

# Raise it with every change of what a JobView says of an ended job: older rows then count as none.
VIEW_VERSION = 1


class EndedViews:
    """Statements are made once: that takes longer than running them."""

    def __init__(self, workflows: sa.Table) -> None:
        """Of the jobs whose rows in DBOS are in `workflows`."""
        self._view = job_views(workflows).where(jobs.c.id == sa.bindparam("of_job"))
        self._insert = sa.insert(ended_views)

    def write(self, connection: sa.Connection, job_id: str) -> None:
        """Keep the view of a job that has just ended, in the transaction that ended it."""
        view = job_view(connection.execute(self._view, {"of_job": job_id}).one())
        row = {"job_id": job_id, "version": VIEW_VERSION, "body": view.model_dump_json()}
        connection.execute(self._insert, row)


def is_current() -> sa.ColumnElement[bool]:
    """Whether a row was written by this version of the program."""
    return ended_views.c.version == VIEW_VERSION
