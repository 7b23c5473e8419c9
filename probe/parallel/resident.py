"""The model that stays in memory from checkpoint to checkpoint, and the loss that goes with it.

One device where this process is alone, FSDP2 where torch.distributed has several ranks.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from probe.checkpoints.source import Source
from probe.layers import run_layers
from probe.loss import CausalLoss
from probe.parallel.distributed_loss import DistributedLoss
from probe.parallel.fsdp2 import Fsdp2Model
from probe.parallel.single import SingleModel

Model = SingleModel | Fsdp2Model


def num_ranks() -> int:
    """Ranks of the default process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class ResidentModel:
    """Holds one model; checkpoints of the same architecture are loaded into it in place.

    Args:
        device: Where this rank runs.
        dtype: Of the forward pass.
        attention: Kernel name for transformers.
        micro_batch_sequences: Sequences of one forward call.
        offload_base: Keep the unperturbed weights in host memory.
        activation_checkpointing: Recompute activations in backward passes.
        compile: Compile the layers.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        attention: str,
        micro_batch_sequences: int,
        offload_base: bool = False,
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        self._device, self._dtype, self._attention = device, dtype, attention
        self._micro_batch_sequences = micro_batch_sequences
        self._offload_base = offload_base
        self._run_layers = partial(
            run_layers, activation_checkpointing=activation_checkpointing, compile=compile
        )
        self._single: tuple[SingleModel, CausalLoss] | None = None
        self._sharded: tuple[Fsdp2Model, CausalLoss] | None = None

    def load(self, source: Source) -> tuple[Model, CausalLoss]:
        """The checkpoint's values in the resident model, or a new one where the config differs.

        Raises:
            CheckpointError: The checkpoint is broken.
        """
        return self._load_single(source) if num_ranks() == 1 else self._load_sharded(source)

    def _load_single(self, source: Source) -> tuple[SingleModel, CausalLoss]:
        weights = source.load_model(torch.float32, self._attention)
        if self._single is not None and _same_architecture(self._single[0].model, weights):
            self._single[0].load(weights)
            return self._single
        self._single = None  # free it before the next one is built
        half = self._dtype != torch.float32
        runs = source.load_model(self._dtype, self._attention) if half else weights
        model = SingleModel(runs, weights, self._device, offload_base=self._offload_base)
        loss = CausalLoss(runs, micro_batch_sequences=self._micro_batch_sequences)
        self._run_layers(model.model)  # after the loss, whose checks run 8 tokens
        self._single = (model, loss)
        return self._single

    def _load_sharded(self, source: Source) -> tuple[Fsdp2Model, CausalLoss]:
        empty = source.skeleton(self._attention)
        if self._sharded is not None and _same_architecture(self._sharded[0].model, empty):
            self._sharded[0].load(source)
            return self._sharded
        self._sharded = None  # free it before the next one is built
        model = Fsdp2Model(
            empty, source, self._device, dtype=self._dtype, offload_base=self._offload_base
        )
        loss = DistributedLoss(model, micro_batch_sequences=self._micro_batch_sequences)
        self._run_layers(model.model)
        self._sharded = (model, loss)
        return self._sharded


def _same_architecture(resident: nn.Module, fresh: nn.Module) -> bool:
    def comparable(model: nn.Module) -> dict[str, object]:
        values: dict[str, object] = model.config.to_dict()  # type: ignore[operator,union-attr]
        for volatile in ("_name_or_path", "dtype", "torch_dtype", "transformers_version"):
            values.pop(volatile, None)
        return values

    return comparable(resident) == comparable(fresh)
