"""Shares of the sources in a mixture: at a ratio, and in whole sequences (torch-free)."""

from collections.abc import Sequence
from fractions import Fraction

from probe.errors import BatchError
from probe.spec_mix import MixtureSources


def shares_at(ratio: float, proportions: Sequence[float], varied: int) -> list[float]:
    """Share of every source: `ratio` for the varied one, the rest in proportion for the others.

    Args:
        ratio: In [0, 1].
        proportions: Weight of each source, > 0; that of the varied one is without meaning.
        varied: Index of the varied source.
    """
    others = sum(p for index, p in enumerate(proportions) if index != varied)
    return [
        ratio if index == varied else (1 - ratio) * p / others
        for index, p in enumerate(proportions)
    ]


def source_shares(mixture: MixtureSources, ratio: float) -> list[float]:
    """`shares_at` with the proportions that the sources state."""
    return shares_at(ratio, [source.share for source in mixture.sources], mixture.varied_index)


def rounded_counts(shares: Sequence[float], num_sequences: int) -> list[int]:
    """Whole sequences of each source, by largest remainder; of equal remainders the first wins.

    Args:
        shares: One per source, >= 0, summing to 1.
        num_sequences: How many in all, >= 1.
    """
    exact = [Fraction(share) * num_sequences for share in shares]
    counts = [int(amount) for amount in exact]
    by_remainder = sorted(range(len(exact)), key=lambda s: (counts[s] - exact[s], s))
    for s in by_remainder[: num_sequences - sum(counts)]:
        counts[s] += 1
    return counts


def lost_sources(shares: Sequence[float], num_sequences: int) -> list[int]:
    """Indices of the sources whose share is above 0 and rounds to no sequence."""
    counts = rounded_counts(shares, num_sequences)
    return [s for s, share in enumerate(shares) if share > 0 and counts[s] == 0]


def mixed_counts(shares: Sequence[float], num_sequences: int) -> list[int]:
    """As `rounded_counts`, where that is a mixture of the same sources.

    Raises:
        BatchError: A source with a share above 0 would give none.
    """
    lost = lost_sources(shares, num_sequences)
    if lost:
        raise BatchError(
            f"a share of {shares[lost[0]]:g} of {num_sequences} sequences is none: raise "
            "batches.batch_sequences, choose ratios further apart, or use gradients: shared"
        )
    return rounded_counts(shares, num_sequences)
