"""What a mix scan gives back (torch-free): every search, and what it comes to per ratio."""

from typing import Any, Literal

from pydantic import Field

from probe.line_search import SearchOutcome
from probe.result import Provenance, ResultModel, SearchRecord, Unit


class MixMeasurement(SearchRecord):
    """One search: the direction of one mixture, the loss of one task."""

    repeat: int = Field(ge=0)
    ratio: float = Field(ge=0, le=1, description="Share of the varied source in the mixture.")
    task: str = Field(description="Whose loss it is.")
    shares: list[float] = Field(description="Share of every source, in the spec's order.")
    update_batch_sha256: list[str] = Field(
        description="Tokens of the step: one batch per source with shared gradients, else one."
    )


class MixPoint(ResultModel):
    """All repeats of one task at one ratio."""

    ratio: float
    task: str
    num_repeats: int
    num_converged: int
    outcomes: dict[str, int] = Field(description="How many repeats ended in each outcome.")
    lambda_c_mean: float | None = Field(description="Mean over converged repeats; None if none.")
    lambda_c_standard_error: float | None = Field(description="None below two converged repeats.")
    lambda_c_lower: float | None = Field(
        description="2 / largest eta_upper over converged repeats: the brackets' lower end."
    )
    lambda_c_upper: float | None = Field(
        description="2 / smallest eta_lower over converged repeats: the brackets' upper end."
    )
    eta_c_median: float | None = Field(
        description="Median of eta_c over repeats: 0 where the step hurts the task at once, None "
        "where more than half of the repeats saw no crossing."
    )
    slope_mean: float | None = Field(description="dL/d eta at 0, mean over repeats.")
    loss_at_zero: float = Field(description="Nats per token at the checkpoint.")
    num_forward_passes: int


class MixCrossing(ResultModel):
    """Two tasks' curves change places between two neighbouring ratios."""

    ratio: float = Field(description="Where the straight lines of log eta_c meet.")
    tasks: tuple[str, str] = Field(description="The first is the sharper one at smaller ratios.")
    lambda_c: float


class MixSweetSpot(ResultModel):
    """The ratio with the largest step that raises no task's loss."""

    ratio: float
    lambda_c: float = Field(description="Of the task that objects first there: 2 / its eta_c.")
    eta_c: float = Field(description="The largest step.")
    task: str = Field(description="The task that objects first there.")
    lower: float | None = Field(
        description="Bootstrap interval (90 %) of the ratio over repeats; None below two."
    )
    upper: float | None


class MixScan(ResultModel):
    """One checkpoint's scan: every point, the sweet spot, where curves cross."""

    checkpoint: str
    step: int | None
    varied: str = Field(description="The source whose share is the ratio.")
    points: list[MixPoint] = Field(description="By ratio, then in the spec's order of tasks.")
    sweet_spot: MixSweetSpot | None
    no_sweet_spot_reason: str | None = Field(description="Why there is none, where there is none.")
    crossings: list[MixCrossing]


class MixUnitResult(ResultModel):
    """The result of one unit of a `mix_scan` job: a checkpoint at all ratios, or at one."""

    kind: Literal["mix_scan"] = "mix_scan"
    unit: Unit
    spec: dict[str, Any] = Field(description="The resolved job spec.")
    measurements: list[MixMeasurement]
    num_forward_passes: int
    num_backward_passes: int
    duration_s: float
    direction_s: float = Field(
        description="Seconds of that spent on the direction phase: warm-up, the gradients of the "
        "sources or mixed batches, and the directions made of them. The tasks' own gradients and "
        "the searches are not in it."
    )
    memory_bytes: int = Field(description="Peak: device memory on a GPU, resident set on a CPU.")
    provenance: Provenance

    @property
    def has_every_answer(self) -> bool:
        """Whether every search converged."""
        return all(m.outcome is SearchOutcome.CONVERGED for m in self.measurements)


class MixUnitSummary(ResultModel):
    """What a finished unit of a mix scan comes to, in a few numbers: for events and progress."""

    ratio: float | None = Field(description="With exact gradients: the unit's ratio.")
    num_ratios: int
    num_searches: int
    outcomes: dict[str, int] = Field(description="How many searches ended in each outcome.")
    points: list[MixPoint] = Field(description="At a single ratio: one per task; else empty.")
    sweet_spot: MixSweetSpot | None = Field(description="Of this unit; None at a single ratio.")


def mix_eta_init_hint(result: MixUnitResult) -> dict[str, float] | None:
    """First guesses for the unit after this one: the last eta_c of every task.

    A scan of all ratios begins with the smallest one, so its hint is what was found there, or at
    the next ratio that has an answer. None where no search has one.
    """
    found: dict[str, tuple[float, float]] = {}  # task -> (ratio, eta_c)
    for m in result.measurements:
        if m.eta_c is not None and m.ratio <= found.get(m.task, (m.ratio, 0.0))[0]:
            found[m.task] = (m.ratio, m.eta_c)
    return {task: eta_c for task, (_, eta_c) in found.items()} or None
