"""Block-wise walks give what whole tensors give."""

import pytest
import torch

from probe.directions import adamw_direction, blocks


def _tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(9, 11, generator=generator, dtype=torch.float64) for _ in range(5)]


def _direction(tensors: list[torch.Tensor]) -> torch.Tensor:
    theta, g, m, v, v_max = tensors
    return adamw_direction(
        theta, g, m, v, step_after=3, weight_decay=0.1, max_exp_avg_sq=v_max, amsgrad=True
    )


@pytest.mark.parametrize("block", [1, 7, 98, 99, 1000])
@pytest.mark.parametrize("transposed", [False, True])
def test_any_block_size_gives_the_formula(
    block: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CPU_BLOCK", block)
    tensors = _tensors()
    theta, g, m, v, v_max = tensors
    if transposed:  # a gradient laid out unlike its parameter
        tensors[1] = g.T.contiguous().T
    m_hat = (0.9 * m + 0.1 * g) / (1 - 0.9**3)
    v_hat = torch.maximum(0.999 * v + 0.001 * g**2, v_max) / (1 - 0.999**3)
    expected = m_hat / (v_hat.sqrt() + 1e-8) + 0.1 * theta
    assert torch.allclose(_direction(tensors), expected, rtol=1e-13, atol=0)
    assert blocks.inner_product(tensors[1], m) == pytest.approx(float((g * m).sum()), rel=1e-13)


def test_inner_products_are_summed_in_fp64() -> None:
    """1e6 products of 0.1 in fp32: an fp32 running sum is off by far more than 1e-9."""
    tenth = torch.full((1_000_000,), 0.1)
    exact = 1e6 * float(tenth[0]) ** 2
    assert blocks.inner_product(tenth, tenth) == pytest.approx(exact, rel=1e-12)
    half = torch.full((1_000,), 300.0, dtype=torch.float16)  # 300 * 300 overflows fp16
    assert blocks.inner_product(half, half) == 9e7
