"""An update direction the caller brings: parameter fqn -> tensor."""

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from probe.directions.update import UpdateDirection
from probe.errors import DirectionError
from probe.perturb import compute_dtype


def mapping_direction(model: nn.Module, direction: Mapping[str, Tensor]) -> UpdateDirection:
    """The caller's tensors as an update direction of this model.

    Every trainable parameter must be named: one left out would silently stand still (give zeros
    to hold it on purpose). Frozen parameters may be named and then move too. A tied parameter
    goes by any of its names, or by several with equal tensors.

    Args:
        model: Names are those of its `named_parameters`.
        direction: fqn -> delta, each with its parameter's shape, any float dtype and device.

    Raises:
        DirectionError: Names missing or unknown, a shape that differs, values not finite,
            or zero everywhere.

    Cost: no copy where dtype and device are the parameter's (fp32 for half precision).
    """
    names = dict(model.named_parameters())
    given = named_tensors(model, direction, {name: p.shape for name, p in names.items()})
    delta = [
        tensor.detach().to(names[name].device, compute_dtype(names[name].dtype))
        for name, tensor in given.items()
    ]
    return UpdateDirection(list(given), [names[name] for name in given], delta, slope=None)


def named_tensors(
    model: nn.Module, direction: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """The caller's tensors by canonical name, after every check that needs no values.

    Args:
        model: Names are those of its `named_parameters`.
        direction: fqn -> tensor.
        shapes: Canonical fqn -> shape of every parameter that can be moved.

    Raises:
        DirectionError: Names missing or unknown, a shape that differs, not dense floats.
    """
    names = dict(model.named_parameters())
    canonical = {id(parameter): name for name, parameter in names.items()}
    aliases = {
        alias: canonical[id(parameter)]
        for alias, parameter in model.named_parameters(remove_duplicate=False)
    }
    given = _by_canonical_name(direction, aliases)
    missing = [name for name, p in names.items() if p.requires_grad and name not in given]
    if missing:
        raise DirectionError(
            f"the direction names {len(given)} of {len(names)} parameters; missing: "
            f"{_listed(missing)}. Give zeros for a trainable parameter that shall not move."
        )
    fixed = [name for name in given if name not in shapes]
    if fixed:
        raise DirectionError(
            f"{_listed(fixed)} cannot be moved: it is frozen, and this run shards only what it "
            "trains. Leave it out of the direction."
        )
    for name, tensor in given.items():
        _check_like(name, shapes[name], tensor)
    return given


def _by_canonical_name(
    direction: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> dict[str, Tensor]:
    unknown = [name for name in direction if name not in aliases]
    if unknown:
        close = difflib.get_close_matches(unknown[0], aliases, n=1, cutoff=0.0)
        nearest = f" The nearest name to {unknown[0]!r} is {close[0]!r}." if close else ""
        raise DirectionError(f"the model has no parameter {_listed(unknown)}.{nearest}")
    given: dict[str, Tensor] = {}
    for name, tensor in direction.items():
        first = given.setdefault(aliases[name], tensor)
        if first is not tensor and not torch.equal(first, tensor):
            raise DirectionError(
                f"{name!r} and {aliases[name]!r} are one tied parameter, but the direction gives "
                "them different tensors. Give one of them."
            )
    return given


def _check_like(name: str, shape: torch.Size, tensor: Tensor) -> None:
    if tensor.shape != shape:
        raise DirectionError(
            f"the direction of {name!r} has shape {tuple(tensor.shape)}; the parameter has "
            f"{tuple(shape)}."
        )
    if tensor.layout is not torch.strided or not tensor.is_floating_point():
        raise DirectionError(
            f"the direction of {name!r} is {tensor.layout} {tensor.dtype}; give a dense float one."
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
