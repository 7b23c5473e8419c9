"""Batches of a mix scan or a training grid: per source and step, per task, or mixed at a ratio.

Task sequences are drawn first and their documents never enter an update, also where a task reads
the files a source reads. Step i of a source follows its step i - 1 and never overlaps it.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from probe.batches.batch import Batch
from probe.batches.batch_set import SourceSequences, interleave, padding_token
from probe.batches.packing import Sequence as Tokens
from probe.shares import mixed_counts
from probe.spec_mix import MixScanSpec
from probe.spec_train import MixTrainSpec


class MixtureBatches:
    """Every batch of one job on mixtures, by source, step, task and ratio, the same on every run.

    Args:
        spec: Sources, tasks, and how both are cut.
        tokenizer: The checkpoint's.

    Raises:
        BatchError: Data are missing, malformed or too few for the tasks.

    Cost: reads the tasks' documents; sources are read as steps are asked for.
    """

    def __init__(
        self, spec: MixScanSpec | MixTrainSpec, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._cut = spec.batches
        self._pad = padding_token(tokenizer)
        digests: set[bytes] = set()  # of all tasks' documents
        self._tasks: dict[str, Batch] = {}
        for task in spec.eval_tasks:
            drawn = SourceSequences(task.data, spec.batches, tokenizer, task.sequences, digests)
            self._tasks[task.data.name] = self._batch([drawn.held_out], [task.data.name])
        self._sources = [
            SourceSequences(source, spec.batches, tokenizer, 0, digests)
            for source in spec.mixture.sources
        ]

    def task(self, name: str) -> Batch:
        """The fixed batch of an evaluation task."""
        return self._tasks[name]

    def source_step(self, source: int, step: int) -> Batch:
        """What one source gives at one step: `batch_sequences` of it, whatever the ratio.

        Raises:
            BatchError: The source has too few documents left.
        """
        count = self._cut.batch_sequences
        sequences = self._sources[source].update(step * count, (step + 1) * count)
        return self._batch([sequences], [self._sources[source].name])

    def mixed_step(self, shares: Sequence[float], step: int) -> Batch:
        """One batch of `batch_sequences`, of which each source gives its share.

        Raises:
            BatchError: A share rounds to no sequence, or a source has too few documents left.
        """
        counts = mixed_counts(shares, self._cut.batch_sequences)
        drawn = [
            source.update(step * count, (step + 1) * count)
            for source, count in zip(self._sources, counts, strict=True)
        ]
        return self._batch(drawn, [source.name for source in self._sources])

    def _batch(self, drawn: list[list[Tokens]], names: list[str]) -> Batch:
        return interleave(drawn, names, self._cut.sequence_length, self._pad)
