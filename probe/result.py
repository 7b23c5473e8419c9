"""What a measurement, a unit and a job give back, as pydantic models (torch-free).

The same models are stored by the queue, sent over HTTP, written by the command line and read
by the charts. Fields are only ever added. A quantity without an answer is `None` beside an
`outcome` that says why; it is never a made-up number.
"""

import datetime as dt
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from probe.errors import ConfigError
from probe.line_search import SearchOutcome

LossBatch = Literal["update", "held_out"]
Backend = Literal["single", "fsdp2", "deepspeed"]
MomentsSource = Literal["checkpoint", "warmup", "none"]


class ResultModel(BaseModel):
    """Everything that is given back: not changed once made, no unknown fields, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CheckpointRef(ResultModel):
    """One checkpoint: where it is and which training step it was saved at."""

    source: Literal["local", "hub", "gguf"]
    location: str = Field(description="Directory, GGUF file, or hub repository id.")
    revision: str | None = Field(None, description="Hub revision; None for local files.")
    step: int | None = Field(None, description="Training step, None where a single one has none.")
    num_tokens: int | None = Field(None, description="Tokens seen, where the source says so.")
    num_tokens_rounded: bool = Field(
        False, description="`num_tokens` is from a name such as tokens3896B, which rounds it."
    )
    format: str | None = Field(
        None,
        description="safetensors, safetensors-index, trainer, dcp, safetensors+dcp, deepspeed, "
        "olmo-core, olmo-unsharded or gguf.",
    )
    has_moments: bool | None = Field(None, description="AdamW moments present; None: not known.")
    moments_url: str | None = Field(
        None, description="Directory where the optimizer state may be published; not asked yet."
    )
    size_bytes: int | None = Field(None, description="Bytes on disk, where known.")
    config: str | None = Field(
        None, description="Hugging Face config.json for a checkpoint without one of its own."
    )

    @property
    def label(self) -> str:
        """A short name for tables and axes: the step where there is one."""
        if self.step is not None:
            return f"step {self.step}"
        return self.revision or self.location.rstrip("/").rsplit("/", 1)[-1]


class RunRef(ResultModel):
    """One run of a `continual_learning` job, by the names in its spec."""

    method: str
    control: str
    seed: int

    @property
    def label(self) -> str:
        """For tables and messages: `L2 / scheduler / seed 0`."""
        return f"{self.method} / {self.control} / seed {self.seed}"


class Unit(ResultModel):
    """What is measured, recorded and resumed as a whole."""

    index: int = Field(ge=0)
    unit_id: str = Field(description="Stable inside its job, for example `0003-step-120`.")
    checkpoint: CheckpointRef | None = Field(
        None, description="What is measured; None for continual_learning, which begins anew."
    )
    ratio: float | None = Field(
        None,
        description="mix_scan with exact gradients, mix_train: the one ratio of this unit.",
    )
    learning_rate: float | None = Field(
        None,
        description="Learning rate the run used at this step, where it is known; of mix_train, the "
        "one this unit trains at.",
    )
    learning_rate_source: str | None = Field(
        None, description="Where it is from: `spec`, or the published file it was read off."
    )
    runs: list[RunRef] | None = Field(
        None, description="continual_learning: runs of one shape, trained as one."
    )
    first_task: int | None = Field(
        None, ge=0, description="continual_learning: first task of this stretch, from 0."
    )
    num_tasks: int | None = Field(None, ge=1, description="continual_learning: tasks of it.")

    @property
    def checkpoint_ref(self) -> CheckpointRef:
        """The unit's checkpoint.

        Raises:
            ConfigError: It has none: the unit is of another kind of job.
        """
        if self.checkpoint is None:
            raise ConfigError(
                f"unit {self.unit_id!r} has no checkpoint: it is of another kind of job. Expand "
                "the spec again."
            )
        return self.checkpoint


class SearchRecord(ResultModel):
    """One line search: along one update direction, on one batch's loss."""

    outcome: SearchOutcome
    eta_c: float | None
    eta_lower: float
    eta_upper: float | None = Field(description="None: no eta tried raised the loss.")
    eta_interpolated: float | None
    lambda_c: float | None = Field(description="Critical sharpness 2 / eta_c, in 1 / eta.")
    loss_at_zero: float = Field(description="Nats per token.")
    slope: float | None = Field(description="dL/d eta at 0 = -delta.g of this loss batch.")
    num_forward_passes: int
    num_extra_sign_changes: int
    trials: list[tuple[float, float | None]] = Field(
        description="(eta, loss) in the order tried; None: the loss was not finite."
    )
    loss_resolution: float = Field(
        description="Smallest loss difference that means anything here, nats per token."
    )
    loss_batch_sha256: str = Field(description="Tokens of the batch the loss was taken on.")
    duration_s: float


