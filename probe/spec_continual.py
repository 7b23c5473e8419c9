"""The spec of a continual-learning job: small networks on a stream of tasks (torch-free).

Why does a network stop being able to learn new tasks? Every method (activation, normalisation,
regularisers) is run with every control (none, reset, a step-size scheduler) and every seed.
Formulas and defaults are those of arXiv:2509.19698; where its text is silent or misprinted, the
field says what is meant.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from probe.spec_base import JobFields, SpecModel

RunName = Annotated[str, Field(min_length=1, max_length=60, description="For charts and tables.")]
LayerLearningRate = Annotated[float, Field(gt=0, le=10)]


class IdxImages(SpecModel):
    """MNIST's own files: IDX, plain or gzipped."""

    type: Literal["idx"]
    images: str = Field(min_length=1, description="train-images-idx3-ubyte or its .gz.")
    labels: str = Field(min_length=1, description="train-labels-idx1-ubyte or its .gz.")


class NpzImages(SpecModel):
    """A NumPy archive with one array of images and one of labels."""

    type: Literal["npz"]
    path: str = Field(min_length=1, description="A .npz file; arrays of objects are refused.")
    images: str = Field("images", description="Name of the array (N, ...) of images or features.")
    labels: str = Field("labels", description="Name of the array (N,) of integer classes.")


class HubImages(SpecModel):
    """A data set of the Hugging Face hub with an image and a label column."""

    type: Literal["hub"]
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="Repository id: ylecun/mnist.")
    revision: str | None = Field(None, description="Branch, tag or commit; None: the default.")
    split: str = "train"
    image_column: str = "image"
    label_column: str = "label"


class PackagedImages(SpecModel):
    """Small data that comes with a Python package: nothing is downloaded."""

    type: Literal["packaged"]
    name: Literal["digits", "mnist1d"] = Field(
        description="digits: 1,797 8x8 images of scikit-learn; mnist1d: 4,000 made signals of 40 "
        "numbers, of the package mnist1d."
    )


ImageData = Annotated[
    IdxImages | NpzImages | HubImages | PackagedImages, Field(discriminator="type")
]


class Stream(SpecModel):
    """What is learned, task after task."""

    type: Literal["random_labels", "permuted_inputs"] = Field(
        description="random_labels: the same images, every label drawn anew for each task; "
        "permuted_inputs: true labels, the inputs' order drawn anew for each task."
    )
    data: ImageData
    num_images: int | None = Field(
        None, ge=2, description="Drawn once, by `seed`, the same for all runs; None: all."
    )
    num_tasks: int = Field(40, ge=1, le=100_000)
    epochs: int = Field(250, ge=1, le=100_000, description="Passes over the images per task.")
    batch_size: int = Field(
        256, ge=2, description="Images per step; the last step of an epoch takes what is left."
    )
    seed: int = Field(0, ge=0, description="Of the choice of images.")


class Network(SpecModel):
    """The multilayer perceptron that all methods share."""

    hidden: list[Annotated[int, Field(ge=1, le=65_536)]] = Field(
        [256, 256], min_length=1, max_length=64, description="Units of every hidden layer."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "cpu", description="cpu by default: one small network does not fill a GPU."
    )


class Adam(SpecModel):
    """Adam as in torch.optim, one learning rate per layer."""

    name: Literal["adam"] = "adam"
    learning_rate: LayerLearningRate = 1e-3
    betas: tuple[
        Annotated[float, Field(ge=0, lt=1)],
        Annotated[float, Field(ge=0, lt=1)],
    ] = Field((0.9, 0.999), strict=False)  # a list in YAML and JSON
    eps: float = Field(1e-8, gt=0)


class PlainSgd(SpecModel):
    """Gradient descent without momentum, one learning rate per layer."""

    name: Literal["sgd"]
    learning_rate: LayerLearningRate = 1e-2


class L2(SpecModel):
    """Coupled decay: gradient += strength * theta, on every parameter, norms' scales included."""

    type: Literal["l2"]
    strength: float = Field(gt=0, le=10)


class Wasserstein(SpecModel):
    """Squared distance of sorted parameters from sorted initial ones, per tensor."""

    type: Literal["wasserstein"]
    strength: float = Field(gt=0, le=1e6, description="The loss gains strength * distance.")
    reduction: Literal["mean", "sum"] = Field(
        "mean", description="Over a tensor's entries; sums of tensors are added in both cases."
    )


Regularizer = Annotated[L2 | Wasserstein, Field(discriminator="type")]


class Method(SpecModel):
    """One kind of network and loss."""

    name: RunName
    activation: Literal["relu", "leaky_relu", "crelu", "tanh", "linear"] = "relu"
    leak: float | None = Field(
        None, gt=0, lt=1, description="leaky_relu: slope below 0 (the paper's rho)."
    )
    normalization: Literal["none", "batch", "layer"] = Field(
        "none", description="Before every activation, with learned scale and shift."
    )
    regularizers: list[Regularizer] = Field(default_factory=list, max_length=8)
    learning_rate: LayerLearningRate | None = Field(None, description="Instead of the optimizer's.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.activation == "leaky_relu") != (self.leak is not None):
            raise ValueError(
                f"activation is {self.activation!r} and leak {self.leak}: leaky_relu needs leak, "
                "the others take none"
            )
        kinds = [regularizer.type for regularizer in self.regularizers]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"each type of regularizer may stand once, got {kinds}")
        return self


