"""Two ways to run a model's layers, for memory and for speed: recompute them, compile them.

Both replace what a layer's call runs inside its hooks, so that FSDP and DeepSpeed, whose hooks
gather and free the layer's weights, work as they do without.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from probe.errors import ConfigError


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's repeated layers: what transformers itself never splits over devices.

    Raises:
        ConfigError: The model does not say which they are.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    # By every class it descends from: fully_shard puts one of its own before the model's.
    found = [m for m in model.modules() if any(kind.__name__ in names for kind in type(m).__mro__)]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} names no layers (_no_split_modules), so they can be neither "
            "recomputed nor compiled. Set model.activation_checkpointing and model.compile false."
        )
    return found


def run_layers(model: nn.Module, *, activation_checkpointing: bool, compile: bool) -> None:
    """Change how every decoder layer runs from now on; the parameters and their names stay.

    Args:
        model: A transformers model, sharded or not. Changed in place.
        activation_checkpointing: Keep only each layer's input for the backward pass and run the
            layer again there. Same bits; one forward pass more per gradient.
        compile: `torch.compile` each layer; all share one graph with, and one without, autograd.
            Fused arithmetic rounds otherwise: on the scale of one rounding of the forward dtype
            per layer, the same way at every eta.

    Raises:
        ConfigError: The model does not say which its layers are.

    Cost: compilation happens in the first passes, about 10 to 60 seconds.
    """
    if not activation_checkpointing and not compile:
        return
    for layer in decoder_layers(model):
        forward = layer.forward
        if compile:
            forward = torch.compile(forward, dynamic=False)
        if activation_checkpointing:
            forward = partial(checkpoint, forward, use_reentrant=False)
        layer.__dict__["forward"] = forward