class Measurement(SearchRecord):
    """One search of a checkpoint series."""

    repeat: int = Field(ge=0)
    loss_batch: LossBatch = Field(description="Which batch the loss was taken on.")
    update_batch_sha256: str = Field(description="Tokens of the batch that made the gradient.")


class Summary(ResultModel):
    """All repeats of one loss batch at one checkpoint."""

    loss_batch: LossBatch
    num_repeats: int
    num_converged: int
    lambda_c_mean: float | None = Field(description="Mean over converged repeats; None if none.")
    lambda_c_standard_error: float | None = Field(description="None below two converged repeats.")
    lambda_c_values: list[float | None] = Field(description="One per repeat, None = no answer.")
    lambda_c_lower: float | None = Field(
        description="2 / largest eta_upper over converged repeats: the brackets' lower end."
    )
    lambda_c_upper: float | None = Field(
        description="2 / smallest eta_lower over converged repeats: the brackets' upper end."
    )
    loss_mean: float
    outcomes: dict[str, int] = Field(description="How many repeats ended in each outcome.")
    num_forward_passes: int


class Provenance(ResultModel):
    """Everything needed to say where a number came from."""

    spec_sha256: str
    versions: dict[str, str] = Field(description="python, probe, torch, transformers, ...")
    git_commit: str | None
    device: str = Field(description="For example `cpu (2 threads)` or the GPU's name.")
    dtype: str
    backend: Backend = "single"
    num_ranks: int = 1
    attention: str = Field(description="Kernel in use: sdpa, eager or flash_attention_2.")
    moments: MomentsSource
    moments_detail: str = Field(description="One sentence: where the moments came from.")
    num_parameters: int
    memory_kind: str = Field("", description="What `memory_bytes` measures, in words.")
    head_path: Literal["chunked", "plain"] = Field(
        "plain", description="Output layer in blocks, or the model's own logits."
    )
    hostname: str
    started_at: dt.datetime
    finished_at: dt.datetime


class UnitResult(ResultModel):
    """The result of one unit of a `checkpoint_series` job."""

    kind: Literal["checkpoint_series"] = "checkpoint_series"
    unit: Unit
    spec: dict[str, Any] = Field(description="The resolved job spec.")
    measurements: list[Measurement]
    summaries: list[Summary]
    stability_threshold: float | None = Field(
        None, description="2 / learning_rate, the line lambda_c is compared with."
    )
    num_forward_passes: int
    num_backward_passes: int
    duration_s: float
    memory_bytes: int = Field(description="Peak: device memory on a GPU, resident set on a CPU.")
    provenance: Provenance

    @property
    def has_every_answer(self) -> bool:
        """Whether every measurement converged."""
        return all(m.outcome is SearchOutcome.CONVERGED for m in self.measurements)


def eta_init_hint(result: UnitResult) -> dict[str, float] | None:
    """First guesses for the unit after this one: the last eta_c found on each loss batch.

    Taken from the recorded result and from nothing else, so that a resumed job gives the same
    numbers as one that was never interrupted. None where no measurement has an answer.
    """
    found: dict[str, float] = {
        m.loss_batch: m.eta_c for m in result.measurements if m.eta_c is not None
    }
    return found or None


class Plan(ResultModel):
    """What a job would do, worked out before anything is queued."""

    kind: str
    spec: dict[str, Any]
    spec_sha256: str
    units: list[Unit]
    num_forward_passes: int = Field(description="Expected in all, for the chosen search.")
    max_forward_passes: int = Field(description="Upper limit in all.")
    num_backward_passes: int
    num_tokens_per_pass: int = Field(
        description="Of the largest batch; 0 of continual_learning, whose batches are of images."
    )
    num_parameters: int | None = Field(None, description="None where no config is at hand.")
    backend: Backend = Field("single", description="As this machine would run it.")
    num_ranks: int = Field(
        1, description="Processes; without `parallel.ranks` as many as this machine would start."
    )
    memory_bytes_per_rank: int | None = Field(
        None, description="Expected peak of weights and buffers of one rank, activations left out."
    )
    memory_bytes: int | None = Field(None, description="The same, all ranks together.")
    notes: list[str] = Field(default_factory=list, description="What could not be known offline.")
