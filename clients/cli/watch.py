"""`probe watch`: follow a job on a server to its end."""

import time
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from pydantic import ValidationError

from clients.cli.conventions import (
    FAILED,
    JobArgument,
    JsonOption,
    ServerOption,
    add_command,
    connect,
    exit_code_for,
    find_job_id,
    print_json,
    print_json_line,
    stderr_console,
    stdout_console,
)
from probe.result import Summary
from probe.result_curves import StretchSummary
from probe.result_mix import MixUnitSummary
from probe.result_train import TrainUnitSummary
from server.wire import Event, JobView

if TYPE_CHECKING:
    from rich.text import Text

    from clients.cli.progress import ProgressDisplay
    from clients.http import ProbeClient


def watch(
    job_id: JobArgument, server: ServerOption = None, json_output: JsonOption = False
) -> None:
    """Follow a job to its end; print its table. With --json: its events, one a line.

    Ends with 0 where every point has its eta_c, 3 where some has none, 1 where the job failed
    or was cancelled. Ctrl-C stops watching, not the job.
    """
    with connect(server) as client:
        job = client.job(find_job_id(client, job_id))
        follow_and_exit(client, job, json_output=json_output, json_events=True)


def follow_and_exit(
    client: "ProbeClient", job: JobView, *, json_output: bool, json_events: bool
) -> NoReturn:
    """Show a job's progress on stderr until it ends, then its results; exit as it ended.

    Args:
        client: Connected to the job's server.
        job: The job as it was when it was last seen.
        json_output: Nothing but JSON on stdout: the job at its end.
        json_events: With `json_output`: instead of the job, its events as they come.
    """
    from clients.cli.mix_tables import report
    from clients.cli.progress import ProgressDisplay, SeriesProgress

    progress = SeriesProgress.of_job(job.spec, job.num_units, job.expected_forward_passes)
    display = ProgressDisplay(progress, stderr_console(), name=job.name, quiet=json_output)
    with display:
        for event in client.events(job.id):
            if json_output and json_events:
                print_json_line(event)
            show_event(display, event)
    job = client.wait(job.id)  # the last event may come a moment before the state is final
    results = client.results(job.id).data
    if json_output and not json_events:
        print_json(job)
    elif not json_output and results:
        console = stdout_console()
        console.print(report(results, width=console.width))
    raise typer.Exit(exit_code_for(results) if job.status == "succeeded" else FAILED)


def show_event(display: "ProgressDisplay", event: Event) -> None:
    """Bring the display up to date with one event of the server."""
    progress, values = display.progress, event.data
    at_s = event.at.timestamp()
    index = int(values.get("index", -1))
    if event.type == "unit.started":
        display.name_unit(index, str(values.get("unit_id", index)))
        progress.start_unit(index, at_s)
    elif event.type == "unit.progress":
        progress.advance(index, values, min(at_s, time.time()))
    elif event.type == "unit.finished":
        display.name_unit(index, str(values.get("unit_id", index)))
        progress.finish_unit(index, int(values.get("num_forward_passes", 0)))
        display.unit_finished(index, _found_text(values))
    elif event.type == "unit.retrying":
        display.remark(f"{display.label(index)}: tried again after {_reason(values)}", "yellow")
    elif event.type.startswith("job."):
        before, progress.state = progress.state, event.type.removeprefix("job.")
        again = " again: its worker was started anew" if before == progress.state else ""
        reason = f": {_reason(values)}" if event.type == "job.failed" else ""
        style = {"job.failed": "red", "job.cancelled": "yellow"}.get(event.type, "")
        display.remark(f"{progress.state}{again}{reason}", style)


def _found_text(values: dict[str, Any]) -> "Text":
    """What a `unit.finished` event tells, in one line, by the job's kind."""
    from rich.text import Text

    from clients.cli.continual_tables import stretch_text
    from clients.cli.mix_tables import unit_text
    from clients.cli.tables import summaries_text
    from clients.cli.train_tables import run_text

    try:
        if "stretch" in values:
            return stretch_text(StretchSummary.model_validate(values["stretch"]))
        if "scan" in values:
            return unit_text(MixUnitSummary.model_validate(values["scan"]))
        if "run" in values:
            return run_text(TrainUnitSummary.model_validate(values["run"]))
    except ValidationError:  # another version's: the table at the end has it all
        return Text("finished")
    return summaries_text(_summaries_in(values), values.get("stability_threshold"))


def _summaries_in(values: dict[str, Any]) -> list[Summary]:
    rows = values.get("summaries") or values.get("summary") or []
    known = set(Summary.model_fields)
    summaries = []
    for row in rows if isinstance(rows, list) else []:
        try:
            summaries.append(Summary.model_validate({k: v for k, v in row.items() if k in known}))
        except (ValidationError, AttributeError):
            continue  # another version's row: the table at the end has it all
    return summaries


def _reason(values: dict[str, Any]) -> str:
    return f"{values.get('code', 'error')}: {values.get('message', '')}".rstrip(": ")


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    add_command(app, watch, "probe watch 0f3a")
