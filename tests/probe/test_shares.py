"""Shares follow the ratio; how many sequences each source gives to a mixed batch."""

import pytest

from probe.errors import BatchError
from probe.shares import lost_sources, mixed_counts, rounded_counts, shares_at


def test_the_others_share_what_the_varied_source_leaves():
    assert shares_at(0.4, [5.0, 1.0, 2.0], 1) == pytest.approx([3 / 7, 0.4, 6 / 35])
    assert shares_at(0.0, [1.0, 3.0], 0) == [0.0, 1.0]
    assert shares_at(1.0, [1.0, 3.0, 4.0], 0) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("shares", "num_sequences", "counts"),
    [
        ([0.25, 0.75], 4, [1, 3]),
        ([0.0, 1.0], 5, [0, 5]),
        ([0.3, 0.7], 16, [5, 11]),  # 4.8 and 11.2: the larger remainder gets the last one
        ([0.5, 0.5], 3, [2, 1]),  # alike: the source named first
        ([0.2, 0.2, 0.6], 10, [2, 2, 6]),
    ],
)
def test_shares_by_largest_remainder(shares, num_sequences, counts):
    assert mixed_counts(shares, num_sequences) == counts
    assert lost_sources(shares, num_sequences) == []


def test_a_share_that_is_no_sequence_is_refused_with_what_to_do():
    assert rounded_counts([0.05, 0.95], 8) == [0, 8]  # 0.4 and 7.6
    assert lost_sources([0.05, 0.95], 8) == [0]
    with pytest.raises(BatchError) as caught:
        mixed_counts([0.05, 0.95], 8)
    assert str(caught.value) == (
        "a share of 0.05 of 8 sequences is none: raise batches.batch_sequences, choose ratios "
        "further apart, or use gradients: shared"
    )
