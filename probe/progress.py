"""Count the passes of one unit and tell whoever listens how far it is."""

from collections.abc import Callable
from typing import Any, Literal

Phase = Literal["load", "moments", "gradient", "search", "train", "score"]
OnProgress = Callable[[dict[str, Any]], None]


class Meter:
    """Passes of one unit so far. A pass is one whole batch, all its micro-batches together.

    `num_forward_passes` counts loss evaluations; the forward half of a gradient is counted in
    `num_backward_passes` only.
    """

    def __init__(self, on_progress: OnProgress | None = None) -> None:
        self._on_progress = on_progress
        self.num_forward_passes = 0
        self.num_backward_passes = 0
        self._last: tuple[Phase, int, int] = ("load", 0, 1)

    def count_forward_pass(self) -> None:
        """One more loss evaluation; tells the listener, who sees the count move."""
        self.num_forward_passes += 1
        self.report(*self._last)

    def report(self, phase: Phase, done: int, total: int) -> None:
        """Tell the listener that `done` of `total` parts of a phase are finished."""
        self._last = (phase, done, total)
        if self._on_progress is not None:
            self._on_progress(
                {
                    "phase": phase,
                    "done": done,
                    "total": total,
                    "num_forward_passes": self.num_forward_passes,
                }
            )
