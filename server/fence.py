"""What a worker writes about a job is written only while the job is its own.

A worker can be silent (stopped, swapped out, cut off) for longer than its lease lasts, lose a job
to another one, and wake up in the middle of a unit. DBOS gives each execution of a job a token and
keeps the current one in the job's row; here every write of ours asks for it, in the same
transaction. So a result or an event of an execution that has been replaced is never seen.
"""

import sqlalchemy as sa
from dbos._context import current_owner_xid  # a contract test holds it

from server import queue
from server.errors import JobTakenError


def execution_token(job_id: str) -> str:
    """The token of the execution that asks; inside a job's workflow only."""
    token = current_owner_xid(job_id)
    assert token is not None, f"{job_id} is not what runs here"
    return token


def require_owner(connection: sa.Connection, job_id: str, token: str | None) -> None:
    """Hold the job's row until the transaction ends, if this token is the current one.

    Args:
        connection: In the transaction of the write.
        job_id: The job.
        token: Of the execution that writes; None: whoever writes is no execution.

    Raises:
        JobTakenError: Another execution has the job, or it was cancelled.
    """
    if token is None:
        return
    workflows = queue.workflow_status_table(connection.engine)
    owner = workflows.c.owner_xid
    is_job = workflows.c.workflow_uuid == job_id
    found: str | None
    if queue.is_sqlite(connection.engine):
        # A write, as its driver begins no transaction for a SELECT.
        found = connection.scalar(
            sa.update(workflows).where(is_job).values(owner_xid=owner).returning(owner)
        )
    else:
        found = connection.scalar(sa.select(owner).where(is_job).with_for_update(key_share=True))
    if found != token:
        raise JobTakenError(
            f"{job_id} is another worker's now, or was cancelled: nothing more is written for it"
        )
