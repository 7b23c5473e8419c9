"""The update direction of a live optimizer, read between backward() and step()."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from probe.directions.adam import adamw_direction
from probe.directions.blocks import inner_product
from probe.directions.sgd import sgd_direction
from probe.directions.update import UpdateDirection
from probe.errors import DirectionError

Reader: TypeAlias = Callable[[Tensor, Tensor, Mapping[str, Any], Mapping[str, Any]], Tensor]


def optimizer_direction(model: nn.Module, optimizer: torch.optim.Optimizer) -> UpdateDirection:
    """What `optimizer.step()` would subtract now, divided by the first group's lr.

    With several groups eta stands for the first group's lr and the others keep their ratio to
    it. Parameters without a gradient do not move, as in `step()`, not even by decay. State and
    gradients are read; nothing is written, no state entry is created. The slope is -delta.g with
    g = `p.grad`: the derivative of the loss whose gradient that is, as long as it was not
    clipped or scaled since.

    Raises:
        DirectionError: An optimizer that is not a stock SGD, Adam or AdamW; parameters that are
            not the model's; no gradient at all, a sparse or a complex one; several groups and
            lr 0 in the first.

    Cost: memory one fp32 (fp64) tensor per parameter; no forward pass.
    """
    optimizer = unwrapped(optimizer)
    reader = reader_of(optimizer)
    fqn = {id(p): name for name, p in model.named_parameters()}
    names: list[str] = []
    parameters: list[nn.Parameter] = []
    delta: list[Tensor] = []
    slope = 0.0
    for scale, group in zip(rate_ratios(optimizer), optimizer.param_groups, strict=True):
        for parameter in group["params"]:
            if id(parameter) not in fqn:
                raise DirectionError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is "
                    "not in the model. Pass the module that holds all it trains, and the "
                    "optimizer made from that module's present parameters."
                )
            if parameter.grad is None:
                continue
            name = fqn[id(parameter)]
            grad = dense_gradient(name, parameter.grad)
            # .get: indexing optimizer.state would create the entry
            step = reader(parameter, grad, group, optimizer.state.get(parameter, {}))
            if scale != 1.0:
                step.mul_(scale)
            slope -= inner_product(step, grad)
            names.append(name)
            parameters.append(parameter)
            delta.append(step)
    if not names:
        raise DirectionError(
            "no parameter of the optimizer has a gradient. Call this after loss.backward() and "
            "before optimizer.step() and zero_grad()."
        )
    return UpdateDirection(names, parameters, delta, slope)


def next_step(
    reader: Reader,
    theta: Tensor,
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    scale: float,
) -> Callable[[Tensor], Tensor]:
    """The step of one tensor as a function of its gradient: what is subtracted, over the lr.

    Args:
        reader: Of the optimizer's class.
        theta: The parameter, or a part of it.
        group: Hyperparameters of its parameter group.
        state: Moments of the same shape; empty before the first step.
        scale: The group's lr over the first group's.
    """

    def direction(grad: Tensor) -> Tensor:
        delta = reader(theta.detach(), grad, group, state)
        return delta if scale == 1.0 else delta.mul_(scale)

    return direction


def _read_adam(
    parameter: Tensor, grad: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Tensor:
    return adamw_direction(
        parameter.detach(),
        grad,
        state.get("exp_avg"),
        state.get("exp_avg_sq"),
        step_after=float(state.get("step", 0)) + 1,
        betas=(float(group["betas"][0]), float(group["betas"][1])),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        decoupled=bool(group["decoupled_weight_decay"]),
        max_exp_avg_sq=state.get("max_exp_avg_sq"),
        amsgrad=bool(group["amsgrad"]),
        maximize=bool(group["maximize"]),
    )


def _read_sgd(
    parameter: Tensor, grad: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Tensor:
    return sgd_direction(
        parameter.detach(),
        grad,
        state.get("momentum_buffer"),
        momentum=float(group["momentum"]),
        dampening=float(group["dampening"]),
        nesterov=bool(group["nesterov"]),
        weight_decay=float(group["weight_decay"]),
        maximize=bool(group["maximize"]),
    )


# A new optimizer: one file with its formula, one line here.
READERS: Mapping[type[torch.optim.Optimizer], Reader] = {
    torch.optim.SGD: _read_sgd,
    torch.optim.Adam: _read_adam,
    torch.optim.AdamW: _read_adam,
}


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper, which delegates to it; torch's or DeepSpeed's."""
    is_wrapper = type(optimizer).__module__.partition(".")[0] == "accelerate"
    inner = getattr(optimizer, "optimizer", None)
    return inner if is_wrapper and inner is not None else optimizer


def reader_of(optimizer: torch.optim.Optimizer) -> Reader:
    """By exact class: a subclass may step differently."""
    reader = READERS.get(type(optimizer))
    if reader is None:
        known = ", ".join(f"torch.optim.{cls.__name__}" for cls in READERS)
        kind = type(optimizer)
        raise DirectionError(
            f"no update direction is known for {kind.__module__}.{kind.__qualname__}; supported: "
            f"{known}. For another optimizer pass direction= with what its step subtracts, "
            "divided by its learning rate."
        )
    return reader


def rate_ratios(optimizer: torch.optim.Optimizer) -> list[float]:
    """Each group's lr over the first group's; one group needs no ratio, whatever its lr."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    if len(rates) == 1:
        return [1.0]
    if rates[0] == 0.0:
        raise DirectionError(
            f"the first of {len(rates)} parameter groups has lr 0 (all: {rates}), so the groups' "
            "ratios to it do not exist. Measure where its lr is above 0, after the schedule's "
            "first step, or order the groups otherwise."
        )
    return [rate / rates[0] for rate in rates]


def dense_gradient(name: str, grad: Tensor) -> Tensor:
    if grad.layout is not torch.strided or grad.is_complex():
        kind = "complex" if grad.is_complex() else str(grad.layout).removeprefix("torch.")
        raise DirectionError(
            f"the gradient of {name!r} is {kind}; only dense real ones are supported. "
            "Build embeddings with sparse=False, or pass direction=."
        )
    return grad.detach()
