"""The step SGD would take next, without taking it."""

import torch
from torch import Tensor

from probe.perturb import compute_dtype


@torch.no_grad()
def sgd_direction(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Tensor:
    """The update direction of one tensor: what the step subtracts, divided by its lr.

        g <- g + weight_decay theta       (coupled decay)
        b = momentum b + (1 - dampening) g, or b = g before the first step
        delta = g + momentum b with nesterov, else b; g itself without momentum

    Source: `torch.optim.SGD`, single tensor.

    Args:
        param: theta, any shape.
        grad: dL/d theta, same shape, dense.
        momentum_buffer: b before the step, same shape; None before the first step.
        momentum: >= 0.
        dampening: Of the gradient entering b.
        nesterov: Look ahead along b.
        weight_decay: Of this parameter's group, >= 0.
        maximize: The optimizer climbs: g is negated before the decay is added.

    Returns:
        delta, in fp32 for half-precision parameters and the parameter's dtype otherwise;
        always a tensor of its own. No argument is written.

    Cost: at most two temporaries of the tensor's size.
    """
    dtype = compute_dtype(param.dtype)
    g = grad.detach().to(dtype, copy=True)
    if maximize:
        g.neg_()
    if weight_decay != 0:
        g.add_(param.to(dtype), alpha=weight_decay)
    if momentum == 0:
        return g
    if momentum_buffer is None:
        return g.mul_(1 + momentum) if nesterov else g
    buffer = momentum_buffer.to(dtype) * momentum
    buffer.add_(g, alpha=1 - dampening)
    return g.add_(buffer, alpha=momentum) if nesterov else buffer
