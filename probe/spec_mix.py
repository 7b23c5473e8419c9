"""The spec of a mix scan: one checkpoint, a mixture of data, the losses it must not raise.

Torch-free, as `probe.spec`, whose parts it is made of.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from probe.spec import (
    AdamW,
    Checkpoints,
    DataSource,
    ModelOptions,
    ParallelOptions,
    SearchOptions,
)
from probe.spec_base import JobFields, SpecModel

Ratio = Annotated[float, Field(ge=0, le=1)]


class RatioGrid(SpecModel):
    """Evenly spaced ratios, both ends among them."""

    start: Ratio = Field(0.0, description="First ratio.")
    stop: Ratio = Field(1.0, description="Last ratio.")
    num: int = Field(11, ge=2, le=1001, description="How many.")

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if not self.start < self.stop:
            raise ValueError(f"need start < stop, got {self.start} and {self.stop}")
        return self


def _form_of_ratios(value: Any) -> str | None:
    """Which form was meant: so that what is wrong with it is said of that form alone."""
    if isinstance(value, dict | RatioGrid):
        return "ratio_grid"
    return "ratio_list" if isinstance(value, list) else None


Ratios = Annotated[
    Annotated[list[Ratio], Tag("ratio_list")] | Annotated[RatioGrid, Tag("ratio_grid")],
    Discriminator(
        _form_of_ratios,
        custom_error_type="ratios_form",
        custom_error_message="must be a list of ratios or {start, stop, num}",
    ),
]


class MixtureSources(SpecModel):
    """The sources of a mixture, and which of them is varied."""

    sources: list[DataSource] = Field(
        min_length=2,
        max_length=16,
        description="One of them is varied; the others share the rest in proportion to `share`.",
    )
    varied: str | None = Field(
        None, description="Name of the source whose share of the tokens is the ratio; None: first."
    )

    @model_validator(mode="after")
    def _sources_are_named(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"source names must differ, got {names}")
        if self.varied is not None and self.varied not in names:
            raise ValueError(f"varied is {self.varied!r}, the sources are {', '.join(names)}")
        return self

    @property
    def varied_index(self) -> int:
        """Place of the varied source among `sources`."""
        names = [source.name for source in self.sources]
        return 0 if self.varied is None else names.index(self.varied)


class Mixture(MixtureSources):
    """The data the update direction is made from, and how its composition is varied."""

    ratios: Ratios = Field(
        RatioGrid(), description="Shares of the varied source: a list, or {start, stop, num}."
    )
    gradients: Literal["shared", "exact"] = Field(
        "shared",
        description="shared: one gradient per source and step serves all ratios; exact: a batch "
        "drawn at each ratio.",
    )
    buffers: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="What shared moments are kept in. bfloat16 halves their memory and turns the "
        "direction by about 0.5 %, 2 % where the sources' gradients nearly cancel.",
    )
    refine: int = Field(
        0, ge=0, le=32, description="Further ratios, one by one, beside the best so far."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.ratios, list) and sorted(set(self.ratios)) != self.ratios:
            raise ValueError(f"ratios must ascend without repeats, got {self.ratios}")
        if isinstance(self.ratios, list) and not self.ratios:
            raise ValueError("ratios is empty: give at least one")
        if self.refine and isinstance(self.ratios, list) and len(self.ratios) < 2:
            raise ValueError("refine needs at least two ratios to look between")
        if self.refine and self.gradients == "exact":
            raise ValueError(
                "refine needs gradients: shared, which can give the direction at any ratio; with "
                "exact each ratio is a unit of its own, fixed beforehand"
            )
        return self


def ratios_of(mixture: Mixture) -> list[float]:
    """The ratios of the grid or the list, ascending."""
    grid = mixture.ratios
    if isinstance(grid, list):
        return list(grid)
    width = (grid.stop - grid.start) / (grid.num - 1)
    # Rounded, so that 0.1 steps read 0.3 and not 0.30000000000000004.
    return [round(grid.start + index * width, 12) for index in range(grid.num)]


class EvalTask(SpecModel):
    """One loss that the step must not raise."""

    data: DataSource = Field(description="Its `name` is the task's; `share` is without meaning.")
    sequences: int = Field(ge=1, le=65_536, description="Sequences of the task's fixed batch.")


class MixBatches(SpecModel):
    """How documents are cut into sequences, and how many make a step."""

    sequence_length: int = Field(
        ge=8, le=1_048_576, description="Tokens of a packed sequence; OLMo-2: 4096."
    )
    batch_sequences: int = Field(
        ge=1,
        le=65_536,
        description="Sequences of a step: of every source with shared gradients, of the mixture "
        "with exact ones.",
    )
    micro_batch_sequences: int = Field(
        1, ge=1, le=65_536, description="Sequences of one forward call; fixed, so results repeat."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Order of documents and sequences.")


class MixScanSpec(JobFields):
    """Relative critical sharpness of every task along the direction of every mixture."""

    kind: Literal["mix_scan"]
    checkpoints: Checkpoints
    model: ModelOptions = ModelOptions()
    parallel: ParallelOptions = ParallelOptions()
    optimizer: AdamW = AdamW()
    mixture: Mixture
    eval_tasks: list[EvalTask] = Field(min_length=1, max_length=32)
    batches: MixBatches
    measurement: SearchOptions = SearchOptions()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [task.data.name for task in self.eval_tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"names of eval_tasks must differ, got {names}")
        if self.mixture.gradients == "shared" and self.optimizer.clip_grad_norm is not None:
            raise ValueError(
                "optimizer.clip_grad_norm with mixture.gradients shared: the clipping factor "
                "depends on the ratio, so one set of gradients cannot serve all of them. Use "
                "gradients: exact, or leave clip_grad_norm out"
            )
        return self
