"""Rich tables of jobs, results, checkpoints and plans, made to fit 80 columns.

Colour repeats what a word already says; it never carries meaning alone. What users have named is
wrapped in `Text`, so that brackets in it are not read as markup.
"""

import datetime as dt
from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from probe.result import CheckpointRef, Plan, Summary, UnitResult
from probe.spec_base import DEFAULT_PRIORITY
from server.wire import JobView

NONE = "-"
_WIDE, _NARROW = 100, 80
_STATUS_STYLE = {
    "queued": "yellow",
    "running": "cyan",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "dim",
}


def status_text(status: str) -> Text:
    """The status in its colour."""
    return Text(status, style=_STATUS_STYLE.get(status, ""))


def number(value: float | None) -> str:
    """Four significant digits; a dash for no value."""
    return NONE if value is None else f"{value:.4g}"


def spread(error: float | None) -> str:
    """A standard error behind its mean, two significant digits; nothing for none."""
    return "" if error is None else f" ±{float(f'{error:.2g}'):.12g}"


def byte_size(count: int | None) -> str:
    """Bytes in the largest binary unit that keeps the number at least 1."""
    if count is None:
        return NONE
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def quantity(count: int | None) -> str:
    """A large count with K, M, B or T."""
    if count is None:
        return NONE
    for size, suffix in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**4, "K")):
        if count >= size:
            unit = 10**3 if suffix == "K" else size
            return f"{count / unit:.4g}{suffix}"
    return str(count)


