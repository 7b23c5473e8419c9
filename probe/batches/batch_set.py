"""The update batches and the held-out batch of a job, by index, the same on every run.

Order of things: the held-out sequences are taken first, from the front of each source's
shuffled documents; update batches use only documents after those. So the held-out batch does
not depend on how many update batches are drawn, and no document is in both.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import islice
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from probe.batches.batch import Batch, make_batch
from probe.batches.documents import Tally, read_documents
from probe.batches.packing import Encoded, Sequence, encode, one_each, pack
from probe.errors import BatchError
from probe.spec import Batches, FileData, HubData, TextFormat


class Cut(Protocol):
    """How documents are ordered and cut: what `Batches` says of it, and other specs may."""

    @property
    def seed(self) -> int:
        """Order of documents."""

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""


class BatchSet:
    """Fixed batches from one or several sources, mixed by share.

    Every batch has the same number of sequences of each source (largest remainder of the
    shares), spread evenly over the batch. Update batch i follows batch i - 1 in each source
    and never overlaps it. Data are never repeated: a source that runs out is an error.

    Tokens once drawn are kept, 4 bytes each, so that every checkpoint of a series sees the
    same batches without reading again.
    """

    def __init__(self, batches_spec: Batches, tokenizer: PreTrainedTokenizerBase) -> None:
        """Open the sources and draw the held-out batch.

        Args:
            batches_spec: What to read, and how to cut it.
            tokenizer: The checkpoint's.

        Raises:
            BatchError: Data are missing, malformed or too few, or a share is too small for a
                single sequence of a batch.

        Cost: reads up to the size of the shuffle buffer of each source.
        """
        self._spec = batches_spec
        self._pad = padding_token(tokenizer)
        self._counts = sequences_per_source(batches_spec, batches_spec.batch_sequences, "batch")
        num_held_out = batches_spec.held_out_sequences or 0
        held_out_counts = (
            sequences_per_source(batches_spec, num_held_out, "held_out")
            if num_held_out
            else [0] * len(batches_spec.sources)
        )
        held_out_digests: set[bytes] = set()  # of all sources: they may share documents
        self._sources = [
            SourceSequences(source, batches_spec, tokenizer, count, held_out_digests)
            for source, count in zip(batches_spec.sources, held_out_counts, strict=True)
        ]
        self._held_out = (
            self._assemble([source.held_out for source in self._sources]) if num_held_out else None
        )

    @property
    def held_out(self) -> Batch | None:
        """The fixed held-out batch; None where the spec asks for none."""
        return self._held_out

    @property
    def tallies(self) -> dict[str, Tally]:
        """What became of the rows read so far, per source."""
        return {source.name: source.tally for source in self._sources}

    def update(self, i: int) -> Batch:
        """The i-th update batch, counted from 0.

        Returns:
            (batch_sequences, sequence_length) tokens; the same for the same spec, tokenizer
            and i, in whatever order batches are asked for.

        Raises:
            BatchError: A source has too few documents left; says how many it has.

        Cost: tokenises what was not drawn before.
        """
        if i < 0:
            raise IndexError(f"update batches are counted from 0, got {i}")
        return self._assemble(
            [
                source.update(i * count, (i + 1) * count)
                for source, count in zip(self._sources, self._counts, strict=True)
            ]
        )

    def _assemble(self, per_source: list[list[Sequence]]) -> Batch:
        names = [source.name for source in self._sources]
        return interleave(per_source, names, self._spec.sequence_length, self._pad)


def interleave(
    per_source: list[list[Sequence]], names: list[str], sequence_length: int, pad: int
) -> Batch:
    """One batch of all sequences, each source's spread evenly over it.

    Args:
        per_source: Sequences of each source.
        names: One per source.
        sequence_length: Columns of the batch, tokens.
        pad: Token that fills up short sequences, on the right.
    """
    order = sorted(  # ties go to the source named first
        (Fraction(2 * k + 1, 2 * len(sequences)), s, k)
        for s, sequences in enumerate(per_source)
        for k in range(len(sequences))
    )
    shape = (len(order), sequence_length)
    input_ids = torch.full(shape, pad, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    source_names = []
    for row, (_, s, k) in enumerate(order):
        sequence = per_source[s][k]
        input_ids[row, : len(sequence.tokens)] = torch.from_numpy(sequence.tokens.astype("int64"))
        loss_mask[row, sequence.first_target : sequence.end] = True
        source_names.append(names[s])
    return make_batch(input_ids, loss_mask, source_names)


class SourceSequences:
    """The sequences of one source: held-out ones first, then update ones as needed.

    Args:
        source: What to read.
        spec: Its `seed` and `sequence_length`.
        tokenizer: The checkpoint's.
        num_held_out: Sequences taken first.
        held_out_digests: Of every held-out document of the batches that must not overlap; added
            to here, and left out of update sequences.

    Raises:
        BatchError: Data are missing, malformed or too few.
    """

    def __init__(
        self,
        source: FileData | HubData,
        spec: Cut,
        tokenizer: PreTrainedTokenizerBase,
        num_held_out: int,
        held_out_digests: set[bytes],
    ) -> None:
        self.name = source.name
        self.tally = Tally()
        self._spec = spec
        self._tokenizer = tokenizer
        self._is_text = isinstance(source.format, TextFormat)
        encoded = encode(read_documents(source, spec.seed, self.tally), tokenizer)
        self.held_out = list(islice(self._cut(_recorded(encoded, held_out_digests)), num_held_out))
        self._require(len(self.held_out), num_held_out, "held-out")
        self._updates: list[Sequence] = []
        self._rest = self._cut(_without(encoded, held_out_digests))

    def update(self, lo: int, hi: int) -> list[Sequence]:
        """Update sequences lo..hi of this source.

        Raises:
            BatchError: It has too few.
        """
        self._updates.extend(islice(self._rest, max(0, hi - len(self._updates))))
        self._require(len(self._updates), hi, "update")
        return self._updates[lo:hi]

    def _cut(self, encoded: Iterable[Encoded]) -> Iterator[Sequence]:
        length = self._spec.sequence_length
        if self._is_text:
            return pack(encoded, self._tokenizer, length, self.tally)
        return one_each(encoded, length, self.tally)

    def _require(self, found: int, needed: int, what: str) -> None:
        if found < needed:
            length = self._spec.sequence_length
            raise BatchError(
                f"source {self.name!r} has too few documents: {found} {what} sequences of "
                f"{length} tokens where {needed} are needed; {self.tally}. Data are never "
                "repeated: add files, or lower batch_sequences, held_out_sequences, repeats, "
                "warmup_steps or sequence_length"
            )


def sequences_per_source(spec: Batches, num_sequences: int, what: str) -> list[int]:
    """How many sequences of a batch each source gives: shares, by largest remainder.

    Raises:
        BatchError: A source would give none.
    """
    shares = [Fraction(source.share) for source in spec.sources]
    exact = [num_sequences * share / sum(shares) for share in shares]
    counts = [int(amount) for amount in exact]
    by_remainder = sorted(range(len(exact)), key=lambda s: (counts[s] - exact[s], s))
    for s in by_remainder[: num_sequences - sum(counts)]:
        counts[s] += 1
    if 0 in counts:
        source = spec.sources[counts.index(0)]
        raise BatchError(
            f"source {source.name!r} with share {source.share} gives none of the {num_sequences} "
            f"sequences; raise {what}_sequences or its share"
        )
    return counts


def _recorded(encoded: Iterator[Encoded], digests: set[bytes]) -> Iterator[Encoded]:
    for document in encoded:
        digests.add(document.digest)
        yield document


def _without(encoded: Iterator[Encoded], digests: set[bytes]) -> Iterator[Encoded]:
    return (document for document in encoded if document.digest not in digests)


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token the model knows: padding is never a target and never seen by one."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