class Scheduler(SpecModel):
    """Algorithm 1: cool a layer whose effective step is above its safe bound, warm a timid one."""

    scope: Literal["layer", "network"] = Field(
        "layer",
        description="layer: each by its own signals; network: one decision for all, by the whole "
        "network's.",
    )
    signal: Literal["combined", "gradient", "curvature"] = Field(
        "combined", description="The bound: alpha~*, alpha_g* or alpha_vol*."
    )
    safety: float = Field(0.01, ge=0, lt=1, description="safe = (1 - safety) * bound.")
    cool: float = Field(0.99, gt=0, lt=1, description="Factor on a rate that is too high.")
    warm: float = Field(1.01, gt=1, le=2, description="Factor on a rate that is timid.")
    min_effective_step: float = Field(0.12, ge=0, description="No cooling at or below it.")
    warm_until: float = Field(
        0.3, ge=0, le=1, description="Warming ends after this share of the stream's steps."
    )
    warm_below: float = Field(
        0.5, gt=0, le=1, description="Timid: effective step < warm_below * safe."
    )


class Control(SpecModel):
    """What is done against the loss of trainability."""

    name: RunName
    reset: Literal["never", "task"] = Field(
        "never", description="task: new random parameters and optimizer state at every task."
    )
    scheduler: Scheduler | None = None
    epochs: int | None = Field(
        None, ge=1, le=100_000, description="Per task, instead of the stream's."
    )


class Signals(SpecModel):
    """What is measured beside the accuracy, how often and how exactly."""

    log_every: int = Field(40, ge=1, description="Steps between two measurements.")
    control_every: int = Field(
        40,
        ge=1,
        description="Steps between two decisions of a scheduler (K). Signals are measured at these "
        "steps too, and every measurement enters the moving averages.",
    )
    windows_per_task: int = Field(
        10, ge=1, le=1000, description="Rows kept per task: each the median of its measurements."
    )
    power_iterations: int = Field(
        2,
        ge=1,
        le=1000,
        description="Of the top Hessian eigenvalue, per measurement, from the "
        "vector of the one before.",
    )
    first_power_iterations: int = Field(
        20, ge=1, le=1000, description="Of the first one and after a reset: from a random vector."
    )
    rank_samples: int = Field(
        100, ge=2, le=4096, description="Images in the Gram matrix of the Hessian rank (M)."
    )
    ema: float = Field(0.9, gt=0, lt=1, description="nu of the mean normalised sharpness.")
    kappa: float = Field(1.0, gt=0, description="alpha_vol* = 1 / (kappa Vol).")
    beta: float = Field(
        1.0, ge=0, le=1, description="Weight of the volatility in the combined noise."
    )


class ContinualLearningSpec(JobFields):
    """How well one network learns one task after another: methods x controls x seeds."""

    kind: Literal["continual_learning"]
    stream: Stream
    model: Network = Network()
    optimizer: Annotated[Adam | PlainSgd, Field(discriminator="name")] = Adam()
    methods: list[Method] = Field(min_length=1, max_length=64)
    controls: list[Control] = Field([Control(name="vanilla")], min_length=1, max_length=64)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(
        [0, 1, 2],
        min_length=1,
        max_length=256,
        description="Of initial values, labels, permutations and the order of images.",
    )
    signals: Signals = Signals()
    tasks_per_unit: int = Field(
        5, ge=1, description="Tasks of one unit: what is recorded as a whole."
    )
    runs_per_unit: int = Field(
        32, ge=1, le=4096, description="Most runs of equal shape that are trained as one."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field in ("methods", "controls"):
            names = [entry.name for entry in getattr(self, field)]
            if len(set(names)) < len(names):
                raise ValueError(f"names of {field} must differ, got {names}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, got {self.seeds}")
        images = self.stream.num_images
        if images is not None and self.stream.batch_size > images:
            raise ValueError(
                f"stream.batch_size is {self.stream.batch_size}, stream.num_images {images}"
            )
        fault = None if images is None else self.fault_of_last_batch(images)
        if fault is not None:
            raise ValueError(fault)
        return self

    def fault_of_last_batch(self, num_images: int) -> str | None:
        """What is wrong with an epoch's last batch of so many images; None: nothing.

        One image alone has no variance: batch normalisation would make all its units equal to
        their shifts and take 0 into the running variance.
        """
        is_batch = any(method.normalization == "batch" for method in self.methods)
        if not is_batch or num_images % self.stream.batch_size != 1:
            return None
        return (
            f"{num_images} images in batches of {self.stream.batch_size} leave a last batch of one "
            "image, of which normalization: batch has no variance. Change stream.num_images or "
            "stream.batch_size by one."
        )

    def method(self, name: str) -> Method:
        """The method of this name."""
        return next(method for method in self.methods if method.name == name)

    def control(self, name: str) -> Control:
        """The control of this name."""
        return next(control for control in self.controls if control.name == name)

    def epochs_of(self, control: Control) -> int:
        """Passes over the images per task."""
        return self.stream.epochs if control.epochs is None else control.epochs
