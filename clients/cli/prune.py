"""`probe prune`: remove ended jobs by rules, on the database itself."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from clients.cli.conventions import InputError, JsonOption, add_command
from clients.cli.durations import seconds
from clients.cli.jobs import LabelOption, parse_labels
from clients.cli.up import become
from probe.kinds import KINDS

_STATUSES = ("succeeded", "failed", "cancelled")


def prune(
    older_than: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Ended at least so long ago: 12h, 90d.")
    ] = None,
    status: Annotated[
        str | None, typer.Option(help="Of succeeded, failed, cancelled, with commas between.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help=f"Of {', '.join(KINDS)}, with commas between.")
    ] = None,
    labels: LabelOption = None,
    keep_last: Annotated[
        int, typer.Option(min=0, help="The newest so many ended jobs of each name stay.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would go, and end.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    vacuum: Annotated[
        bool,
        typer.Option(
            "--vacuum",
            help="Write the SQLite file anew so that it shrinks; nobody can write meanwhile.",
        ),
    ] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="PROBE_DATA_DIR", help="Database and logs.", show_default=False),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Remove ended jobs that all given rules pick, with results, events and logs, for good.

    Works on the database (PROBE_DATABASE_URL, else the one in the data directory), also while the
    service runs; not over HTTP. Queued and running jobs stay. Shows what would go and asks first.
    """
    words: list[str] = []
    if older_than is not None:
        words += ["--older-than-s", str(seconds(older_than, "--older-than"))]
    words += _each("--status", status, _STATUSES) + _each("--kind", kind, tuple(KINDS))
    for key, value in parse_labels(labels).items():
        words += ["--label", f"{key}={value}"]
    words += ["--keep-last", str(keep_last)] if keep_last else []
    flags: list[tuple[Literal["--dry-run", "--yes", "--vacuum", "--json"], bool]] = [
        ("--dry-run", dry_run),
        ("--yes", yes),
        ("--vacuum", vacuum),
        ("--json", json_output),
    ]
    words += [name for name, is_set in flags if is_set]
    words += [] if data_dir is None else ["--data-dir", str(data_dir)]
    become("server.prune", words)


def _each(option: str, text: str | None, choices: tuple[str, ...]) -> list[str]:
    words: list[str] = []
    for word in [] if text is None else [part.strip() for part in text.split(",")]:
        if word not in choices:
            raise InputError(f"{option} knows {', '.join(choices)}, got {word!r}")
        words += [option, word]
    return words


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        prune,
        "probe prune --older-than 90d --status failed,cancelled --dry-run",
        "probe prune --older-than 90d --keep-last 5 --yes",
    )
