"""The model that stays in memory from checkpoint to checkpoint, and the loss that goes with it.

The back-end is named once; checkpoints of a series share it.
"""

from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from probe.checkpoints.source import Source
from probe.layers import run_layers
from probe.loss import CausalLoss
from probe.parallel.deepspeed3 import DeepSpeed3Model
from probe.parallel.distributed_loss import DistributedLoss
from probe.parallel.fsdp2 import Fsdp2Model
from probe.parallel.single import SingleModel
from probe.result import Backend

Sharded = Fsdp2Model | DeepSpeed3Model
Model = SingleModel | Sharded


def num_ranks() -> int:
    """Ranks of the default process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class ResidentModel:
    """Holds one model; checkpoints of the same architecture are loaded into it in place.

    Args:
        backend: `single`, or what shards the model over the ranks of torch.distributed, one rank
            too; `auto`: fsdp2 where there are several ranks.
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
        backend: Backend | Literal["auto"] = "auto",
        device: torch.device,
        dtype: torch.dtype,
        attention: str,
        micro_batch_sequences: int,
        offload_base: bool = False,
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        several = "fsdp2" if num_ranks() > 1 else "single"
        self._backend = several if backend == "auto" else backend
        self._device, self._dtype, self._attention = device, dtype, attention
        self._micro_batch_sequences = micro_batch_sequences
        self._offload_base = offload_base
        self._run_layers = partial(
            run_layers, activation_checkpointing=activation_checkpointing, compile=compile
        )
        self._single: tuple[SingleModel, CausalLoss] | None = None
        self._sharded: tuple[Sharded, CausalLoss] | None = None

    def load(self, source: Source) -> tuple[Model, CausalLoss]:
        """The checkpoint's values in the resident model, or a new one where the config differs.

        Raises:
            CheckpointError: The checkpoint is broken.
            ConfigError: DeepSpeed is asked for and not installed.
            ParallelismError: A sharded back-end without torch.distributed.
        """
        if self._backend == "single":
            return self._load_single(source)
        return self._load_sharded(source)

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

    def _load_sharded(self, source: Source) -> tuple[Sharded, CausalLoss]:
        empty = source.skeleton(self._attention)
        if self._sharded is not None and _same_architecture(self._sharded[0].model, empty):
            self._sharded[0].load(source)
            return self._sharded
        if self._sharded is not None and isinstance(self._sharded[0], DeepSpeed3Model):
            self._sharded[0].close()
        self._sharded = None  # free it before the next one is built
        kind = DeepSpeed3Model if self._backend == "deepspeed" else Fsdp2Model
        model = kind(
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
