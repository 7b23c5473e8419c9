"""`probe workers`: who takes jobs, from which queues, and what each one does now."""

import datetime as dt
from collections.abc import Iterable
from typing import TYPE_CHECKING

import typer

from clients.cli.conventions import (
    JsonOption,
    ServerOption,
    add_command,
    connect,
    print_json,
    say,
    stdout_console,
)
from server.wire import WorkerView

if TYPE_CHECKING:
    from rich.table import Table


def workers(server: ServerOption = None, json_output: JsonOption = False) -> None:
    """List the workers that have reported, most recent heartbeat first."""
    with connect(server) as client:
        found = client.workers()
    if json_output:
        print_json(found)
        return
    if not found.data:
        say("no worker has reported; queued jobs wait until one does: `probe worker`")
        return
    stdout_console().print(workers_table(found.data, now=dt.datetime.now(dt.UTC)))


def workers_table(found: Iterable[WorkerView], *, now: dt.datetime) -> "Table":
    """One row per worker.

    Args:
        found: The workers.
        now: What the age of a heartbeat is counted from.
    """
    from rich.text import Text

    from clients.cli.tables import NONE, age, plain_table

    table = plain_table()
    for name in ("name", "host", "state", "queues", "device", "jobs"):
        table.add_column(name, overflow="fold")
    table.add_column("heartbeat", justify="right", no_wrap=True)
    for worker in found:
        table.add_row(
            Text(worker.name),
            Text(worker.hostname),
            Text("alive", style="green") if worker.alive else Text("gone", style="dim"),
            ", ".join(_with_slots(worker)),
            Text(worker.device),
            ", ".join(job_id[-6:] for job_id in worker.current_job_ids) or NONE,
            f"{age(worker.last_heartbeat, now)} ago",
        )
    return table


def _with_slots(worker: WorkerView) -> list[str]:
    """The queues, each with how many of its jobs run at once where it is known."""
    slots = worker.slots
    return [f"{name} x{slots[name]}" if name in slots else name for name in worker.queues]


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, workers, "probe workers", "probe workers --json")
