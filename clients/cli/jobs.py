"""`probe submit`, `list`, `show`, `cancel`: jobs on a server."""

import datetime as dt
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from clients.cli.conventions import (
    FAILED,
    InputError,
    JobArgument,
    JsonOption,
    PresetOption,
    ServerOption,
    SetOption,
    add_command,
    connect,
    find_job_id,
    print_json,
    say,
    stderr_console,
    stdout_console,
)
from clients.cli.durations import seconds
from probe.kinds import KINDS

LabelOption = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="KEY=VALUE", help="project=demo. Repeatable."),
]


def submit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Job file, YAML or JSON.")],
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    preset: PresetOption = None,
    overrides: SetOption = None,
    labels: LabelOption = None,
    priority: Annotated[
        int | None,
        typer.Option(help="Place in the queue, 1 first, 10000 last; default 100, or the file's."),
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION", help="The job fails this long after its first start: 90m, 2h, 1d."
        ),
    ] = None,
    webhook: Annotated[
        str | None, typer.Option(metavar="URL", help="Told, signed, when the job has ended.")
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Submitting twice with the same key makes one job.")
    ] = None,
    server: ServerOption = None,
    json_output: JsonOption = False,
) -> None:
    """Queue a job; print its id.

    Relative paths in the file mean the current directory; the server gets them absolute.
    """
    from clients.cli.watch import follow_and_exit
    from probe.spec_load import load_spec, parse_spec, resolved

    loaded = load_spec(file, overrides or [], preset)
    spec = resolved(loaded)
    spec["labels"] = spec["labels"] | parse_labels(labels)
    if priority is not None:
        spec["priority"] = priority
    if time_limit is not None:
        spec["time_limit_s"] = seconds(time_limit, "--time-limit")
    spec["webhook"] = loaded.webhook if webhook is None else webhook  # no dump holds it
    absolute = parse_spec(absolute_paths(spec, Path.cwd()))
    with connect(server) as client:
        job = client.submit(absolute, idempotency_key=idempotency_key)
        if not watch:
            print_json(job) if json_output else print(job.id)
            return
        if not json_output:
            print(job.id, flush=True)
        follow_and_exit(client, job, json_output=json_output, json_events=False)


def parse_labels(words: list[str] | None) -> dict[str, str]:
    """`key=value` words as a mapping.

    Raises:
        InputError: A word has no `=`.
    """
    labels = {}
    for word in words or []:
        key, separator, value = word.partition("=")
        if not separator or not key:
            raise InputError(f"--label needs key=value, got {word!r}")
        labels[key] = value
    return labels


def absolute_paths(spec: dict[str, Any], base: Path) -> dict[str, Any]:
    """The resolved spec with its local paths absolute, for a server that runs elsewhere.

    A tokenizer is a path only where it exists as one; else it is a hub id and left alone.
    """
    if spec["kind"] == "continual_learning":
        return spec | {"stream": spec["stream"] | {"data": _absolute_images(spec, base)}}
    checkpoints = dict(spec["checkpoints"])
    if checkpoints["source"] in ("local", "gguf"):
        checkpoints["path"] = _absolute(checkpoints["path"], base)
    model = dict(spec["model"])
    if model["tokenizer"] is not None and os.path.exists(_absolute(model["tokenizer"], base)):
        model["tokenizer"] = _absolute(model["tokenizer"], base)
    data = {name: spec[name] for name in ("batches", "mixture", "eval_tasks") if name in spec}
    with_files: dict[str, Any] = _absolute_files(data, base)
    return spec | {"checkpoints": checkpoints, "model": model} | with_files


def _absolute_images(spec: dict[str, Any], base: Path) -> dict[str, Any]:
    found: dict[str, Any] = spec["stream"]["data"]
    fields = {"idx": ("images", "labels"), "npz": ("path",)}.get(found["type"], ())
    return found | {field: _absolute(found[field], base) for field in fields}


def _absolute_files(part: Any, base: Path) -> Any:
    """A part of a spec with the paths of its data files absolute, wherever they stand in it."""
    if isinstance(part, list):
        return [_absolute_files(inner, base) for inner in part]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "files":
        return part | {"paths": [_absolute(path, base) for path in part["paths"]]}
    return {name: _absolute_files(inner, base) for name, inner in part.items()}


def _absolute(path: str, base: Path) -> str:
    return os.path.normpath(base / os.path.expanduser(path))


def list_jobs(
    status: Annotated[
        Literal["queued", "running", "succeeded", "failed", "cancelled"] | None,
        typer.Option(help="Only jobs in this state."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help=f"Only jobs of this kind: {', '.join(KINDS)}.")
    ] = None,
    queue: Annotated[
        Literal["gpu", "cpu"] | None, typer.Option(help="Only jobs of this queue.")
    ] = None,
    labels: LabelOption = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 20,
    server: ServerOption = None,
    json_output: JsonOption = False,
) -> None:
    """List jobs, newest first."""
    from itertools import islice

    from clients.cli.tables import jobs_table

    with connect(server) as client:
        found = client.iter_jobs(status=status, kind=kind, queue=queue, labels=parse_labels(labels))
        jobs = list(islice(found, limit + 1))
    shown = jobs[:limit]
    has_more = len(jobs) > limit
    if json_output:
        print_json({"object": "list", "data": shown, "has_more": has_more})
        return
    if not shown:
        say("no jobs")
        return
    console = stdout_console()
    console.print(jobs_table(shown, now=dt.datetime.now(dt.UTC), width=console.width))
    if has_more:
        say(f"there are more; --limit {limit * 5} shows more")


def show(
    job_id: JobArgument,
    spec: Annotated[bool, typer.Option("--spec", help="Print the resolved spec too.")] = False,
    server: ServerOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show one job as it stands now."""
    from clients.cli.tables import job_table

    with connect(server) as client:
        job = client.job(find_job_id(client, job_id))
    if json_output:
        print_json(job)
        return
    console = stdout_console()
    console.print(job_table(job))
    if spec:
        import yaml

        text = yaml.safe_dump(job.spec, sort_keys=False, allow_unicode=True)
        console.print("\n" + text.rstrip(), markup=False, soft_wrap=True)


def cancel(
    job_id: JobArgument, server: ServerOption = None, json_output: JsonOption = False
) -> None:
    """Cancel a queued or running job; finished units keep their results."""
    from server.wire import TERMINAL

    with connect(server) as client:
        job_id = find_job_id(client, job_id)
        ended_before = client.job(job_id).status in TERMINAL
        job = client.cancel(job_id)
    if json_output:
        print_json(job)
    elif not ended_before:
        stderr_console().print(f"job {job.id}: cancel requested, now {job.status}")
    if ended_before and job.status != "cancelled":
        say(f"job {job.id} has {job.status} already: nothing to cancel")
        raise typer.Exit(FAILED)


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    add_command(
        app,
        submit,
        "probe submit configs/demo-series.yaml --set measurement.repeats=3 --watch",
        "probe submit configs/demo-series.yaml --priority 200 --time-limit 2h",
    )
    add_command(
        app, list_jobs, "probe list --status running --queue gpu --label project=demo", name="list"
    )
    add_command(app, show, "probe show 0f3a --json")
    add_command(app, cancel, "probe cancel 0f3a")