def duration(seconds: float | None) -> str:
    """Seconds as a person writes them: 4.2 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if seconds is None:
        return NONE
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, below, below_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // below} {below_name}"
    return f"{whole} s"


def plain_table(**options: object) -> Table:
    """Two blanks between columns and none outside: every column of 80 counts."""
    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        **options,  # type: ignore[arg-type]
    )


def results_table(results: Sequence[UnitResult], *, title: str | None = None) -> Table:
    """One row per checkpoint and loss batch: lambda_c, its bracket, the threshold, the passes."""
    table = plain_table(title=title, title_justify="left", title_style="bold")
    table.add_column("checkpoint", overflow="fold", max_width=24)
    table.add_column("loss batch")
    table.add_column("lambda_c", justify="right", no_wrap=True)
    table.add_column("bracket", justify="right", min_width=15)
    table.add_column("2/eta", justify="right")
    table.add_column("loss", justify="right")
    table.add_column("passes", justify="right")
    for result in results:
        for summary in result.summaries:
            table.add_row(
                Text(result.unit.checkpoint_ref.label),
                summary.loss_batch,
                lambda_text(summary, result.stability_threshold),
                bracket_text(summary),
                number(result.stability_threshold),
                f"{summary.loss_mean:.4f}",
                str(summary.num_forward_passes),
            )
    return table


def summaries_text(summaries: Sequence[Summary], threshold: float | None) -> Text:
    """A finished checkpoint in one line: its lambda_c on every loss batch, or why there is none."""
    line = Text("lambda_c ")
    for position, summary in enumerate(summaries):
        line.append(", " if position else "")
        line.append_text(lambda_text(summary, threshold))
        if summary.num_converged < summary.num_repeats:
            line.append(": ").append_text(bracket_text(summary))
        line.append(f" ({summary.loss_batch})", style="dim")
    return line


def lambda_text(summary: Summary, threshold: float | None) -> Text:
    """Mean lambda_c with its standard error where there is one; red above the threshold."""
    mean = summary.lambda_c_mean
    if mean is None:
        return Text("none", style="yellow")
    above = threshold is not None and mean > threshold
    return Text(
        f"{number(mean)}{spread(summary.lambda_c_standard_error)}", style="red" if above else ""
    )


def bracket_text(summary: Summary) -> Text:
    """The bracket, or why there is none; where only some repeats have one, how many."""
    if summary.num_converged == 0:
        return Text(", ".join(name.replace("_", " ") for name in summary.outcomes), style="yellow")
    text = Text(f"{number(summary.lambda_c_lower)} - {number(summary.lambda_c_upper)}")
    if summary.num_converged < summary.num_repeats:
        text.append(f" ({summary.num_converged} of {summary.num_repeats})", style="yellow")
    return text


def jobs_table(jobs: Iterable[JobView], *, now: dt.datetime, width: int) -> Table:
    """One row per job, newest first as the server sends them; ids are never cut.

    Args:
        jobs: The jobs.
        now: What ages are counted from.
        width: Of the terminal: below 100 shorter names and no passes, below 80 no names.
    """
    is_wide, is_narrow = width >= _WIDE, width < _NARROW
    table = plain_table()
    table.add_column("id", overflow="fold")  # the end of an id is what tells jobs apart
    if not is_narrow:
        table.add_column(
            "name",
            overflow="ellipsis",
            no_wrap=True,
            max_width=max(8, width - (68 if is_wide else 66)),
        )
    table.add_column("status", no_wrap=True)
    table.add_column("units", justify="right", no_wrap=True)
    if is_wide:
        table.add_column("passes", justify="right", no_wrap=True)
    if not is_narrow:
        table.add_column("age", justify="right", no_wrap=True)
    for job in jobs:
        missing = f" ({job.num_units_without_answer} none)" if job.num_units_without_answer else ""
        table.add_row(
            job.id,
            *([] if is_narrow else [Text(job.name)]),
            _status_and_place(job) if is_wide else status_text(job.status),
            f"{job.num_units_finished}/{job.num_units}{missing}",
            *([str(job.num_forward_passes)] if is_wide else []),
            *([] if is_narrow else [age(job.created_at, now)]),
        )
    return table


def _status_and_place(job: JobView) -> Text:
    text = status_text(job.status)
    return text if job.queue_position is None else text.append(f" #{job.queue_position}")


def age(then: dt.datetime, now: dt.datetime) -> str:
    """How long ago, in the one unit that matters."""
    seconds = max(0.0, (now - then).total_seconds())
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {name}"
    return f"{seconds:.0f} s"


def job_table(job: JobView) -> Table:
    """Everything about one job but its spec, as pairs."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("id", job.id)
    table.add_row("name", Text(job.name))
    table.add_row("kind", job.kind)
    table.add_row("status", status_text(job.status))
    if job.queue is not None:
        table.add_row("queue", _queue_text(job))
    if job.worker is not None:
        table.add_row("worker", Text(job.worker))
    if job.error is not None:
        where = f" (unit {job.error.unit_id})" if job.error.unit_id else ""
        table.add_row("error", Text(f"{job.error.code}: {job.error.message}{where}", style="red"))
    table.add_row("units", f"{job.num_units_finished} of {job.num_units} finished")
    if job.num_units_without_answer:
        what = "with a run that diverged" if _is_continual(job.kind) else "without an eta_c"
        table.add_row("", f"{job.num_units_without_answer} {what}")
    expected = job.expected_forward_passes
    if not _is_continual(job.kind):  # evaluations between tasks: no measure of the work
        table.add_row("passes", f"{job.num_forward_passes} of about {expected}")
    for name, moment in (
        ("created", job.created_at),
        ("started", job.started_at),
        ("finished", job.finished_at),
        ("imported", job.imported_at),
    ):
        if moment is not None:
            table.add_row(name, moment.astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"))
    if job.started_at and job.finished_at:
        table.add_row("took", duration((job.finished_at - job.started_at).total_seconds()))
    if job.time_limit_s is not None:
        table.add_row("time limit", duration(job.time_limit_s))
    if job.submitted_by is not None:
        table.add_row("submitted by", Text(job.submitted_by))
    if job.labels:
        table.add_row("labels", Text(", ".join(f"{k}={v}" for k, v in sorted(job.labels.items()))))
    table.add_row("spec sha256", job.spec_sha256)
    return table


def _queue_text(job: JobView) -> str:
    """gpu, priority 200, place 3, starts about 14:05:00 UTC."""
    parts = [job.queue or NONE]
    if job.priority != DEFAULT_PRIORITY:
        parts.append(f"priority {job.priority}")
    if job.queue_position is not None:
        parts.append(f"place {job.queue_position}")
    if job.estimated_start is not None:
        about = job.estimated_start.astimezone().strftime("%Y-%m-%d %H:%M %Z")
        parts.append(f"starts about {about}")
    return ", ".join(parts)


def _is_continual(kind: str) -> bool:
    return kind == "continual_learning"


def checkpoints_table(checkpoints: Iterable[CheckpointRef]) -> Table:
    """One row per checkpoint of a series."""
    table = plain_table()
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("format", no_wrap=True)
    table.add_column("moments", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("checkpoint", overflow="fold")
    for ref in checkpoints:
        moments = {True: "yes", False: "no", None: "?"}[ref.has_moments]
        if ref.has_moments is None and ref.moments_url is not None:
            moments = "published?"  # known only to the worker that fetches them
        table.add_row(
            NONE if ref.step is None else str(ref.step),
            ("~" if ref.num_tokens_rounded else "") + quantity(ref.num_tokens),
            ref.format or "?",
            moments,
            byte_size(ref.size_bytes),
            Text(ref.revision or ref.location),
        )
    return table


def plan_table(plan: Plan) -> Table:
    """What a plan says, as pairs."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    if _is_continual(plan.kind):
        table.add_row("units", str(len(plan.units)))
        table.add_row("gradient steps", f"{plan.num_backward_passes:,}, each run's counted")
        table.add_row("evaluation passes", f"{plan.num_forward_passes:,}")
    else:
        _add_passes(table, plan)
    if plan.num_parameters is not None:
        table.add_row("parameters", quantity(plan.num_parameters))
    table.add_row("ranks", _ranks(plan))
    if plan.memory_bytes_per_rank is not None:
        memory = byte_size(plan.memory_bytes_per_rank)
        table.add_row("memory per rank", f"about {memory}, activations left out")
    for note in plan.notes:
        table.add_row("note", Text(note))
    table.add_row("spec sha256", plan.spec_sha256)
    return table


def _ranks(plan: Plan) -> str:
    """How many processes, on how many machines where it is not one."""
    if plan.backend == "single":
        return "1"
    nodes = (plan.spec.get("parallel") or {}).get("nodes", 1)
    where = f" on {nodes} nodes" if nodes > 1 else ""
    return f"{plan.num_ranks}{where}, sharded with {plan.backend}"


def _add_passes(table: Table, plan: Plan) -> None:
    """Units, passes and tokens of a job that measures checkpoints."""
    first, last = plan.units[0].checkpoint_ref.label, plan.units[-1].checkpoint_ref.label
    span = first if len(plan.units) == 1 else f"{first} to {last}"
    table.add_row("units", Text(f"{len(plan.units)} ({span})"))
    table.add_row(
        "forward passes",
        f"about {plan.num_forward_passes}, at most {plan.max_forward_passes}",
    )
    table.add_row("backward passes", str(plan.num_backward_passes))
    table.add_row("tokens per pass", str(plan.num_tokens_per_pass))
