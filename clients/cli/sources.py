"""`probe checkpoints`: what a path, a glob or a hub repository holds, before measuring it."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from clients.cli.conventions import InputError, JsonOption, add_command, print_json, stdout_console
from probe.spec import GgufCheckpoint, HubCheckpoints, LocalCheckpoints

_HUB_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def checkpoints(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A directory, a quoted glob, a .gguf file, or a hub repository."
        ),
    ],
    revisions: Annotated[
        list[str] | None,
        typer.Option(
            "--revisions", metavar="PATTERN", help="Hub revisions: stage1-step*. Repeatable."
        ),
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Every k-th of the sorted series.")] = 1,
    first_step: Annotated[int | None, typer.Option(min=0, help="Leave out earlier ones.")] = None,
    last_step: Annotated[int | None, typer.Option(min=0, help="Leave out later ones.")] = None,
    step_pattern: Annotated[
        str | None, typer.Option(help="Regex with one group: the step in the name.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """List the checkpoints of a series: step, tokens, format, moments, size."""
    from clients.cli.tables import checkpoints_table
    from probe.series import list_checkpoints

    options: dict[str, Any] = {"every": every, "first_step": first_step, "last_step": last_step}
    if step_pattern is not None:
        options["step_pattern"] = step_pattern
    found = list_checkpoints(_series(source, revisions, options))
    if json_output:
        print_json({"object": "list", "data": found})
    else:
        stdout_console().print(checkpoints_table(found))


def _series(
    source: str, revisions: list[str] | None, options: dict[str, Any]
) -> LocalCheckpoints | HubCheckpoints | GgufCheckpoint:
    """The series that the words stand for; what is on this disk comes before the hub.

    Raises:
        InputError: It is not clear, or an option is out of range.
    """
    try:
        if revisions:
            return HubCheckpoints(source="hub", repo=source, revisions=revisions, **options)
        if source.endswith((".gguf", ".gguf.gz")):
            return GgufCheckpoint(source="gguf", path=source)
        if _HUB_REPO.fullmatch(source) and not Path(source).exists():
            raise InputError(
                f"there is no directory {source!r}; for the hub repository of that name add "
                "--revisions 'PATTERN' ('*' for all)"
            )
        return LocalCheckpoints(source="local", path=source, **options)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{field}: {first['msg']}") from error


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    add_command(
        app,
        checkpoints,
        "probe checkpoints 'runs/a/step-*'",
        "probe checkpoints allenai/OLMo-2-0425-1B --revisions 'stage1-step*' --every 10",
    )
