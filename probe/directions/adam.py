"""The step Adam or AdamW would take next, without taking it.

Pure functions of one tensor. Whether the moments come from a live optimizer, a checkpoint or
a warm-up with parameters fixed is the caller's matter.
"""

import torch
from torch import Tensor

from probe.perturb import compute_dtype


@torch.no_grad()
def adamw_direction(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    *,
    step_after: int | float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    max_exp_avg_sq: Tensor | None = None,
    amsgrad: bool = False,
    maximize: bool = False,
) -> Tensor:
    """The update direction of one tensor: what the step subtracts, divided by its lr.

        m = b1 m + (1 - b1) g            v = b2 v + (1 - b2) g^2
        delta = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay theta

    Moments are those BEFORE the step, g is the current gradient (clipped first where the run
    clips), t = `step_after`. With `decoupled=False` (Adam) the decay is added to g instead.
    Source: Loshchilov and Hutter 2019, algorithm 2; `torch.optim.AdamW`, single tensor.

    Args:
        param: theta, any shape.
        grad: dL/d theta, same shape, dense.
        exp_avg: First moment before the step, same shape; None before the first step (zeros).
        exp_avg_sq: Second moment before the step; None before the first step.
        step_after: Optimizer's step count after this step, >= 1 (1 for the first).
        betas: Decay rates of the moments, each in [0, 1).
        eps: Added to sqrt(vhat), >= 0.
        weight_decay: Of this parameter's group, >= 0.
        decoupled: AdamW's decay (True) or Adam's L2 term (False).
        max_exp_avg_sq: AMSGrad's running maximum of v before the step; None: none yet.
        amsgrad: Divide by the root of the maximum of v over all steps.
        maximize: The optimizer climbs: g is negated first.

    Returns:
        delta, in fp32 for half-precision parameters and the parameter's dtype otherwise.
        No argument is written.

    Raises:
        ValueError: step_after < 1, so that the bias correction would divide by zero.

    Cost: three temporaries of the tensor's size; no forward pass.
    """
    if step_after < 1:
        raise ValueError(f"step_after counts the step itself, so it is >= 1; found {step_after}.")
    dtype = compute_dtype(param.dtype)
    g = grad.to(dtype).neg() if maximize else grad.to(dtype)
    if weight_decay != 0 and not decoupled:
        g = g.add(param.to(dtype), alpha=weight_decay)
    m, v = _moments_after(g, exp_avg, exp_avg_sq, betas)
    if amsgrad and max_exp_avg_sq is not None:
        torch.maximum(v, max_exp_avg_sq.to(dtype), out=v)
    bias1 = 1 - betas[0] ** step_after
    bias2 = 1 - betas[1] ** step_after
    delta = m.div_(bias1).div_(v.sqrt_().div_(bias2**0.5).add_(eps))
    if weight_decay != 0 and decoupled:
        delta.add_(param.to(dtype), alpha=weight_decay)
    return delta


def _moments_after(
    g: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Fresh tensors holding both moments after the step."""
    b1, b2 = betas
    m = g * (1 - b1) if exp_avg is None else torch.lerp(exp_avg.to(g.dtype), g, 1 - b1)
    v = torch.zeros_like(g) if exp_avg_sq is None else exp_avg_sq.to(g.dtype) * b2
    return m, v.addcmul_(g, g, value=1 - b2)
