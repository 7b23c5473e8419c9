"""The lease of a worker's name: one row of `workers`, counted on the database's clock.

Whoever holds it is the only process that works under the name, on whatever machine: DBOS gives a
job to a name, and a second process of that name would take the first one's jobs for its own.
"""

import sqlalchemy as sa
from sqlalchemy.sql.dml import ReturningUpdate

from server import queue, tables
from server.errors import WorkerNameTakenError
from server.tables import workers
from server.wire import WorkerView


class Lease:
    """The lease of one name, held or wanted by one process."""

    def __init__(self, engine: sa.Engine, name: str, instance: str, worker_stale_s: float) -> None:
        """Nothing is asked yet.

        Args:
            engine: The database.
            name: The worker's name.
            instance: Of this process; no two processes ever have the same.
            worker_stale_s: How long the lease lasts without being renewed.
        """
        self.instance = instance
        self._engine = engine
        self._name = name
        self._stale_ms = int(worker_stale_s * 1000)
        self._now = tables.now_ms(engine)
        self._workflows = queue.workflow_status_table(engine)

    def take(self, view: WorkerView, ended: list[str]) -> None:
        """Become the holder, where nobody is, or nobody is any more.

        Args:
            view: What is shown of this worker.
            ended: Instances that are known to be gone, whatever their lease says.

        Raises:
            WorkerNameTakenError: Another process holds it.
        """
        values = {
            "instance": self.instance,
            "last_heartbeat": self._now,
            "stopped": False,
            "view": view.model_dump(mode="json"),
        }
        free = sa.or_(
            workers.c.stopped,
            workers.c.instance.is_(None),  # written before there were leases
            workers.c.instance.in_(ended),
            # Either way: a heartbeat from the future is of a clock that was set back since.
            sa.func.abs(self._now - workers.c.last_heartbeat) > self._stale_ms,
        )
        with self._engine.begin() as connection:
            taken = connection.execute(
                queue.insert(self._engine, workers)
                .values(name=self._name, **values)
                .on_conflict_do_update(index_elements=["name"], set_=values, where=free)
                .returning(workers.c.instance)
            ).first()
        if taken is None:
            raise WorkerNameTakenError(f"{self._holder()}: use --name to start another one")

    def renew(self, view: WorkerView) -> tuple[int, dict[str, str]]:
        """Show that this process lives.

        Returns:
            The database's clock in ms, and the token of every job that this worker has.

        Raises:
            WorkerNameTakenError: Another process holds the lease now.
        """
        with self._engine.begin() as connection:
            now = connection.scalar(self._update(view, stopped=False))
            if now is None:
                connection.rollback()
                raise WorkerNameTakenError(
                    f"{self._holder()}, as this process was silent for longer than a lease lasts: "
                    "nothing is to be done if that one was meant to take over, else give each a "
                    "name of its own"
                )
            workflows = self._workflows.c
            query = sa.select(workflows.workflow_uuid, workflows.owner_xid)
            query = query.where(workflows.status == "PENDING", workflows.executor_id == self._name)
            return now, {row.workflow_uuid: row.owner_xid for row in connection.execute(query)}

    def release(self, view: WorkerView) -> None:
        """Say that this process ends; a lease of another process is left alone."""
        with self._engine.begin() as connection:
            connection.execute(self._update(view, stopped=True))

    def _update(self, view: WorkerView, *, stopped: bool) -> ReturningUpdate[int]:
        return (
            sa.update(workers)
            .where(workers.c.name == self._name, workers.c.instance == self.instance)
            .values(last_heartbeat=self._now, stopped=stopped, view=view.model_dump(mode="json"))
            .returning(workers.c.last_heartbeat)
        )

    def _holder(self) -> str:
        query = sa.select(workers.c.view, (self._now - workers.c.last_heartbeat).label("silent_ms"))
        with self._engine.connect() as connection:
            row = connection.execute(query.where(workers.c.name == self._name)).first()
        if row is None:
            return f"the lease of worker {self._name!r} has been removed"
        return (
            f"a worker named {self._name!r} runs on {row.view['hostname']} "
            f"(process {row.view['pid']}, heard of {row.silent_ms / 1000:.0f} s ago)"
        )
