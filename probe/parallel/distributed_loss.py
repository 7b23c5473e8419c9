"""The mean loss of a batch whose micro-batches are dealt out to the ranks.

Micro-batch i goes to rank i mod W. All have one shape whatever W is, per-sequence sums are
gathered and put back into the batch's order, and divided once, so the loss is the same float for
any number of ranks. Where the micro-batches do not come out even, ranks without one run the first
again with no target in it: a rank that skipped a pass would leave the others waiting.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from probe.errors import BatchError
from probe.loss import CausalLoss, TargetScore, TokenBatch, micro_batch, num_micro_batches
from probe.parallel import ShardedModel
from probe.parallel.collectives import gather_floats


class DistributedLoss(CausalLoss):
    """`CausalLoss` of a sharded model: the same numbers, each rank doing its part.

    Every method is a collective: all ranks call it with the same batch.

    Args:
        model: The sharded model.
        micro_batch_sequences: Sequences of one forward call on one rank.
    """

    def __init__(self, model: ShardedModel, *, micro_batch_sequences: int) -> None:
        super().__init__(model.model, micro_batch_sequences=micro_batch_sequences)

    def _per_sequence(self, batch: TokenBatch, score: TargetScore) -> tuple[float, ...]:
        """Sums of a score in batch order, the same on every rank.

        Cost: one forward pass of the batch over all ranks, and one all-gather of its sums.
        """
        mine: list[float] = []
        with torch.no_grad():
            for ids, mask in self._own(batch):
                mine += self._sequence_sums(ids, mask, score)
        return self._in_batch_order(mine, self.micro_batch_sequences)[: batch.input_ids.shape[0]]

    def backward(self, batch: TokenBatch) -> float:
        """Add the gradient of the SUM of all target losses, over all ranks; returns their mean.

        Cost: one forward and one backward pass of the batch over all ranks.

        Raises:
            BatchError: no token of the batch is a target.
        """
        if not bool(batch.loss_mask.any()):
            raise BatchError("no token of this batch is a target: its loss mask is all False")
        mine = [self._backward_sum(ids, mask) for ids, mask in self._own(batch)]
        # Added from left to right in the batch's order, as one rank adds them.
        return sum(self._in_batch_order(mine, 1)) / int(batch.loss_mask.sum())

    def _own(self, batch: TokenBatch) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's micro-batches, as many as every other rank's."""
        size, rank, num_ranks = self.micro_batch_sequences, dist.get_rank(), dist.get_world_size()
        total = num_micro_batches(batch, size)
        for start in range(0, total, num_ranks):
            if start + rank < total:
                yield micro_batch(batch, start + rank, size, self.device)
            else:
                ids, mask = micro_batch(batch, 0, size, self.device)
                yield ids, torch.zeros_like(mask)

    def _in_batch_order(self, mine: list[float], each: int) -> tuple[float, ...]:
        """Every rank's values, `each` per micro-batch, in batch order; fill-up ones come last."""
        by_rank = gather_floats(mine, self.device)
        starts = range(0, len(mine), each)
        return tuple(v for start in starts for row in by_rank for v in row[start : start + each])
