"""Sorted rows against torch's stable sort, bit for bit."""

import pytest
import torch

from probe.continual.row_sort import sorted_rows

TINY = 1e-45  # the least denormal of float32


@pytest.mark.parametrize(
    "rows",
    [
        torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)),
        torch.randint(-3, 4, (4, 500), generator=torch.Generator().manual_seed(1)).float(),  # ties
        torch.tensor([[1.0, -1.0, torch.inf, -torch.inf, TINY, -TINY, 0.0, 3e38, -3e38]]),
        torch.zeros(2, 5),
        torch.zeros(1, 1),
        torch.zeros(0, 7),
    ],
    ids=["normal", "ties", "extremes", "equal", "one", "none"],
)
def test_rows_are_sorted_as_torch_sorts_them(rows: torch.Tensor) -> None:
    values, columns = sorted_rows(rows)
    expected, places = rows.sort(dim=1, stable=True)
    assert torch.equal(values, expected)
    assert torch.equal(columns, places)


def test_a_slice_of_wider_rows_is_sorted_and_left_alone() -> None:
    """As the regulariser takes one tensor's columns from the flat parameters."""
    whole = torch.randn(2, 30, generator=torch.Generator().manual_seed(2))
    before = whole.clone()
    values, columns = sorted_rows(whole[:, 7:19])
    assert torch.equal(values, before[:, 7:19].sort(dim=1).values)
    assert torch.equal(before[:, 7:19].gather(1, columns), values)
    assert torch.equal(whole, before)


def test_a_row_that_is_not_finite_does_not_disturb_the_others() -> None:
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    rows[1, 4] = torch.nan
    values, columns = sorted_rows(rows)
    assert torch.equal(values[::2], rows[::2].sort(dim=1).values)
    assert sorted(columns[1].tolist()) == list(range(50))
