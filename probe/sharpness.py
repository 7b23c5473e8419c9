"""Critical sharpness of a model in memory: the public call for a training loop.

What it needs stands in files of its own: the direction (`probe.directions`), the points on the
ray (`probe.perturb`, `probe.upcast`; sharded: `probe.parallel.live_ray`), undisturbed state
(`probe.guard`), one loss for all ranks (`probe.agreement`) and the search (`probe.line_search`).
Checkpoints are `probe.engine`'s matter.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from probe.agreement import Agreement, LossValue
from probe.directions import UpdateDirection, mapping_direction, optimizer_direction
from probe.directions.sharded import sharded_mapping_direction, sharded_optimizer_direction
from probe.errors import ConfigError, DirectionError
from probe.guard import StateGuard, finally_restored, undisturbed
from probe.line_search import (
    DEFAULT_ETA_INIT,
    LineSearchResult,
    Search,
    find_critical_learning_rate,
)
from probe.parallel.attach import attached
from probe.parallel.live import LiveRun
from probe.parallel.live_ray import live_ray
from probe.perturb import HALF_PRECISION, Ray
from probe.upcast import UPCAST_NOTE, Fp32Twins, fp32_twins

NO_GRAD_NOTE = (
    "loss_fn runs under torch.no_grad(): return the loss, without zero_grad() and backward()."
)
HalfPrecision: TypeAlias = Literal["upcast", "cast"]


def critical_sharpness(
    model: nn.Module,
    loss_fn: Callable[[], LossValue],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    direction: Mapping[str, Tensor] | None = None,
    eta_init: float | None = DEFAULT_ETA_INIT,
    rel_tol: float = 1 / 16,
    search: Search = "interpolate",
    loss_at_zero: LossValue | None = None,
    slope: float | Literal["auto"] | None = "auto",
    eta_min: float = 1e-12,
    eta_max: float = 1e6,
    max_forward_passes: int = 40,
    half_precision: HalfPrecision = "upcast",
) -> LineSearchResult:
    """Critical sharpness along the step the optimizer is about to take, by forward passes only.

        eta_c = min { eta > 0 : L(theta - eta delta) > L(theta) },    lambda_c = 2 / eta_c

    Source: arXiv:2601.16979. Call it after `loss.backward()` and before `optimizer.step()`:

        measured = critical_sharpness(model, loss_fn, optimizer=optimizer, eta_init=last.eta_c)

    Nothing is changed, not by a bit, also when `loss_fn` raises or Ctrl-C is pressed: parameters,
    buffers, train/eval mode, `.grad`, `requires_grad`, optimizer, random states (Python, NumPy,
    torch on the CPU and on the model's devices). Every trial starts from the same buffers, modes
    and random states, so dropout draws the same masks at every eta and the ray is one function.

    The loss is of the caller's making, and so are these conditions:

    - One fixed batch. To measure what the paper does, the batch whose gradient is in `.grad`. A
      gradient accumulated over many micro-batches needs the loss over all of them.
    - `.grad` as `optimizer.step()` would find it: unscaled (`GradScaler.unscale_`), clipped where
      the run clips. The clipped gradient makes the right direction, but the slope read from it
      is too small by the clipping factor: pass `slope=None`, or the slope over that factor.
    - `loss_fn` reads its weights through the model. It runs under `no_grad`; `.grad` is None
      meanwhile.
    - An optimizer with `maximize=True` climbs its objective. `loss_fn` is then that objective,
      slope >= 0, and the outcome `not_a_descent_direction`; give the negated one and its slope.

    Half-precision parameters. Near 0.02 bf16 numbers lie 1.2e-4 apart, so a step of 3e-5 written
    into bf16 weights is mostly rounding (`probe.upcast`). With "upcast", the default, a model
    with moving half-precision parameters runs at fp32 twins of its half-precision parameters and
    buffers, L(0) included: what is measured is the loss in fp32 arithmetic around the same point,
    free of rounding noise, near but not equal to the model's own half-precision loss. Inputs of
    its modules are cast along. With "cast" the forward stays in half precision and theta - eta
    delta, formed in fp32, is rounded last: right where eta |delta| is well above the spacing of
    the weights. Models kept in fp32 and run under autocast are not changed by this choice;
    autocast rounds the weights as "cast" does.

    Distributed: every rank calls, with the same arguments but its own batch. Losses are summed
    over ranks by count before anything branches on them. The ranks hold

    - replicas (DistributedDataParallel): its process group is used where model is one, else all
      ranks;
    - FSDP2 shards (`fully_shard`, HSDP too), also prepared by accelerate;
    - a DeepSpeed engine of ZeRO stage 1, 2 or 3: pass the engine, between `engine.backward` of a
      step's last micro-batch and `engine.step`. Its own clipping and loss scale are accounted
      for, and the slope is that of the loss before clipping.

    Sharded runs step from the optimizer's own (fp32) shards and run in the run's forward dtype,
    so theta - eta delta is rounded last, as their steps are; `half_precision` has no effect. Each
    rank must run the same forward passes in loss_fn, and no collective of its own in it: they
    gather weights together. A loss_fn that fails on one rank fails on all.

    Args:
        model: Holds every parameter of the optimizer; as loss_fn calls it.
        loss_fn: No argument; returns the mean loss as float or 0-d tensor, or (sum, count).
        optimizer: Stock SGD, Adam or AdamW: delta is what its next step subtracts over its lr.
            With several groups eta is the first group's lr and the others keep their ratio.
            May be left out with a DeepSpeed engine, which has its own.
        direction: Instead of optimizer: parameter fqn -> delta, for every trainable parameter.
            For sharded models whole tensors, of which each rank takes its part, or (FSDP2)
            DTensors placed like the parameters.
        eta_init: First eta tried; pass the last measurement's eta_c. None, what eta_c is where
            that measurement had no answer, means 1e-3.
        rel_tol: The bracket ends with 1 - eta_lower / eta_upper <= rel_tol; in (0, 1).
        search: "interpolate", or the paper's "bisect".
        loss_at_zero: L(theta) where it is known, in the form loss_fn returns, taken in the same
            mode with the same random state; saves a pass. Not with upcast parameters, whose
            loss at 0 is another number.
        slope: dL/d eta at 0. "auto": -delta.g from `.grad` with an optimizer, else not known.
            None: not known, found from trial losses. A number: taken as it is.
        eta_min: Give up below this eta; >= 1e-30.
        eta_max: Give up above this eta; <= 1e30.
        max_forward_passes: Limit on calls of loss_fn.
        half_precision: "upcast" or "cast", see above; without effect on fp32 and fp64 parameters.

    Returns:
        Outcome, bracket, eta_c, lambda_c, trials. `num_forward_passes` counts calls of loss_fn.

    Raises:
        ConfigError: Arguments that do not fit together, or loss_fn's value is no loss.
        DirectionError: No update direction can be formed; the message says why.
        NonFiniteLossError: L(theta) is NaN or infinite.
        ParallelismError: Sharded in a way that is not supported (FSDP1, tensor or pipeline
            parallelism, ZeRO offload, ...), another rank failed, or ranks ran other passes.

    Cost: 3 forward passes are common, from a guess within a factor of 2 and with the slope known.
    Memory 8 bytes per moving fp32 parameter (theta and delta); 8 per half-precision one, 4 of
    them for its twin. Sharded: that over the number of ranks. No backward pass, no graph.
    """
    if half_precision not in ("upcast", "cast"):
        raise ConfigError(f"half_precision is 'upcast' or 'cast'; found {half_precision!r}.")
    run = attached(model)
    if run is not None:
        agreement = Agreement(run.group)
        line = _sharded_line(run, model, agreement, optimizer, direction)
    else:
        agreement = Agreement(_process_group(model))
        line = _replica_line(model, agreement, optimizer, direction, half_precision)
    known_slope = _checked_slope(line.slope if slope == "auto" else slope)
    known_slope = agreement.same_direction(line.norm, known_slope)
    known_loss = None
    if loss_at_zero is not None:
        _refuse_mixed_precision(line.upcast)
        value = loss_at_zero
        known_loss = agreement.mean_loss(lambda: value)
    with line.points() as move, _hint(line.upcast):

        def loss_at(eta: float) -> float:
            move(eta)
            with torch.no_grad():
                return agreement.mean_loss(loss_fn)

        return find_critical_learning_rate(
            loss_at,
            eta_init=eta_init,
            rel_tol=rel_tol,
            slope=known_slope,
            loss_at_zero=known_loss,
            search=search,
            eta_min=eta_min,
            eta_max=eta_max,
            max_forward_passes=max_forward_passes,
        )


@dataclass(frozen=True, slots=True)
class _Line:
    """A direction, and how to walk along it."""

    slope: float | None
    norm: float
    upcast: bool
    points: Callable[[], AbstractContextManager[Callable[[float], None]]]


def _sharded_line(
    run: LiveRun,
    model: nn.Module,
    agreement: Agreement,
    optimizer: torch.optim.Optimizer | None,
    direction: Mapping[str, Tensor] | None,
) -> _Line:
    if direction is None:
        update = sharded_optimizer_direction(run, optimizer, agreement)
    else:
        _refuse_both(optimizer)
        update = sharded_mapping_direction(run, model, direction, agreement)
    return _Line(
        slope=update.slope,
        norm=update.norm,
        upcast=False,
        points=lambda: live_ray(run, update.shards, update.delta, agreement),
    )


def _replica_line(
    model: nn.Module,
    agreement: Agreement,
    optimizer: torch.optim.Optimizer | None,
    direction: Mapping[str, Tensor] | None,
    half_precision: HalfPrecision,
) -> _Line:
    update = agreement.together(lambda: _update_direction(model, optimizer, direction))
    upcast = _needs_upcast(update, half_precision)

    @contextmanager
    def points() -> Iterator[Callable[[float], None]]:
        with undisturbed(model) as guard, _ray(model, update, guard, upcast=upcast) as move:
            yield move

    return _Line(slope=update.slope, norm=update.norm, upcast=upcast, points=points)


def _update_direction(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    direction: Mapping[str, Tensor] | None,
) -> UpdateDirection:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise DirectionError(f"parameter {name!r} is on the meta device: load its weights.")
    if direction is not None:
        _refuse_both(optimizer)
        return mapping_direction(model, direction)
    if optimizer is None:
        raise ConfigError("pass exactly one of optimizer= and direction=; found neither.")
    return optimizer_direction(model, optimizer)


def _refuse_both(optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is not None:
        raise ConfigError("pass exactly one of optimizer= and direction=; found both.")


@contextmanager
def _ray(
    model: nn.Module, update: UpdateDirection, guard: StateGuard, *, upcast: bool
) -> Iterator[Callable[[float], None]]:
    """A function that puts the whole model at theta - eta * delta; undone at the end."""
    if not upcast:
        ray = Ray.through([p.data for p in update.parameters], update.delta)
        with finally_restored(ray.restore):

            def move(eta: float) -> None:
                guard.rewind()
                ray.move(eta)

            yield move
        return
    with fp32_twins(model) as twins:
        ray = _twin_ray(update, twins)
        with finally_restored(ray.restore):

            def move_twins(eta: float) -> None:
                guard.rewind()
                twins.refresh_buffers()
                ray.move(eta)

            yield move_twins


def _twin_ray(update: UpdateDirection, twins: Fp32Twins) -> Ray:
    """Half-precision parameters are their own base; fp32 ones, written in place, get a copy."""
    live = [twins.live(p) for p in update.parameters]
    base = [p.data if p.dtype in HALF_PRECISION else p.data.clone() for p in update.parameters]
    return Ray(live, base, update.delta, exact=True)


@contextmanager
def _hint(upcast: bool) -> Iterator[None]:
    """Say beside an error of loss_fn under which conditions it ran, where they may be the cause."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        if "does not require grad" in str(error):
            error.add_note(NO_GRAD_NOTE)
        if upcast:
            error.add_note(UPCAST_NOTE)
        raise


def _needs_upcast(update: UpdateDirection, half_precision: HalfPrecision) -> bool:
    moves_half = any(p.dtype in HALF_PRECISION for p in update.parameters)
    return moves_half and half_precision == "upcast"


def _refuse_mixed_precision(upcast: bool) -> None:
    if upcast:
        raise ConfigError(
            "loss_at_zero was taken at half-precision weights, but the trials are taken at fp32 "
            "twins of them; the difference would be read as a rise or a fall. Leave loss_at_zero "
            "out, or pass half_precision='cast'."
        )


def _checked_slope(slope: float | None) -> float | None:
    if slope is None:
        return None
    if isinstance(slope, str) or not math.isfinite(slope):
        raise ConfigError(f"slope is a finite number, None or 'auto'; found {slope!r}.")
    return float(slope)


def _process_group(model: nn.Module) -> "torch.distributed.ProcessGroup | None":
    if isinstance(model, nn.parallel.DistributedDataParallel):
        group: torch.distributed.ProcessGroup = model.process_group
        return group
    return None
