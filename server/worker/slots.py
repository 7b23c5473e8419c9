"""How many jobs of each queue this worker runs at once, whatever other workers do.

DBOS keeps that number with the queue in the database, one for all workers, and reads it again
before every look at the queue: the worker that came last would decide for everybody. Stored is
therefore 1, and what this worker reads is replaced by its own number. A test holds the private
call this hangs on.
"""

from collections.abc import Callable, Mapping
from typing import Any

from dbos import DBOS

from server.settings import Settings


def slots_of(settings: Settings) -> dict[str, int]:
    """Queue -> jobs at once: one that uses the GPU, `cpu_slots` that do not."""
    slots = {"gpu": 1, "cpu": settings.cpu_slots}
    return {name: slots[name] for name in settings.queues}


def take_jobs(dbos: DBOS, settings: Settings) -> None:
    """Begin to look at the queues; call it after DBOS's launch."""
    _keep_own(dbos._sys_db, slots_of(settings))
    for name in settings.queues:
        DBOS.register_queue(
            name,
            worker_concurrency=1,
            polling_interval_sec=settings.queue_poll_s,
            on_conflict="always_update",
        )


def _keep_own(database: Any, slots: Mapping[str, int]) -> None:
    get_queue: Callable[..., Any] = database.get_queue

    def get_own_queue(name: str, **options: Any) -> Any:
        found = get_queue(name, **options)
        if found is not None and name in slots:
            found._worker_concurrency = slots[name]
        return found

    database.get_queue = get_own_queue
