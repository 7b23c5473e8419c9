"""Job specs: what a user asks for, the same in YAML, over HTTP and in Python (torch-free).

Unknown keys are refused with the nearest valid name, every number has a range, and a value
that is missing is an error that lists the choices, never a guess.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from probe.spec_base import JobFields, SpecModel


class LocalCheckpoints(SpecModel):
    """Directories on this machine: safetensors, Trainer, torch DCP, DeepSpeed, OLMo-core, OLMo."""

    source: Literal["local"] = "local"
    path: str = Field(
        min_length=1, description="One checkpoint directory, or a glob: `runs/a/step-*`."
    )
    step_pattern: str = Field(
        r"(?:step|checkpoint|ckpt|iter)[-_]?(\d+)",
        description="Regex with one group: the training step, searched in the directory's name.",
    )
    config: str | None = Field(
        None,
        min_length=1,
        description="Hugging Face config.json (or a directory with one) of the model, for torch "
        "DCP and DeepSpeed directories that hold none.",
    )
    every: int = Field(1, ge=1, description="Take every k-th checkpoint of the sorted series.")
    first_step: int | None = Field(None, ge=0, description="Leave out checkpoints before it.")
    last_step: int | None = Field(None, ge=0, description="Leave out checkpoints after it.")


class HubCheckpoints(SpecModel):
    """Revisions of one Hugging Face hub repository."""

    source: Literal["hub"]
    repo: str = Field(
        pattern=r"^[\w.-]+/[\w.-]+$", description="Repository id: allenai/OLMo-2-0425-1B."
    )
    revisions: list[str] = Field(
        min_length=1,
        description="Revisions or patterns (* and ?): stage1-step*-tokens*. Only branches and tags "
        "that exist are measured; a full name needs no listing.",
    )
    step_pattern: str = Field(
        r"step(\d+)", description="Regex with one group: the training step, in the revision's name."
    )
    every: int = Field(1, ge=1, description="Take every k-th revision of the sorted series.")
    first_step: int | None = Field(None, ge=0, description="Leave out revisions before it.")
    last_step: int | None = Field(None, ge=0, description="Leave out revisions after it.")
    optimizer_states: str = Field(
        "auto",
        description="Where AdamW's moments are published, which the revisions lack. auto: the "
        "known places of OLMo-2 1B, 7B and 13B; none: nowhere; an https URL of a step's directory "
        "with `{step}` in it; or a local .csv file with columns Step and Checkpoint Directory. The "
        "worker fetches them; what is not there is accumulated instead, and recorded.",
    )

    @field_validator("optimizer_states")
    @classmethod
    def _states_are_somewhere(cls, value: str) -> str:
        is_url = re.match(r"(https://[^/]|http://(127\.0\.0\.1|localhost)[:/])", value)
        is_file = value.endswith(".csv") and "://" not in value
        if (
            value in ("auto", "none")
            or is_file
            or (is_url and "{step}" in value and not value.endswith(".csv"))
        ):
            return value
        raise ValueError("choose auto, none, an https URL with {step} in it, or a local .csv file")


class GgufCheckpoint(SpecModel):
    """One GGUF file: weights only, dequantised on load."""

    source: Literal["gguf"]
    path: str = Field(min_length=1, description="A .gguf file, or .gguf.gz (unpacked to a cache).")
    step: int | None = Field(None, ge=0, description="Training step, where it is known.")


Checkpoints = Annotated[
    LocalCheckpoints | HubCheckpoints | GgufCheckpoint, Field(discriminator="source")
]


class ModelOptions(SpecModel):
    """How the model is run."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of the forward pass; an fp32 base is kept for every dtype."
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="auto: flash_attention_2 where the GPU, dtype and package allow, else sdpa.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where present.")
    tokenizer: str | None = Field(
        None, description="Directory or hub id; None: the checkpoint's own tokenizer."
    )
    activation_checkpointing: bool = Field(
        False,
        description="Run each layer again in the backward pass instead of keeping its "
        "activations: less memory, the same bits, one forward pass more per gradient.",
    )
    compile: bool = Field(
        False,
        description="torch.compile each layer: faster on long runs, first passes take a minute; "
        "losses move by rounding, about 1e-6 of themselves in float32.",
    )


