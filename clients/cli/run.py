"""`probe run`: measure a job file here and now, without a server."""

import json
import os
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from clients.cli.children import start_child, stop_children
from clients.cli.conventions import (
    CommandError,
    JsonOption,
    PresetOption,
    SetOption,
    add_command,
    exit_code_for,
    print_json,
    stderr_console,
    stdout_console,
)
from clients.cli.progress import ProgressDisplay, SeriesProgress
from clients.cli.results import chart_format, check_writable, draw, results_document, write_file
from probe.continual_summary import summarise_stretch
from probe.errors import ParallelismError, ProbeError, error_class_for
from probe.launch import (
    TORCHRUN,
    refuse_several_nodes,
    thread_environment,
    torchrun_arguments,
)
from probe.mix_summary import summarise_unit
from probe.result import Plan
from probe.result_continual import ContinualUnitResult
from probe.result_mix import MixUnitResult
from probe.result_train import MixTrainUnitResult
from probe.train_summary import summarise_run
from probe.unit_results import AnyUnitResult, parse_result
from server.wire import ResultList

if TYPE_CHECKING:
    from rich.text import Text

_LOG_LINES = 20  # of the child's own output, shown when it ends badly


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Job file, YAML or JSON.")],
    preset: PresetOption = None,
    overrides: SetOption = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only print the resolved job and its expected passes.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the results as JSON.")
    ] = None,
    chart: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw them: chart.svg, .png or .json."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Measure a job file on this machine, without a server.

    Ends with 0 where every point has its eta_c, 3 where some has none, 1 where it failed.
    """
    from probe.plan import make_plan
    from probe.spec_load import load_spec

    if chart is not None:
        chart_format(chart)  # a wrong ending is better said now than after an hour
    for path in (out, chart):
        if path is not None:
            check_writable(path)
    planned = make_plan(load_spec(file, overrides or [], preset))
    if plan:
        _print_plan(planned, json_output)
        return
    refuse_several_nodes((planned.spec.get("parallel") or {}).get("nodes", 1), "`probe run`")
    results: list[AnyUnitResult] = []
    failure: ProbeError | None = None
    try:
        _measure(planned, results, quiet=json_output)
    except ProbeError as error:  # what is finished is written first
        failure = error
    except KeyboardInterrupt:
        if results:
            so_far = ResultList.of("local", "cancelled", results)
            _give_out(so_far, out, chart, json_output)
        raise
    found = ResultList.of("local", "succeeded" if failure is None else "failed", results)
    _give_out(found, out, chart, json_output)
    if failure is not None:
        raise failure
    raise typer.Exit(exit_code_for(results))


def _give_out(found: ResultList, out: Path | None, chart: Path | None, json_output: bool) -> None:
    from clients.cli.mix_tables import report

    if json_output:
        print_json(found)
    elif found.data:
        console = stdout_console()
        console.print(report(found.data, width=console.width))
    if out is not None:
        write_file(out, results_document(found))
    if chart is not None and found.data:
        write_file(chart, draw(found.data, chart_format(chart)))


def _print_plan(planned: Plan, json_output: bool) -> None:
    if json_output:
        print_json(planned)
        return
    import yaml

    from clients.cli.tables import plan_table

    print(yaml.safe_dump(planned.spec, sort_keys=False, allow_unicode=True).rstrip() + "\n")
    stdout_console().print(plan_table(planned))


def _measure(planned: Plan, results: list[AnyUnitResult], *, quiet: bool) -> None:
    """Run the job in a child process; finished units are appended to `results` as they come.

    Raises:
        ProbeError: The job failed; the class is the one the child's error code stands for.
    """
    progress = SeriesProgress.of_job(planned.spec, len(planned.units), planned.num_forward_passes)
    display = ProgressDisplay(progress, stderr_console(), name=planned.spec["name"], quiet=quiet)
    indices = {unit.unit_id: unit.index for unit in planned.units}
    for unit in planned.units:
        display.name_unit(unit.index, unit.unit_id)
    with tempfile.TemporaryDirectory(prefix="probe-run-") as scratch, display:
        job_file = Path(scratch) / "job.yaml"  # JSON is YAML; the overrides are in it
        job_file.write_text(json.dumps(planned.spec))
        module, arguments = _ranks(planned.num_ranks, ["--spec", str(job_file)])
        child = start_child(
            module,
            arguments,
            environment=thread_environment(planned.num_ranks, os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert child.stdout is not None
        assert child.stderr is not None
        log = _Log(child.stderr)
        failures: list[ProbeError] = []
        try:
            ended = _follow(_events(child.stdout, log), indices, display, results, failures)
            status = child.wait()
        finally:
            stop_children([child])
            log.close()
            child.stdout.close()
        if planned.num_ranks > 1:
            _raise_rank_failure(failures, log.text())
        _raise_failures(failures, len(planned.units))
        if not ended:
            raise CommandError(f"the measuring process ended with {_how(status)}\n{log.text()}")


def _ranks(num_ranks: int, arguments: list[str]) -> tuple[str, list[str]]:
    """Module and arguments that measure: a rank by itself, or torchrun with several."""
    if num_ranks == 1:
        return "probe.rank", arguments
    return TORCHRUN, torchrun_arguments(num_ranks, *arguments)


def _follow(
    events: Iterator[dict[str, Any]],
    indices: dict[str, int],
    display: ProgressDisplay,
    results: list[AnyUnitResult],
    failures: list[ProbeError],
) -> bool:
    """Bring everything up to date with every event; whether the child said `done`."""
    progress = display.progress
    for event in events:
        kind, now_s = event.get("type"), time.time()
        index = indices.get(str(event.get("unit_id")), 0)
        if kind == "ready":
            progress.state = "running"
            display.remark(f"measuring on {event.get('device', 'this machine')}", "dim")
        elif kind == "progress":
            progress.advance(index, event.get("data") or {}, now_s)
        elif kind == "result":
            result = parse_result(event["result"])
            results.append(result)
            progress.start_unit(index, now_s - result.duration_s)
            progress.finish_unit(index, result.num_forward_passes)
            display.unit_finished(index, _found_text(result))
        elif kind == "error":
            where = f"{event['unit_id']}: " if event.get("unit_id") else ""
            where += f"rank {event['rank']}: " if event.get("rank") else ""
            failures.append(error_class_for(str(event.get("code")))(f"{where}{event['message']}"))
            progress.running.pop(index, None)
            display.remark(str(failures[-1]), "red")
        elif kind == "done":
            return True
    return False


def _found_text(result: AnyUnitResult) -> "Text":
    """What a unit found, in one line."""
    from clients.cli.continual_tables import stretch_text
    from clients.cli.mix_tables import unit_text
    from clients.cli.tables import summaries_text
    from clients.cli.train_tables import run_text

    if isinstance(result, MixUnitResult):
        return unit_text(summarise_unit(result))
    if isinstance(result, MixTrainUnitResult):
        return run_text(summarise_run(result))
    if isinstance(result, ContinualUnitResult):
        return stretch_text(summarise_stretch(result))
    return summaries_text(result.summaries, result.stability_threshold)


def _raise_rank_failure(failures: list[ProbeError], log: str) -> None:
    """Raise what several ranks failed of; the first failed unit ends their run.

    The first error that is not of another rank's failure says why; without one, a rank ended
    without a word, and the log's end says how.
    """
    own = [failure for failure in failures if not isinstance(failure, ParallelismError)]
    if own:
        raise own[0]
    if failures:
        raise type(failures[0])(f"{failures[0]}\n{log}")


def _raise_failures(failures: list[ProbeError], num_units: int) -> None:
    """Raise the first failure, its message saying how many units there were like it."""
    if len(failures) > 1:
        first = failures[0]
        raise type(first)(f"{len(failures)} of {num_units} units failed; the first: {first}")
    if failures:
        raise failures[0]


def _events(stream: IO[bytes], log: "_Log") -> Iterator[dict[str, Any]]:
    """The child's events; a line that is none (a library's print) goes to its log."""
    for line in stream:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and "type" in event:
            yield event
        else:
            log.add(line)


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"


class _Log:
    """The last lines a child writes to its stderr, read all the time so that it never blocks."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._stream = stream
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._stream:
            self.add(line)

    def add(self, line: bytes) -> None:
        self._lines.append(line.decode("utf-8", errors="replace").rstrip())

    def close(self) -> None:
        self._reader.join(timeout=5)
        self._stream.close()

    def text(self) -> str:
        return "\n".join(self._lines) or "(it wrote nothing)"


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    add_command(
        app,
        run,
        "probe run configs/demo-series.yaml --plan",
        "probe run configs/demo-series.yaml --set model.dtype=bfloat16 --out r.json",
    )
