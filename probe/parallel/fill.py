"""Fill the flat shards of a model from a checkpoint, each rank its own ranges and nothing else."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from probe.checkpoints.source import Source
from probe.errors import CheckpointError
from probe.parallel import Shard
from probe.parallel.buffers import non_persistent_buffers


@torch.no_grad()
def fill_shards(
    shards: Sequence[Shard], source: Source, stored: Mapping[str, Sequence[str]]
) -> None:
    """Set base and live of every shard to what the checkpoint stores.

    Args:
        shards: This rank's.
        source: Read by flat range.
        stored: From `probe.checkpoints.expected.ExpectedWeights.find_in`.

    Raises:
        CheckpointError: A range cannot be read, or copies of tied weights differ.

    Cost: one read of each range; one more per stored copy of a tied weight.
    """
    for shard in shards:
        name, *copies = stored[shard.name]
        values = source.read(name, "weight", shard.lo, shard.hi)
        for copy in copies:
            if not torch.equal(source.read(copy, "weight", shard.lo, shard.hi), values):
                raise CheckpointError(
                    f"{source.ref.location}: weights {name!r} and {copy!r} differ in elements "
                    f"{shard.lo}..{shard.hi}, but the model ties them (tie_word_embeddings). Is "
                    "config.json of another model?"
                )
        shard.base.copy_(values)
        shard.live.copy_(shard.base)


@torch.no_grad()
def fill_persistent_buffers(
    model: nn.Module, source: Source, stored: Mapping[str, Sequence[str]]
) -> None:
    """Set the buffers that checkpoints do hold; every rank has them whole.

    Raises:
        CheckpointError: One cannot be read.
    """
    for prefix, module in model.named_modules():
        own = dict(module.named_buffers(recurse=False))
        for name in sorted(own.keys() - set(non_persistent_buffers(module))):
            fqn = f"{prefix}.{name}" if prefix else name
            own[name].copy_(source.read(stored[fqn][0], "weight").view(own[name].shape))
