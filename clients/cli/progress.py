"""Follow a job while it runs: what is known of it, and how it is shown.

`SeriesProgress` only counts; `ProgressDisplay` draws it, live on a terminal and as plain lines
elsewhere. `probe run` feeds it the child's events, `probe watch` those of the server.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.text import Text

from clients.cli.tables import duration

_ENOUGH = 0.2  # of a unit: the first passes come late, after the model is loaded
_PHASES = {"load": "loading", "search": "searching", "train": "training", "score": "scoring"}
_NEARLY = 0.95  # a unit that is not finished counts for less than one, however long it takes


@dataclass
class SeriesProgress:
    """Units and passes done so far, and an estimate of the time left."""

    num_units: int
    expected_passes: int
    finished: set[int] = field(default_factory=set)
    num_passes: int = 0  # of finished units
    running: dict[int, dict[str, Any]] = field(default_factory=dict)  # index -> last progress
    state: str = ""
    started_s: float | None = None  # when the first unit began, by the caller's clock
    finished_before_start: int = 0  # units that an earlier worker or a first page had finished

    def start_unit(self, index: int, now_s: float) -> None:
        """A unit has begun, or has begun again."""
        self.state = "running"
        if self.started_s is None:
            self.started_s, self.finished_before_start = now_s, len(self.finished)
        self.running.setdefault(index, {})

    def advance(self, index: int, values: dict[str, Any], now_s: float) -> None:
        """A unit says how far it is: phase, done, total, num_forward_passes."""
        self.start_unit(index, now_s)
        self.running[index] = self.running[index] | values

    def finish_unit(self, index: int, num_passes: int) -> None:
        """A unit has its result; the same one twice counts once."""
        self.running.pop(index, None)
        if index not in self.finished:
            self.finished.add(index)
            self.num_passes += num_passes

    @property
    def passes_now(self) -> int:
        """Forward passes done, those of running units included."""
        return self.num_passes + sum(
            int(values.get("num_forward_passes") or 0) for values in self.running.values()
        )

    @property
    def done_units(self) -> float:
        """Units done, a running one counted by its share of the expected passes."""
        per_unit = max(1.0, self.expected_passes / max(1, self.num_units))
        parts = (
            min(_NEARLY, int(values.get("num_forward_passes") or 0) / per_unit)
            for values in self.running.values()
        )
        return min(float(self.num_units), len(self.finished) + sum(parts))

    def time_left_s(self, now_s: float) -> float | None:
        """Seconds to go at the pace so far; None while too little is done to tell a pace."""
        if self.started_s is None:
            return None
        since_start = self.done_units - self.finished_before_start
        if since_start < _ENOUGH:
            return None
        return (now_s - self.started_s) / since_start * (self.num_units - self.done_units)


class ProgressDisplay:
    """Shows a `SeriesProgress` on stderr; use it with `with`."""

    def __init__(
        self,
        progress: SeriesProgress,
        console: "Console",
        *,
        name: str,
        quiet: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Nothing is shown before `with`.

        Args:
            progress: What is shown; the caller changes it and calls `refresh`.
            console: On stderr.
            name: Of the job.
            quiet: Show nothing at all.
            clock: Seconds; the same clock as the caller's `now_s`.
        """
        self.progress, self._console, self._name = progress, console, name
        self._quiet, self._clock = quiet, clock
        self._labels: dict[int, str] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        """Begin to draw, where there is a terminal."""
        if self._console.is_terminal and not self._quiet:
            from rich.live import Live

            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        if self._live is not None:
            self._live.stop()

    def name_unit(self, index: int, unit_id: str) -> None:
        """Remember what a unit is called: its id without the number in front."""
        self._labels[index] = unit_id.partition("-")[2] or unit_id

    def label(self, index: int) -> str:
        """The unit's name, or its number where the name is not known."""
        return self._labels.get(index, f"unit {index}")

    def remark(self, text: str, style: str = "") -> None:
        """A line that stays."""
        if not self._quiet:
            self._console.print(text, style=style, markup=False)

    def unit_finished(self, index: int, found: "Text") -> None:
        """A line that stays: what the unit found, or why there is nothing."""
        if self._quiet:
            return
        from rich.text import Text

        count = f"{len(self.progress.finished)}/{self.progress.num_units}"
        line = Text(f"{count}  {self.label(index)}  ").append_text(found)
        left = self.progress.time_left_s(self._clock())
        if left and not self._console.is_terminal:
            line.append(f"  {duration(left)} left")
        self._console.print(line)

    def _render(self) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        shown = self.progress
        left = shown.time_left_s(self._clock())
        counts = f"{len(shown.finished)}/{shown.num_units} units"
        counts += f"  {shown.passes_now} of about {max(shown.expected_passes, shown.passes_now)}"
        counts += " passes"
        if left is not None:
            counts += f"  {duration(left)} left"
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1, min_width=8)
        bar.add_column(no_wrap=True)
        bar.add_row(ProgressBar(total=shown.num_units, completed=shown.done_units), counts)
        heading = Text(f"{self._name}: {shown.state}", overflow="ellipsis", no_wrap=True)
        lines: list[RenderableType] = [heading, bar]
        for index, values in sorted(shown.running.items())[:4]:
            lines.append(Text(f"  {self.label(index)}: {phase_text(values)}", style="dim"))
        return Group(*lines)


def phase_text(values: dict[str, Any]) -> str:
    """What a unit is doing now, in words."""
    phase = str(values.get("phase") or "starting")
    text = _PHASES.get(phase, phase)
    done, total = values.get("done"), values.get("total")
    if done is not None and total and total > 1:
        text += f" {done}/{total}"
    passes = values.get("num_forward_passes")
    return f"{text}, passes: {passes}" if passes else text
