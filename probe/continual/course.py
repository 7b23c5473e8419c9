"""What is kept of a task while it is trained: sums on the device, a row per window."""

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from probe.continual.signals import Measurement
from probe.result_continual import LAYER_SIGNALS, RUN_SIGNALS, Bound, RunTask, Windows

_MEASURED_OF_RUNS = [name for name in RUN_SIGNALS if name not in ("accuracy", "loss")]


class TaskCourse:
    """One task of R runs. Nothing is fetched from the device before a window ends.

    Args:
        task: Its number, from 0.
        num_steps: Steps it will take.
        num_windows: Rows to keep; fewer where there are fewer steps.
        num_runs: R.
        num_layers: L; signals have a column more, for the whole network.
        sums: (2, R) float64, right answers and losses summed over images; whoever trains adds
            every step to it. Is set to 0 here and at every window's end.
    """

    def __init__(
        self,
        task: int,
        num_steps: int,
        num_windows: int,
        num_runs: int,
        num_layers: int,
        sums: Tensor,
    ) -> None:
        self._task = task
        num_windows = min(num_windows, num_steps)
        self._ends = [
            math.ceil(num_steps * (window + 1) / num_windows) for window in range(num_windows)
        ]
        self._num_runs, self._num_columns = num_runs, num_layers + 1
        self.sums = sums.zero_()
        self._num_images = 0
        self._measurements: list[Measurement] = []
        num_bounds = len(get_args(Bound))
        self._violations = torch.zeros(num_runs, num_bounds, dtype=torch.int64, device=sums.device)
        self._num_measurements = 0
        self._rows: list[list[float]] = []  # per window, per run: accuracy, loss
        self._weights: list[int] = []  # images per window
        self._runs: dict[str, list[list[float]]] = {name: [] for name in _MEASURED_OF_RUNS}
        self._layers: dict[str, list[list[list[float]]]] = {name: [] for name in LAYER_SIGNALS}

    @property
    def next_end(self) -> int:
        """Step, from 1, at which the current window ends."""
        return self._ends[len(self._weights)]

    def count_step(self, batch_size: int) -> None:
        """One step has been added to the sums."""
        self._num_images += batch_size

    def add_measurement(self, measurement: Measurement) -> None:
        """Signals measured since the last window ended."""
        self._measurements.append(measurement)
        self._violations += measurement.violations
        self._num_measurements += 1

    def end_window(self) -> None:
        """Close the current window. Cost: waits for the device."""
        accuracy, loss = (self.sums / self._num_images).tolist()
        self._rows.append([*accuracy, *loss])
        self._weights.append(self._num_images)
        for name, rows in self._runs.items():
            rows.append(_median([m.runs[name] for m in self._measurements], self._num_runs))
        for name, columns in self._layers.items():
            values = [m.layers[name] for m in self._measurements]
            columns.append(_median(values, (self._num_runs, self._num_columns)))
        self.sums.zero_()
        self._num_images = 0
        self._measurements.clear()

    def results(self, end: Sequence[tuple[float, float]]) -> list[RunTask]:
        """One per run.

        Args:
            end: Per run: accuracy and loss over all images after the task.
        """
        shares = (self._violations.double() / max(1, self._num_measurements)).tolist()
        return [self._result(run, *end[run], shares[run]) for run in range(self._num_runs)]

    def _result(
        self, run: int, accuracy_end: float, loss_end: float, shares: list[float]
    ) -> RunTask:
        accuracies = [row[run] for row in self._rows]
        losses = [row[self._num_runs + run] for row in self._rows]
        loss = _weighted(losses, self._weights)
        is_finite = math.isfinite(loss) and math.isfinite(loss_end)
        accuracy = _weighted(accuracies, self._weights)
        measured = is_finite and self._num_measurements > 0
        return RunTask(
            task=self._task,
            outcome="finished" if is_finite else "diverged",
            accuracy=accuracy if is_finite else None,
            accuracy_end=accuracy_end if is_finite else None,
            loss=loss if is_finite else None,
            loss_end=loss_end if is_finite else None,
            violation_share=dict(zip(get_args(Bound), shares, strict=True)) if measured else None,
            windows=self._windows(run, accuracies, losses),
        )

    def _windows(self, run: int, accuracies: list[float], losses: list[float]) -> Windows:
        finite = [math.isfinite(loss) for loss in losses]
        runs = {name: [_finite(row[run]) for row in rows] for name, rows in self._runs.items()}
        layers = {
            name: [
                [_finite(row[run][column]) for row in rows] for column in range(self._num_columns)
            ]
            for name, rows in self._layers.items()
        }
        return Windows(
            last_step=self._ends[: len(self._weights)],
            runs={
                "accuracy": [a if ok else None for a, ok in zip(accuracies, finite, strict=True)],
                "loss": [_finite(loss) for loss in losses],
                **runs,
            },
            layers=layers,
        )


def _median(values: Sequence[Tensor], shape: int | tuple[int, int]) -> Any:
    """Over the measurements, each of `shape`; the lower of two in the middle. NaN without any."""
    if not values:
        return torch.full(shape if isinstance(shape, tuple) else (shape,), math.nan).tolist()
    return torch.stack(list(values)).nanmedian(dim=0).values.tolist()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _weighted(values: Sequence[float], weights: Sequence[int]) -> float:
    total = sum(value * weight for value, weight in zip(values, weights, strict=True))
    return total / sum(weights)