class ParallelOptions(SpecModel):
    """How many processes share the model, and what spreads it over them.

    There is no dtype here: weights are kept in fp32 and gathered in `model.dtype`.
    """

    backend: Literal["auto", "single", "fsdp2", "deepspeed"] = Field(
        "auto",
        description="single: one process holds all; fsdp2, deepspeed (ZeRO-3): each holds its part "
        "of every weight; auto: fsdp2 where there are several, else single.",
    )
    ranks: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Processes, one GPU each where the model runs on GPUs; None: the fewest GPUs "
        "that hold the model, 1 on a CPU or where the model's size is not known beforehand.",
    )
    nodes: int = Field(
        1, ge=1, le=1024, description="Machines, with as many ranks on each; several need Ray."
    )
    offload_base: bool = Field(
        False,
        description="Keep the unperturbed fp32 weights in host memory: 4 bytes per parameter less "
        "on the GPU, a copy of them for every point of a search. Without effect on a CPU.",
    )

    @model_validator(mode="before")
    @classmethod
    def _dtype_is_the_models(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "dtype" in raw:
            raise ValueError("dtype is model.dtype: weights are gathered in it and kept in fp32")
        return raw

    @model_validator(mode="after")
    def _one_process_is_one_rank(self) -> Self:
        if self.backend == "single" and self.ranks not in (None, 1):
            raise ValueError(
                f"backend single is one process, ranks is {self.ranks}: use backend fsdp2 or "
                "deepspeed, or ranks: 1"
            )
        return self

    @model_validator(mode="after")
    def _every_node_has_as_many_ranks(self) -> Self:
        if self.nodes > 1 and (self.ranks is None or self.ranks % self.nodes):
            raise ValueError(
                f"nodes is {self.nodes}, ranks is {self.ranks}: set ranks, those of all nodes, "
                f"to a multiple of {self.nodes}"
            )
        return self


class AdamW(SpecModel):
    """The AdamW step the run would take."""

    name: Literal["adamw"] = "adamw"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), strict=False, description="Decay rates of the two moments; OLMo-2: 0.9, 0.95."
    )
    eps: float = Field(1e-8, gt=0, le=1, description="Added to sqrt(vhat).")
    weight_decay: float = Field(0.1, ge=0, le=10, description="Decoupled; OLMo-2: 0.1.")
    no_decay: list[str] = Field(
        default_factory=lambda: ["*embed_tokens*"],
        description="Patterns of parameter names without decay; OLMo-2: embeddings only.",
    )
    clip_grad_norm: float | None = Field(
        None, gt=0, description="Clip the gradient's global norm first, where the run does."
    )
    moments: Literal["auto", "checkpoint", "warmup"] = Field(
        "auto",
        description="checkpoint: saved with it, an error where absent; warmup: accumulated with "
        "the parameters fixed (lr 0); auto: checkpoint where present, else warmup; recorded.",
    )
    warmup_steps: int = Field(
        10, ge=1, le=10_000, description="Batches the moments are accumulated over (lr 0)."
    )


class Sgd(SpecModel):
    """Plain gradient descent: the direction is the gradient plus decay."""

    name: Literal["sgd"]
    weight_decay: float = Field(0.0, ge=0, le=10, description="Coupled: gradient += wd * theta.")
    no_decay: list[str] = Field(
        default_factory=list, description="Patterns of parameter names without decay."
    )
    clip_grad_norm: float | None = Field(None, gt=0, description="Clip the gradient's norm first.")


Optimizer = Annotated[AdamW | Sgd, Field(discriminator="name")]


class TextFormat(SpecModel):
    """Every token counts."""

    type: Literal["text"] = "text"
    field: str = Field("text", description="Column or JSON key that holds the text.")


class QuestionAnswerFormat(SpecModel):
    """Only the answer's tokens count; the question conditions them."""

    type: Literal["question_answer"]
    question: str = Field("question", description="Column or key of the question.")
    answer: str = Field("answer", description="Column or key of the answer (text or an index).")
    choices: str | None = Field(
        None, description="Column or key of a list; the answer is then an index into it (MMLU)."
    )
    template: str = Field(
        "Question: {question}\nAnswer: ",
        description="Text before the answer; {question} is filled in.",
    )


class _DataSource(SpecModel):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$", description="In results.")
    share: float = Field(1.0, gt=0, description="Weight of this source's sequences in a batch.")
    format: Annotated[TextFormat | QuestionAnswerFormat, Field(discriminator="type")] = TextFormat()


class FileData(_DataSource):
    """Files on this machine: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt."""

    type: Literal["files"] = "files"
    paths: list[str] = Field(min_length=1, description="Files or globs, read in sorted order.")


class HubData(_DataSource):
    """A data set of the Hugging Face hub, through `datasets`."""

    type: Literal["hub"]
    dataset: str = Field(min_length=1, description="For example mlfoundations/dclm-baseline-1.0.")
    config: str | None = Field(None, description="Data set configuration, where it has several.")
    split: str = Field("train", description="Split.")
    revision: str | None = Field(None, description="Pin it: the default branch can change.")
    streaming: bool = Field(True, description="Read as needed instead of downloading it all.")


DataSource = Annotated[FileData | HubData, Field(discriminator="type")]


