"""What a continual-learning unit gives back (torch-free): runs of one shape over some tasks.

Signals are those of arXiv:2509.19698 as `probe.spec_continual` and `docs/continual-learning.md`
define them. A value that does not exist (a bound whose noise is zero, a run that diverged) is
None, never a made-up number.
"""

from typing import Any, Literal

from pydantic import Field

from probe.result import Provenance, ResultModel, RunRef, Unit

Bound = Literal["gradient", "curvature", "combined"]
TaskOutcome = Literal["finished", "diverged"]

# One value per layer and for the whole network, in the order of `layer_names`.
LAYER_SIGNALS: dict[str, str] = {
    "learning_rate": "eta of the layer; of the network, the mean over its parameters",
    "effective_step": "alpha: mean over parameters of eta / ((1 - b1^t)(sqrt(vhat) + eps)); "
    "SGD: eta",
    "gradient_norm": "norm of the data loss's gradient on the batch, regularisers left out",
    "noise_variance": "sigma2_ps = mean over the batch of |g_i - g|^2",
    "sharpness": "lambda: top eigenvalue of the layer's (or whole) Hessian of the batch's loss",
    "sharpness_residual": "|H v - lambda v| / |lambda|: 0 where power iteration has converged",
    "normalized_sharpness": "lambda_bar = lambda * eta / (RMS(sqrt(vhat)) + eps); SGD: lambda",
    "sharpness_mean": "mu: moving average of lambda_bar",
    "volatility": "Vol = (lambda_bar - mu)^2 / (mu + eps)",
    "bound_gradient": "alpha_g* = B |g|^2 / sigma2_ps",
    "bound_curvature": "alpha_vol* = 1 / (kappa Vol)",
    "bound_combined": "alpha~* = B |g|^2 / (sigma2_ps + beta |g|^2 Vol)",
    "weight_norm": "norm of the parameters",
    "gradient_to_parameter": "gradient_norm / weight_norm",
}
# One value per run.
RUN_SIGNALS: dict[str, str] = {
    "accuracy": "share of the batches' images that were right before their step",
    "loss": "cross-entropy of the same, nats",
    "hessian_rank": "effective rank of the empirical Fisher of `signals.rank_samples` images",
    "unit_sign_entropy": "mean over hidden units of the entropy of P(pre-activation > 0), bits",
    "dead_units": "share of hidden units whose pre-activation is above 0 for no image of the batch",
}


class Windows(ResultModel):
    """A task's course in rows: each the median over the measurements since the one before."""

    last_step: list[int] = Field(description="Step within the task of each row's end, from 1.")
    runs: dict[str, list[float | None]] = Field(description="Signal -> value per row.")
    layers: dict[str, list[list[float | None]]] = Field(
        description="Signal -> per layer (the whole network last) -> value per row."
    )


class RunTask(ResultModel):
    """One run and one task."""

    task: int = Field(ge=0, description="From 0.")
    outcome: TaskOutcome = Field(
        description="diverged: a loss of this task was NaN or infinite. Until it is reset a run "
        "stays so."
    )
    accuracy: float | None = Field(
        description="Share of the images of all the task's batches that were right before their "
        "step: the average task accuracy."
    )
    accuracy_end: float | None = Field(description="Over all the task's images after its end.")
    loss: float | None = Field(description="Cross-entropy, mean over the same images, nats.")
    loss_end: float | None = Field(description="Over all the task's images after its end.")
    violation_share: dict[Bound, float] | None = Field(
        description="Share of the task's measurements in which some layer's effective step was "
        "above its bound: the predicted loss of trainability. None: none was taken."
    )
    windows: Windows


class RunRecord(ResultModel):
    """One run over the unit's tasks."""

    run: RunRef
    tasks: list[RunTask]


class ContinualUnitResult(ResultModel):
    """The result of one unit of a `continual_learning` job."""

    kind: Literal["continual_learning"] = "continual_learning"
    unit: Unit
    spec: dict[str, Any] = Field(description="The resolved job spec.")
    layer_names: list[str] = Field(description="fc1, fc2, ...; the last is `network`, the whole.")
    runs: list[RunRecord]
    num_steps_per_task: int
    resumed_at_task: int | None = Field(
        description="First task trained here; None: all of the unit's, from its own start. The "
        "numbers do not depend on it."
    )
    num_forward_passes: int = Field(description="Evaluations after tasks, batch by batch.")
    num_backward_passes: int = Field(description="Gradient steps, each run's counted.")
    duration_s: float
    memory_bytes: int = Field(description="Peak: device memory on a GPU, resident set on a CPU.")
    provenance: Provenance

    @property
    def has_every_answer(self) -> bool:
        """Whether no run diverged."""
        return all(task.outcome == "finished" for run in self.runs for task in run.tasks)
