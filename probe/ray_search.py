"""The loss along theta - eta * delta on one batch, and the search for eta_c on it."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from probe.batches import Batch
from probe.errors import NonFiniteLossError
from probe.line_search import LineSearchResult, find_critical_learning_rate
from probe.loss import CausalLoss
from probe.parallel import ShardedModel
from probe.perturb import Ray
from probe.progress import Meter
from probe.result import LossBatch, Measurement
from probe.spec import SearchOptions


def loss_resolution(
    loss_at_zero: float, loss_again: float, *, dtype: torch.dtype, num_targets: int
) -> float:
    """The smallest loss difference that means anything, nats per token.

        max( |L0 - L0'|,  eps(dtype) |L0| / sqrt(num_targets),  eps(float32) |L0| )

    L0' is L0 evaluated once more through the same write and forward: what the machine itself
    does not repeat. The second term is the forward's rounding, about eps of its dtype per
    token and independent from token to token; the third is the per-token value's own, which
    need not average out.

    Args:
        loss_at_zero: L0.
        loss_again: L0'.
        dtype: Of the forward pass.
        num_targets: Tokens the mean is taken over.
    """
    per_token = torch.finfo(dtype).eps * abs(loss_at_zero)
    single = torch.finfo(torch.float32).eps * abs(loss_at_zero)
    return max(abs(loss_at_zero - loss_again), per_token / math.sqrt(num_targets), single)


def check_finite(loss_at_zero: float, which: str) -> None:
    """Refuse a loss at eta = 0 that leaves nothing to compare with.

    Raises:
        NonFiniteLossError: It is NaN or infinite.
    """
    if not math.isfinite(loss_at_zero):
        raise NonFiniteLossError(
            f"the loss of {which} batch is {loss_at_zero} at the checkpoint's own parameters, so "
            "no ray can be measured. Use model.dtype: float32 or bfloat16 if it is float16; "
            "otherwise the checkpoint itself has diverged."
        )


@dataclass(frozen=True, slots=True)
class Searched:
    """One finished search and what it took."""

    found: LineSearchResult
    num_forward_passes: int  # those at eta = 0 that were needed included
    loss_resolution: float  # nats per token
    duration_s: float


def search_fields(searched: Searched) -> dict[str, Any]:
    """What every kind of measurement records of a search, by field name."""
    found = searched.found
    return {
        "outcome": found.outcome,
        "eta_c": found.eta_c,
        "eta_lower": found.eta_lower,
        "eta_upper": found.eta_upper if math.isfinite(found.eta_upper) else None,
        "eta_interpolated": found.eta_interpolated,
        "lambda_c": found.lambda_c,
        "loss_at_zero": found.loss_at_zero,
        "slope": found.slope,
        "num_extra_sign_changes": found.num_extra_sign_changes,
        "trials": [(eta, loss if math.isfinite(loss) else None) for eta, loss in found.trials],
        "num_forward_passes": searched.num_forward_passes,
        "loss_resolution": searched.loss_resolution,
        "duration_s": searched.duration_s,
    }


class RaySearch:
    """All searches of one checkpoint on one kind of loss batch; each starts where the last ended.

    Args:
        model: Moved along the rays; back at its base, bit for bit, after every search.
        loss: Evaluated at each point.
        options: The search's tolerance, limits and algorithm.
        meter: Counts the passes.
        name: Of the loss batch, for messages: `update`, `held_out`, or a task's.
        eta_init: First guess, from the checkpoint before; None: the spec's.
    """

    def __init__(
        self,
        model: ShardedModel,
        loss: CausalLoss,
        options: SearchOptions,
        meter: Meter,
        name: str,
        eta_init: float | None,
    ) -> None:
        self._model, self._loss, self._options, self._meter = model, loss, options, meter
        self._name = name
        self._eta_init = self._within_limits(options.eta_init if eta_init is None else eta_init)
        self._at_zero: tuple[str, float] | None = None  # hash and L0 of the last loss batch
        self._resolution: float | None = None

    def run(
        self,
        *,
        repeat: int,
        delta: Sequence[Tensor],
        slope: float,
        update_batch: Batch,
        loss_batch: Batch,
    ) -> Measurement:
        """Search eta_c along one direction, as a measurement of a checkpoint.

        Args:
            repeat: Its number, for the record.
            delta: Flat, aligned with the model's shards.
            slope: dL/d eta at 0 of the loss batch.
            update_batch: The batch that made delta.
            loss_batch: The batch the loss is taken on.

        Raises:
            NonFiniteLossError: L(0) is NaN or infinite.
        """
        searched = self.search(delta, slope, loss_batch)
        return Measurement(
            repeat=repeat,
            loss_batch=cast(LossBatch, self._name),
            update_batch_sha256=update_batch.sha256,
            loss_batch_sha256=loss_batch.sha256,
            **search_fields(searched),
        )

    def search(
        self,
        delta: Sequence[Tensor],
        slope: float,
        loss_batch: Batch,
        *,
        eta_init: float | None = None,
    ) -> Searched:
        """Search eta_c along one direction.

        Args:
            delta: Flat, aligned with the model's shards.
            slope: dL/d eta at 0 of the loss batch.
            loss_batch: The batch the loss is taken on.
            eta_init: First guess; None: the last eta_c this object found.

        Raises:
            NonFiniteLossError: L(0) is NaN or infinite.
        """
        if eta_init is not None:
            self._eta_init = self._within_limits(eta_init)
        clock, passes_before = time.perf_counter(), self._meter.num_forward_passes
        ray = Ray(
            [shard.live for shard in self._model.shards],
            [shard.base for shard in self._model.shards],
            delta,
            exact=True,
        )

        def loss_at(eta: float) -> float:
            ray.move(eta)
            self._model.push()
            mean = self._loss.mean(loss_batch)
            self._meter.count_forward_pass()
            return mean

        try:
            loss_at_zero = self._loss_at_zero(loss_at, loss_batch)
            num_at_zero = self._meter.num_forward_passes - passes_before
            resolution = self._resolve(loss_at, loss_at_zero, loss_batch)
            found = self._search(loss_at, slope, loss_at_zero, resolution)
        finally:
            ray.move(0.0)
            self._model.push()
        if found.eta_c is not None:
            self._eta_init = found.eta_c
        return Searched(
            found=found,
            num_forward_passes=found.num_forward_passes + num_at_zero,
            loss_resolution=resolution,
            duration_s=time.perf_counter() - clock,
        )

    def _within_limits(self, eta: float) -> float:
        return min(max(eta, self._options.eta_min), self._options.eta_max)

    def _loss_at_zero(self, loss_at: Callable[[float], float], batch: Batch) -> float:
        """L0 through the same write and forward as the trials; once for one and the same batch."""
        if self._at_zero is not None and self._at_zero[0] == batch.sha256:
            return self._at_zero[1]
        value = loss_at(0.0)
        check_finite(value, f"the {self._name}")
        self._at_zero = (batch.sha256, value)
        return value

    def _resolve(self, loss_at: Callable[[float], float], at_zero: float, batch: Batch) -> float:
        """The loss resolution, from one more pass at eta = 0, once per checkpoint."""
        if self._resolution is None:
            self._resolution = loss_resolution(
                at_zero,
                loss_at(0.0),
                dtype=self._model.dtype,
                num_targets=batch.num_targets,
            )
        return self._resolution

    def _search(
        self,
        loss_at: Callable[[float], float],
        slope: float,
        loss_at_zero: float,
        resolution: float,
    ) -> LineSearchResult:
        options = self._options
        eta_min = options.eta_min
        if slope < 0.0:
            # Nearer to 0 the loss moves by less than its rounding, and a rounding error upwards
            # would pass for a crossing: in bf16, from a guess of 1e-5, 1e5 times too sharp.
            eta_min = min(max(eta_min, resolution / -slope), options.eta_max)
        return find_critical_learning_rate(
            loss_at,
            eta_init=max(self._eta_init, eta_min),
            rel_tol=options.rel_tol,
            slope=slope,
            loss_at_zero=loss_at_zero,
            search=options.search,
            eta_min=eta_min,
            eta_max=options.eta_max,
            max_forward_passes=options.max_forward_passes,
        )