class Batches(SpecModel):
    """The fixed tokens every gradient and every loss is taken on."""

    sources: list[DataSource] = Field(min_length=1, description="Mixed by `share`.")
    sequence_length: int = Field(
        ge=8, le=1_048_576, description="Tokens of a packed sequence; OLMo-2: 4096."
    )
    batch_sequences: int = Field(
        ge=1, le=65_536, description="Sequences of an update batch (gradient and its loss)."
    )
    held_out_sequences: int | None = Field(
        None, ge=1, le=65_536, description="Sequences of the fixed held-out loss batch."
    )
    micro_batch_sequences: int = Field(
        1, ge=1, le=65_536, description="Sequences of one forward call; fixed, so results repeat."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Order of documents and sequences.")


class SearchOptions(SpecModel):
    """How eta_c is searched, and how often."""

    repeats: int = Field(1, ge=1, le=10_000, description="Measurements per checkpoint.")
    search: Literal["interpolate", "bisect"] = Field(
        "interpolate", description="bisect is the paper's; both end with the same certificate."
    )
    rel_tol: float = Field(
        1 / 16, ge=1e-9, lt=1, description="Stop when 1 - eta_lower / eta_upper <= rel_tol."
    )
    eta_init: float = Field(
        1e-3, gt=0, description="First eta tried; afterwards the last eta_c is."
    )
    eta_min: float = Field(1e-12, ge=1e-30, description="Give up below it.")
    eta_max: float = Field(1e6, gt=0, le=1e30, description="Give up above it.")
    max_forward_passes: int = Field(40, ge=3, le=1000, description="Hard limit for one search.")

    @model_validator(mode="after")
    def _eta_range(self) -> Self:
        if not self.eta_min <= self.eta_init <= self.eta_max:
            raise ValueError(
                f"need eta_min <= eta_init <= eta_max, got {self.eta_min}, {self.eta_init}, "
                f"{self.eta_max}"
            )
        return self


class MeasurementOptions(SearchOptions):
    """How eta_c is searched, how often, and on which loss."""

    loss_batch: Literal["update", "held_out", "both"] = Field(
        description="Batch the loss is taken on: `update` (the batch of the gradient, as in the "
        "paper), `held_out` (fixed tokens the step has not seen), or both.",
    )


class Schedule(SpecModel):
    """The learning rate the run used, so that 2/eta is drawn beside lambda_c."""

    type: Literal["auto", "constant", "warmup_stable_decay", "cosine", "linear", "none"] = Field(
        "auto",
        description="auto: that of a published run known here (revisions of OLMo-2 1B, 7B, 13B and "
        "32B on the hub), else none; none: no 2/eta.",
    )
    peak: float | None = Field(None, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(0, ge=0, description="Linear from `start` to peak.")
    start: float = Field(0.0, ge=0, description="Learning rate at step 0 where there is warm-up.")
    decay_start: int | None = Field(
        None, ge=0, description="warmup_stable_decay: first step of the linear decay."
    )
    total_steps: int | None = Field(None, ge=1, description="Step at which the decay ends.")
    final: float = Field(0.0, ge=0, description="Learning rate at total_steps.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "auto" and self.peak is not None:
            raise ValueError("peak needs a type: constant, warmup_stable_decay, cosine or linear")
        needs = {
            "auto": (),
            "none": (),
            "constant": ("peak",),
            "warmup_stable_decay": ("peak", "decay_start", "total_steps"),
            "cosine": ("peak", "total_steps"),
            "linear": ("peak", "total_steps"),
        }[self.type]
        missing = [name for name in needs if getattr(self, name) is None]
        if missing:
            raise ValueError(f"schedule {self.type!r} needs {', '.join(missing)}")
        if self.decay_start is not None and self.total_steps is not None:
            if not self.warmup_steps <= self.decay_start < self.total_steps:
                raise ValueError("need warmup_steps <= decay_start < total_steps")
        elif self.total_steps is not None and self.warmup_steps >= self.total_steps:
            raise ValueError("need warmup_steps < total_steps")
        return self


class CheckpointSeriesSpec(JobFields):
    """Critical sharpness of every checkpoint of one run."""

    kind: Literal["checkpoint_series"]
    checkpoints: Checkpoints
    model: ModelOptions = ModelOptions()
    parallel: ParallelOptions = ParallelOptions()
    optimizer: Optimizer = AdamW()
    batches: Batches
    measurement: MeasurementOptions
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def _held_out_needs_sequences(self) -> Self:
        if self.measurement.loss_batch != "update" and self.batches.held_out_sequences is None:
            raise ValueError(
                f"measurement.loss_batch is {self.measurement.loss_batch!r}: set "
                "batches.held_out_sequences"
            )
        return self

    @field_validator("batches")
    @classmethod
    def _source_names_differ(cls, value: Batches) -> Batches:
        names = [source.name for source in value.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"source names must differ, got {names}")
        return value
