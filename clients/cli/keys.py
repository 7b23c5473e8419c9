"""`probe keys`: make, list and revoke API keys, on the database itself."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from clients.cli.conventions import JsonOption, add_command, example
from clients.cli.up import become

app = typer.Typer(
    no_args_is_help=True,
    help="API keys: make, list, revoke.\n\nWorks on the database (PROBE_DATABASE_URL, else the "
    "one in the data directory), not over HTTP.",
    short_help="API keys: make, list, revoke.",
    epilog=example("probe keys create ann --scope submit", "probe keys list"),
)
DataDirOption = Annotated[
    Path | None,
    typer.Option(envvar="PROBE_DATA_DIR", help="Where the database is.", show_default=False),
]


def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Shown as submitted_by of jobs.")],
    scope: Annotated[
        Literal["read", "submit", "admin"],
        typer.Option(
            help="read: look at everything; submit: also plan, submit and cancel jobs; admin: "
            "also priorities below 100 and imports."
        ),
    ],
    expires: Annotated[
        float | None, typer.Option(metavar="DAYS", min=0.001, help="Days until it ends; or never.")
    ] = None,
    data_dir: DataDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make an API key and print it: it is shown this once and not kept.

    From the first key on, every server of the database asks for one, on loopback too.
    """
    words = ["create", name, "--scope", scope]
    words += [] if expires is None else ["--expires", str(expires)]
    _become(words, data_dir, json_output)


def list_keys(data_dir: DataDirOption = None, json_output: JsonOption = False) -> None:
    """List API keys, expired and revoked ones too; never the keys themselves."""
    _become(["list"], data_dir, json_output)


def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name or id of the key.")],
    data_dir: DataDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """End an API key for ever; servers stop taking it within 2 seconds."""
    _become(["revoke", name], data_dir, json_output)


def _become(words: list[str], data_dir: Path | None, json_output: bool) -> None:
    words += [] if data_dir is None else ["--data-dir", str(data_dir)]
    words += ["--json"] if json_output else []
    become("server.key_command", words)


add_command(app, create, "probe keys create ci --scope submit --expires 90")
add_command(app, list_keys, "probe keys list --json", name="list")
add_command(app, revoke, "probe keys revoke ci")
