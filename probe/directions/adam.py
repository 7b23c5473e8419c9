"""The step Adam or AdamW would take next, without taking it.

Pure functions of one tensor. Whether the moments come from a live optimizer, a checkpoint or
a warm-up with parameters fixed is the caller's matter.
"""

import torch
from torch import Tensor

from probe.directions.blocks import in_blocks
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

    Cost: memory only the result, where all tensors are contiguous; no forward pass.
    """
    if step_after < 1:
        raise ValueError(f"step_after counts the step itself, so it is >= 1; found {step_after}.")
    bias_corrections = 1 - betas[0] ** step_after, 1 - betas[1] ** step_after
    delta = torch.empty_like(param, dtype=compute_dtype(param.dtype))
    operands = (delta, param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq if amsgrad else None)
    for out, theta, g, m, v, v_max in in_blocks(*operands):
        g = g.to(out.dtype)
        g = g.neg() if maximize else g
        if weight_decay != 0 and not decoupled:
            g = g.add(theta.to(out.dtype), alpha=weight_decay)
        root = _moments_after(g, m, v, betas, out)
        if v_max is not None:
            torch.maximum(root, v_max.to(out.dtype), out=root)
        root.sqrt_().div_(bias_corrections[1] ** 0.5).add_(eps)
        out.div_(bias_corrections[0]).div_(root)
        if weight_decay != 0 and decoupled:
            out.add_(theta.to(out.dtype), alpha=weight_decay)
    return delta


def _moments_after(
    g: Tensor, m: Tensor | None, v: Tensor | None, betas: tuple[float, float], m_out: Tensor
) -> Tensor:
    """Write the first moment after the step into `m_out`; return a fresh second one."""
    b1, b2 = betas
    if m is None:
        torch.mul(g, 1 - b1, out=m_out)
    else:
        torch.lerp(m.to(g.dtype), g, 1 - b1, out=m_out)
    v_after = torch.zeros_like(g) if v is None else v.to(g.dtype) * b2
    return v_after.addcmul_(g, g, value=1 - b2)
