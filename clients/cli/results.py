"""`probe results` and `probe plot`: what a job has measured, from a server or from a file."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pydantic import ValidationError

from clients.cli.conventions import (
    InputError,
    JobArgument,
    JsonOption,
    ServerOption,
    add_command,
    connect,
    exit_code_for,
    find_job_id,
    print_json,
    say,
    stdout_console,
)
from probe.unit_results import AnyUnitResult, parse_result
from server.wire import ResultList

if TYPE_CHECKING:
    import altair as alt

ChartFormat = Literal["vega", "svg", "png"]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Write to this file.")
]


def results(
    job_id: JobArgument,
    format: Annotated[
        Literal["table", "json", "csv", "parquet"],
        typer.Option(
            "--format",
            help="csv and parquet hold one row per search; mix_train: per run and task; "
            "continual_learning: per run, task, window and layer.",
        ),
    ] = "table",
    out: OutOption = None,
    server: ServerOption = None,
    json_output: JsonOption = False,
) -> None:
    """Print what a job has measured so far.

    Of a mix scan: a row per ratio, a column per task, then the sweet spot and the crossings. Of a
    training grid (mix_train): the change of every task's loss and accuracy, a row per run. Of
    continual learning: the accuracy of the first, the last and all tasks, a row per method and
    control. Ends with 3 where some point has no eta_c, or some run diverged.
    """
    if json_output:
        format = "json"
    if format == "parquet" and out is None:
        raise InputError("parquet is binary: add --out results.parquet")
    with connect(server) as client:
        job_id = find_job_id(client, job_id)
        found = client.results(job_id)
        if format in ("csv", "parquet"):
            content = client.results_file(job_id, "csv" if format == "csv" else "parquet")
            _write(content, out)
    if format == "json":
        _write_json(found, out)
    elif format == "table":
        _print_table(found, out)
    raise typer.Exit(exit_code_for(found.data))


def _write(content: bytes, out: Path | None) -> None:
    if out is None:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    else:
        write_file(out, content)


def _write_json(found: ResultList, out: Path | None) -> None:
    if out is None:
        print_json(found)
    else:
        write_file(out, results_document(found))


def _print_table(found: ResultList, out: Path | None) -> None:
    from clients.cli.mix_tables import report

    if not found.data:
        say(f"job {found.job_id} is {found.status} and has no results yet")
        return
    if out is None:
        console = stdout_console()
        console.print(report(found.data, width=console.width))
        return
    from io import StringIO

    from rich.console import Console

    text = StringIO()
    Console(file=text, width=160).print(report(found.data, width=160))
    write_file(out, text.getvalue().encode())


def results_document(found: ResultList) -> bytes:
    """Results as the JSON file that `--out` writes and `probe plot` reads."""
    return (found.model_dump_json(indent=2) + "\n").encode()


def write_file(path: Path, content: bytes) -> None:
    """Write a result file and say so on stderr.

    Raises:
        InputError: The path cannot be written.
    """
    try:
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    say(f"wrote {path} ({len(content)} bytes)")


def check_writable(path: Path) -> None:
    """Find out before the work, not after it, that a result file cannot be written.

    Raises:
        InputError: Its directory is missing, or it may not be written there.
    """
    directory = path.absolute().parent
    if not directory.is_dir():
        raise InputError(f"cannot write {path}: there is no directory {directory}")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a directory")
    if not os.access(path if path.exists() else directory, os.W_OK):
        raise InputError(f"cannot write {path}: no permission")


def read_results(path: Path) -> list[AnyUnitResult]:
    """The unit results in a file that `probe results --format json` or `probe run` wrote.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        rows = raw["data"] if isinstance(raw, dict) else raw
        found = [parse_result(row) for row in rows]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        count = f" ({error.error_count()} problems)" if isinstance(error, ValidationError) else ""
        raise InputError(
            f"{path} holds no results{count}; write them with "
            "`probe results ID --format json --out FILE` or `probe run FILE --out FILE`"
        ) from error
    return found


def plot(
    source: Annotated[
        str, typer.Argument(metavar="ID|FILE", help="Id of a job, or a results.json.")
    ],
    scan: Annotated[
        str | None,
        typer.Option(
            metavar="ID|FILE",
            help="Over a training grid (mix_train): draw this mix scan of the same checkpoint.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="chart.svg, chart.png or chart.json (Vega)."),
    ] = None,
    server: ServerOption = None,
    json_output: JsonOption = False,
) -> None:
    """Draw lambda_c against the training step, with 2/eta; of a mix scan against the ratio.

    Of a training grid (mix_train): heat maps of ratio against learning rate, with --scan the
    tasks' eta_c and the sweet spot over them. Of continual learning: accuracy per task over seeds,
    effective steps against their bounds per layer, and signals.

    Without --out: chart.svg in the current directory. With --json: Vega-Lite to stdout.
    """
    if json_output and out is None:
        sys.stdout.write(_chart(source, scan, "vega", server).decode() + "\n")
        return
    out = out or Path("chart.svg")
    write_file(out, _chart(source, scan, chart_format(out), server))
    if json_output:
        print_json({"file": str(out)})
    else:
        print(out)


def chart_format(path: Path) -> ChartFormat:
    """The format that a file's ending asks for.

    Raises:
        InputError: It is none of .svg, .png, .json.
    """
    formats: dict[str, ChartFormat] = {".svg": "svg", ".png": "png", ".json": "vega"}
    if path.suffix.lower() not in formats:
        raise InputError(f"{path}: a chart is written as .svg, .png or .json")
    return formats[path.suffix.lower()]


def _chart(source: str, scan: str | None, format: ChartFormat, server: str | None) -> bytes:
    if scan is not None:
        return _chart_with_scan(source, scan, format, server)
    if _is_file(source):
        return draw(read_results(Path(source)), format)
    with connect(server) as client:
        return client.chart(find_job_id(client, source), format)


def _chart_with_scan(source: str, scan: str, format: ChartFormat, server: str | None) -> bytes:
    from clients.cli.grid_and_scan import grid_and_scan

    runs, units = grid_and_scan(
        _results_of(source, server), _results_of(scan, server), grid_name=source, scan_name=scan
    )
    # Imported here: altair takes a third of a second, which an error does not need.
    from probe.chart_train import train_chart

    return _drawn(train_chart(runs, scan=units), format)


def _results_of(source: str, server: str | None) -> list[AnyUnitResult]:
    if _is_file(source):
        return read_results(Path(source))
    with connect(server) as client:
        return client.results(find_job_id(client, source)).data


def _is_file(source: str) -> bool:
    path = Path(source)
    return path.exists() or bool(path.suffix)  # a job id has no suffix


def draw(found: list[AnyUnitResult], format: ChartFormat) -> bytes:
    """The chart of results as the bytes of a file; needs no server and no browser."""
    from probe.reports import result_chart

    if not found:
        raise InputError("there are no results to draw yet")
    return _drawn(result_chart(found), format)


def _drawn(chart: "alt.VConcatChart", format: ChartFormat) -> bytes:
    from probe.chart_style import to_png, to_svg, to_vega

    if format == "png":
        return to_png(chart)
    if format == "svg":
        return to_svg(chart).encode()
    return (json.dumps(to_vega(chart), indent=2) + "\n").encode()


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    add_command(app, results, "probe results 0f3a --format csv --out results.csv")
    add_command(
        app,
        plot,
        "probe plot 0f3a --out chart.png",
        "probe plot results.json",
        "probe plot trained.json --scan scan.json",
    )
