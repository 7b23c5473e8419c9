"""`probe export` and `probe import`: jobs as folders, from one server to another."""

from pathlib import Path
from typing import Annotated

import typer

from clients.cli.conventions import (
    JsonOption,
    ServerOption,
    add_command,
    connect,
    find_job_id,
    print_json,
    say,
)


def export(
    job_ids: Annotated[
        list[str], typer.Argument(metavar="ID...", help="Ids, or the last characters of them.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Every job gets a folder in it.")
    ] = Path("."),
    partial: Annotated[
        bool,
        typer.Option("--partial", help="Also jobs that have not ended; not for importing."),
    ] = False,
    server: ServerOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write jobs as folders: results as JSON and Parquet, charts, events, spec and plan.

    `probe import` reads such a folder into another server.
    """
    from clients.transfer import export_job

    written = []
    with connect(server) as client:
        for part in job_ids:
            job_id = find_job_id(client, part)
            path, manifest = export_job(client, job_id, out, partial=partial)
            written.append({"path": str(path), "manifest": manifest.model_dump(mode="json")})
            say(f"wrote {path} ({len(manifest.files) + 1} files)")
    if json_output:
        print_json({"object": "list", "data": written})


def import_(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="An exported job, or a folder of them.")
    ],
    server: ServerOption = None,
    json_output: JsonOption = False,
) -> None:
    """Bring exported jobs to a server: they list, show and draw as if they had run there.

    They keep their ids; one that is there already is left as it is. Where keys are asked for, it
    takes one of scope admin.
    """
    from clients.transfer import exports_in, import_job

    jobs = []
    with connect(server) as client:
        for path in exports_in(directory):
            job, created = import_job(client, path)
            jobs.append(job)
            if not json_output:
                print(job.id, flush=True)
            say(f"{path}: {'imported' if created else 'was there already'}")
    if json_output:
        print_json({"object": "list", "data": jobs})


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_command(app, export, "probe export 0f3a 7c21 --out exported")
    add_command(app, import_, "probe import exported --server http://other:8765", name="import")
