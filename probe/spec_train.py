"""The spec of a training grid: every mixture ratio with every learning rate, trained for real.

It checks by training what a mix scan says from a few forward passes, and is made of the same
parts, so that the two can share all but `train`. Torch-free, as `probe.spec`.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from probe.spec import (
    AdamW,
    Checkpoints,
    ModelOptions,
    ParallelOptions,
)
from probe.spec_base import JobFields, SpecModel
from probe.spec_mix import EvalTask, MixBatches, MixtureSources, Ratio

LearningRate = Annotated[float, Field(gt=0, le=10)]


class TrainGrid(SpecModel):
    """Which runs are made: each ratio with each learning rate, all from the checkpoint."""

    ratios: list[Ratio] = Field(
        min_length=1, max_length=101, description="Shares of the varied source, ascending."
    )
    learning_rates: list[LearningRate] = Field(
        min_length=1,
        max_length=101,
        description="Of AdamW, constant after `warmup_steps`; ascending.",
    )
    steps: int = Field(ge=1, le=1_000_000, description="AdamW steps of every run.")
    warmup_steps: int = Field(
        0, ge=0, description="Steps of linear rise of the learning rate; 0: constant from step 1."
    )
    moments: Literal["optimizer", "zero"] = Field(
        "optimizer",
        description="optimizer: AdamW's moments begin as `optimizer.moments` says, as the scan's "
        "do; zero: they begin at 0, as a new run's.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("ratios", "learning_rates"):
            values = getattr(self, name)
            if sorted(set(values)) != values:
                raise ValueError(f"{name} must ascend without repeats, got {values}")
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, steps {self.steps}: the learning rate "
                "would never be reached"
            )
        return self


class MixTrainSpec(JobFields):
    """Every task after training on mixtures, against the checkpoint: what the scan predicts."""

    kind: Literal["mix_train"]
    checkpoints: Checkpoints
    model: ModelOptions = ModelOptions()
    parallel: ParallelOptions = ParallelOptions()
    optimizer: AdamW = AdamW()
    mixture: MixtureSources
    train: TrainGrid
    eval_tasks: list[EvalTask] = Field(min_length=1, max_length=32)
    batches: MixBatches

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [task.data.name for task in self.eval_tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"names of eval_tasks must differ, got {names}")
        least = 1 / (2 * self.batches.batch_sequences)
        lost = [r for r in self.train.ratios if 0 < r < least or 1 - least < r < 1]
        if lost:
            raise ValueError(
                f"train.ratios has {lost[0]:g}: of batches.batch_sequences "
                f"{self.batches.batch_sequences} that leaves a source less than half a sequence. "
                "Raise batch_sequences, or choose ratios further from 0 and 1"
            )
        return self

    @property
    def num_moment_steps(self) -> int:
        """Batches kept for warming moments up; training begins after them.

        With moments `auto` they are left out also where a checkpoint has moments, so that every
        checkpoint trains on the same tokens, which are those the scan's repeats begin at.
        """
        saved_or_zero = self.train.moments == "zero" or self.optimizer.moments == "checkpoint"
        return 0 if saved_or_zero else self.optimizer.warmup_steps
