"""What a training grid gives back (torch-free): one run, every task against the checkpoint."""

from typing import Any, Literal

from pydantic import Field

from probe.result import Provenance, ResultModel, Unit

TrainOutcome = Literal["finished", "diverged"]
AccuracyKind = Literal["choice", "token"]


class TaskChange(ResultModel):
    """One task before and after a run; what comes after is None where the run diverged."""

    task: str
    loss_start: float = Field(description="Nats per token on the task's fixed batch.")
    loss_end: float | None
    loss_change: float | None = Field(description="End - start: below 0 is better.")
    loss_change_standard_error: float | None = Field(
        description="Over the task's sequences, start and end paired; None below two."
    )
    accuracy_kind: AccuracyKind = Field(
        description="choice: share of questions whose right choice alone has the highest "
        "log-likelihood per character among the choices. token: share of target tokens that are "
        "the most likely next token given the true ones before (greedy, teacher-forced; no text "
        "is generated, so it is not exact match)."
    )
    accuracy_count: int = Field(description="Questions (choice), or target tokens (token).")
    accuracy_chance: float | None = Field(
        description="choice: of a guess, the mean of 1 / choices; token: None."
    )
    accuracy_start: float
    accuracy_end: float | None
    accuracy_change: float | None = Field(description="End - start: above 0 is better.")
    accuracy_change_standard_error: float | None = Field(
        description="Over questions (choice) or sequences (token), paired; None below two."
    )
    loss_batch_sha256: str


class MixTrainUnitResult(ResultModel):
    """The result of one unit of a `mix_train` job: one checkpoint, ratio and learning rate."""

    kind: Literal["mix_train"] = "mix_train"
    unit: Unit
    spec: dict[str, Any] = Field(description="The resolved job spec.")
    ratio: float = Field(ge=0, le=1, description="Share of the varied source in the mixture.")
    learning_rate: float = Field(gt=0)
    shares: list[float] = Field(description="Share of every source, in the spec's order.")
    outcome: TrainOutcome = Field(
        description="diverged: a training loss or a task's loss afterwards was NaN or infinite."
    )
    num_steps: int = Field(ge=0, description="Steps taken; fewer than asked for where it diverged.")
    train_losses: list[float | None] = Field(
        description="Loss of each step's batch before the step, nats per token; None: not finite."
    )
    first_batch_sha256: str = Field(
        description="Tokens of the first step: equal for all learning rates of a ratio."
    )
    tasks: list[TaskChange] = Field(description="In the spec's order.")
    num_forward_passes: int
    num_backward_passes: int
    duration_s: float
    memory_bytes: int = Field(description="Peak: device memory on a GPU, resident set on a CPU.")
    provenance: Provenance

    @property
    def has_every_answer(self) -> bool:
        """Whether the run came to its end."""
        return self.outcome == "finished"


class TrainUnitSummary(ResultModel):
    """One run in a few numbers, for a line or a table row."""

    ratio: float
    learning_rate: float
    outcome: TrainOutcome
    num_steps: int
    tasks: list[TaskChange]


class TrainCell(ResultModel):
    """One run and one task of the table."""

    ratio: float
    learning_rate: float
    outcome: TrainOutcome
    change: TaskChange


class TrainLimit(ResultModel):
    """Up to which learning rate training at one ratio left one task no worse."""

    ratio: float
    task: str
    largest_harmless: float | None = Field(
        description="Largest learning rate of the grid at which the task's loss did not rise, nor "
        "at any smaller one of the grid; None: it rose at the smallest."
    )
    smallest_harmful: float | None = Field(
        description="The next one of the grid; None: the loss rose at none of those run."
    )


class TrainTable(ResultModel):
    """One checkpoint's runs: the red, white and blue table, and its limits."""

    checkpoint: str
    step: int | None
    varied: str = Field(description="The source whose share is the ratio.")
    cells: list[TrainCell] = Field(description="By ratio, learning rate, then the spec's tasks.")
    limits: list[TrainLimit] = Field(description="By ratio, then the spec's tasks.")
