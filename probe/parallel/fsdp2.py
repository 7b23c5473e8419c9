"""A model spread over ranks by PyTorch FSDP2, each rank holding its rows of every parameter.

The live shards are FSDP's own fp32 shards; half precision is made when a group of layers is
gathered. Four things would give wrong losses in silence, so they are done here and checked once
by `unseen`: every group is resharded after its forward and after each write (one left gathered
keeps its old values: 8% off); shards are taken only after FSDP's lazy set-up, which moves uneven
ones (3% off); forward inputs are not cast (fp32 rotary angles would be rounded); buffers that no
checkpoint holds are computed again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from probe.checkpoints.expected import ExpectedWeights
from probe.checkpoints.source import Source
from probe.errors import ParallelismError
from probe.parallel import Shard
from probe.parallel.buffers import fill_buffers
from probe.parallel.collectives import raise_together, require_process_group, sum_floats
from probe.parallel.fill import fill_persistent_buffers, fill_shards
from probe.parallel.islands import refuse_fp32_islands
from probe.parallel.offload import empty_base
from probe.perturb import HALF_PRECISION


class Fsdp2Model:
    """A causal language model sharded over all ranks of the default process group.

    Args:
        model: Structure only, fp32 on the meta device (`Source.skeleton`); owned from here on.
        source: Its values. Each rank reads its own rows and nothing else.
        device: Where this rank runs; the process group must serve it.
        dtype: Of the forward pass: float32, bfloat16 or float16.
        offload_base: Keep the base in pinned host memory; each point of the ray copies it over.

    Raises:
        ParallelismError: There is no process group, another rank failed, or the forward pass
            would not see what is written into the shards.
        CheckpointError: A weight is missing, left over or of another shape.
        ConfigError: The model keeps some weights in fp32 where a half precision is asked for.

    Memory: 8 bytes per parameter over the number of ranks (live and base), and while a group is
        gathered that group in the forward dtype.
    Cost: one read of this rank's share, one forward pass of two tokens, one gather of the model.
    """

    backend = "fsdp2"

    def __init__(
        self,
        model: PreTrainedModel,
        source: Source,
        device: torch.device,
        *,
        dtype: torch.dtype,
        offload_base: bool = False,
    ) -> None:
        self.num_ranks = require_process_group()
        refuse_fp32_islands(model, dtype)
        self.device, self.dtype = device, dtype
        self._expected = ExpectedWeights(model)
        self.model: nn.Module = model
        policy = MixedPrecisionPolicy(
            param_dtype=dtype if dtype in HALF_PRECISION else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # would round fp32 rotary angles to the forward dtype
        )
        shard_modules(model, init_device_mesh(device.type, (self.num_ranks,)), policy)
        self._groups = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for group in self._groups:  # sums of gradients, not means over the ranks
            group.set_gradient_divide_factor(1.0)
            group.set_force_sum_reduction_for_comms(True)
        model.to_empty(device=device)
        fill_buffers(model)
        self._warm_up()
        self._parameters: dict[str, DTensor] = {
            name: parameter  # type: ignore[misc]  # DTensors, once every group is resharded
            for name, parameter in model.named_parameters()
        }
        self.shards: Sequence[Shard] = [
            _shard(name, parameter, offload_base) for name, parameter in self._parameters.items()
        ]
        self.load(source)
        self._check_seen()

    @property
    def num_parameters(self) -> int:
        """Distinct parameters of the whole model; tied ones count once."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    def load(self, source: Source) -> None:
        """Take over the values of a checkpoint of this architecture, each rank its own rows.

        Args:
            source: Read by flat range.

        Raises:
            CheckpointError: A weight is missing, left over or of another shape.
            ParallelismError: Another rank could not read its part.
        """
        failure: Exception | None = None
        try:
            stored = self._expected.find_in(source)
            fill_shards(self.shards, source, stored)
            fill_persistent_buffers(self.model, source, stored)
        except Exception as error:  # told to the others first: they would wait for this rank
            failure = error
        raise_together(failure, self.device, "reading the checkpoint")
        self.push()

    def push(self) -> None:
        """Drop every gathered copy, so that the next forward pass gathers what was written."""
        for group in self._groups:
            group.reshard()

    def gradient(self, backward: Callable[[], None]) -> list[Tensor | None]:
        """This rank's rows of the gradient that `backward` accumulates, summed over the ranks.

        Every rank must run as many forward and backward passes as the others. Gradients are
        reduced and added up over micro-batches in fp32.

        Memory: 4 bytes per parameter over the number of ranks.
        """
        self.push()
        self.model.zero_grad(set_to_none=True)
        try:
            backward()
            return [self._take_gradient(parameter) for parameter in self._parameters.values()]
        finally:
            self.push()
            self.model.zero_grad(set_to_none=True)

    @staticmethod
    def _take_gradient(parameter: Any) -> Tensor | None:
        found, parameter.grad = parameter.grad, None
        if found is None:
            return None
        local: Tensor = found.to_local().detach()
        return local.reshape(-1)

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Elementwise sums, rounded once each, the same floats on every rank."""
        return sum_floats(values, self.device)

    @torch.no_grad()
    def unseen(self) -> list[str]:
        """Parameters of which the forward pass would see other values than this rank's shard.

        Cost: every group is gathered once.
        """
        wrong: list[str] = []
        of = {shard.name: shard for shard in self.shards}
        for group in self._groups:
            group.unshard()
            for name, parameter in self.model.named_parameters():
                if isinstance(parameter, DTensor):
                    continue  # of a group that is not gathered now
                shard = of[name]
                seen = parameter.detach().reshape(-1)[shard.lo : shard.hi]
                if not torch.equal(seen, shard.live.to(seen.dtype)):
                    wrong.append(name)
            group.reshard()
        return wrong

    @torch.no_grad()
    def _warm_up(self) -> None:
        """One forward pass, so that FSDP's lazy set-up has moved its shards before they are taken.

        They hold zeros meanwhile: what the memory held before could be NaN or very slow numbers.
        """
        for parameter in self.model.parameters():
            parameter.zero_()
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        self.model(input_ids=ids, use_cache=False)
        self.push()

    def _check_seen(self) -> None:
        wrong = self.unseen()
        failure = None
        if wrong:
            failure = ParallelismError(
                f"{len(wrong)} shards, the first of {wrong[0]!r}, are not what the forward pass "
                "reads. This version of torch keeps FSDP shards elsewhere; use one rank."
            )
        raise_together(failure, self.device, "the check of the shards")


def shard_modules(model: PreTrainedModel, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Apply `fully_shard` to the embedding, each layer, norm with output layer, and the root.

    Tied embeddings share one parameter, so embedding, norm and output layer are one group then.
    Every group frees its gathered copy after its forward: FSDP's own default keeps the root's.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    norm = getattr(model.base_model, "norm", None)
    last = [module for module in (norm, head) if module is not None]
    tied = head is not None and head.weight is embedding.weight
    layers = set(model._no_split_modules or ())
    groups = [[embedding, *last]] if tied else [[embedding], last]
    groups += [[m] for m in model.modules() if type(m).__name__ in layers]
    for group in [*groups, [model]]:
        if group:
            fully_shard(group, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


@torch.no_grad()
def _shard(name: str, parameter: DTensor, offload_base: bool) -> Shard:
    local = parameter.to_local()
    assert local.is_contiguous()
    num_rows, row = parameter.shape[0], parameter.shape[1:].numel()  # FSDP divides the rows
    per_rank = -(-num_rows // dist.get_world_size())
    lo = min(dist.get_rank() * per_rank, num_rows) * row
    live = local.detach().view(-1)
    base = empty_base(live, offload=offload_base)
    return Shard(name=name, lo=lo, hi=lo + live.numel(), base=base, live=live)
