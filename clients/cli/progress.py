"""Follow a job while it runs: what is known of it, and how it is shown.

`SeriesProgress` only counts; `ProgressDisplay` draws it, live on a terminal and as plain lines
elsewhere. `probe run` feeds it the child's events, `probe watch` those of the server.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.text import Text

from clients.cli.tables import duration
from probe.errors import ProbeError

_ENOUGH = 0.2  # of a unit: the first passes come late, after the model is loaded
_ENOUGH_STEPS = 0.02  # of a unit whose steps all take the same time
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
    done_before_start: float = 0.0  # units that an earlier worker or a first page had finished
    # Of continual learning. A unit then tells its gradient steps, `done` of `total`; passes are
    # evaluations between them and say nothing of how far it is.
    step_costs: Sequence[float] = ()  # of every unit; empty: another kind of job

    @classmethod
    def of_job(
        cls, spec: Mapping[str, Any], num_units: int, expected_passes: int
    ) -> "SeriesProgress":
        """Nothing done yet of a job.

        Args:
            spec: Its resolved spec.
            num_units: Of its plan.
            expected_passes: Of its plan.
        """
        return cls(num_units, expected_passes, step_costs=_step_costs(spec, num_units))

    def start_unit(self, index: int, now_s: float) -> None:
        """A unit has begun, or has begun again."""
        self.state = "running"
        if self.started_s is None:
            self.started_s, self.done_before_start = now_s, self.done_units
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
        """Units done, a running one counted by its share of the expected passes, or of its steps.

        Units that differ in cost count as so many units of mean cost.
        """
        shares = dict.fromkeys(self.finished, 1.0)
        shares |= {index: self._share(values) for index, values in self.running.items()}
        if not self.step_costs:
            return min(float(self.num_units), sum(shares.values()))
        costs = dict(enumerate(self.step_costs))
        done = sum(costs.get(index, 0.0) * share for index, share in shares.items())
        return self.num_units * done / sum(self.step_costs)

    def _share(self, values: dict[str, Any]) -> float:
        """How much of a running unit is done."""
        if self.step_costs:
            is_training = values.get("phase") == "train"
            done, total = int(values.get("done") or 0), int(values.get("total") or 1)
            return done / total if is_training else 0.0
        per_unit = max(1.0, self.expected_passes / max(1, self.num_units))
        return min(_NEARLY, int(values.get("num_forward_passes") or 0) / per_unit)

    def time_left_s(self, now_s: float) -> float | None:
        """Seconds to go at the pace so far; None while too little is done to tell a pace."""
        if self.started_s is None:
            return None
        since_start = self.done_units - self.done_before_start
        if since_start < (_ENOUGH_STEPS if self.step_costs else _ENOUGH):
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
        if shown.step_costs:
            counts += f"  {100 * shown.done_units / shown.num_units:.0f} % of the steps"
        else:
            expected = max(shown.expected_passes, shown.passes_now)
            counts += f"  {shown.passes_now} of about {expected} passes"
        if left is not None:
            counts += f"  {duration(left)} left"
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1, min_width=8)
        bar.add_column(no_wrap=True)
        bar.add_row(ProgressBar(total=shown.num_units, completed=shown.done_units), counts)
        heading = Text(f"{self._name}: {shown.state}", overflow="ellipsis", no_wrap=True)
        lines: list[RenderableType] = [heading, bar]
        for index, values in sorted(shown.running.items())[:4]:
            text = phase_text(values, in_steps=bool(shown.step_costs))
            lines.append(Text(f"  {self.label(index)}: {text}", style="dim"))
        return Group(*lines)


def _step_costs(spec: Mapping[str, Any], num_units: int) -> list[int]:
    """Of continual learning, the cost of every unit; empty for the other kinds."""
    from probe.plan_continual import expand_continual_units, unit_costs
    from probe.spec_continual import ContinualLearningSpec
    from probe.spec_load import parse_spec

    if spec.get("kind") != "continual_learning":
        return []
    try:
        parsed = parse_spec(spec)
    except ProbeError:  # of a server of another version: as if all cost the same
        return [1] * num_units
    assert isinstance(parsed, ContinualLearningSpec)
    costs = unit_costs(parsed, expand_continual_units(parsed))
    return costs if len(costs) == num_units else [1] * num_units


def phase_text(values: dict[str, Any], *, in_steps: bool = False) -> str:
    """What a unit is doing now, in words."""
    phase = str(values.get("phase") or "starting")
    text = _PHASES.get(phase, phase)
    done, total = values.get("done"), values.get("total")
    if done is not None and total and total > 1:
        text += f" {done}/{total}"
    if in_steps:
        return f"{text} steps" if phase == "train" else text
    passes = values.get("num_forward_passes")
    return f"{text}, passes: {passes}" if passes else text
