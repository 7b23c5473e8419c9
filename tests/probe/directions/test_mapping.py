"""Directions the caller brings, by parameter name."""

import pytest
import torch
from torch import nn

from probe.directions import mapping_direction
from probe.errors import DirectionError


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))


def _direction(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(p) for name, p in model.named_parameters()}


def test_names_become_parameters() -> None:
    model = _model()
    given = _direction(model)
    update = mapping_direction(model, given)
    assert dict(zip(update.names, update.delta, strict=True)).keys() == given.keys()
    assert update.slope is None
    assert update.norm == pytest.approx(12**0.5)


def test_cast_to_the_dtype_a_step_is_formed_in() -> None:
    model = _model()
    model[0].to(torch.bfloat16)
    model[1].to(torch.float64)
    update = mapping_direction(model, {n: t.half() for n, t in _direction(model).items()})
    assert [d.dtype for d in update.delta] == [torch.float32, torch.float32, torch.float64]


def test_every_trainable_parameter_must_be_named() -> None:
    model = _model()
    given = _direction(model)
    del given["0.bias"]
    with pytest.raises(DirectionError, match=r"missing: '0\.bias'"):
        mapping_direction(model, given)
    model[0].bias.requires_grad_(False)
    assert "0.bias" not in mapping_direction(model, given).names


def test_a_named_frozen_parameter_moves() -> None:
    model = _model().requires_grad_(False)
    assert mapping_direction(model, {"0.bias": torch.ones(2)}).names == ["0.bias"]


def test_unknown_names_shapes_and_values_are_refused() -> None:
    model = _model()
    good = _direction(model)
    with pytest.raises(DirectionError, match=r"no parameter '0\.weigth'.*nearest.*'0\.weight'"):
        mapping_direction(model, {**good, "0.weigth": torch.ones(2, 3)})
    with pytest.raises(DirectionError, match=r"'0\.weight' has shape \(3, 2\)"):
        mapping_direction(model, {**good, "0.weight": torch.ones(3, 2)})
    with pytest.raises(DirectionError, match=r"'1\.weight' has 1 of 4 elements"):
        mapping_direction(model, {**good, "1.weight": torch.tensor([[1, 2], [3, float("inf")]])})
    with pytest.raises(DirectionError, match=r"torch\.int64"):
        mapping_direction(model, {**good, "0.bias": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(DirectionError, match="zero in all 3"):
        mapping_direction(model, {n: torch.zeros_like(t) for n, t in good.items()})
    with pytest.raises(DirectionError, match="names 0 of 3"):
        mapping_direction(model, {})


def test_a_tied_parameter_goes_by_any_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    for names in (["0.weight"], ["1.weight"], ["0.weight", "1.weight"]):
        update = mapping_direction(model, {name: torch.ones(2, 2) for name in names})
        assert update.names == ["0.weight"]
    with pytest.raises(DirectionError, match="one tied parameter"):
        mapping_direction(model, {"0.weight": torch.ones(2, 2), "1.weight": torch.zeros(2, 2)})
