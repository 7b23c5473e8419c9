"""A model spread over ranks by DeepSpeed ZeRO-3, without an optimizer of DeepSpeed's.

The live shards are DeepSpeed's own partitions (`ds_tensor`: each parameter flattened, padded and
cut into equal parts), kept in the forward dtype; the fp32 base beside them is ours. Three things
would give wrong losses in silence: something that stays gathered over a write (small parameters do
by default: 13% off), rotary frequencies in half precision, and buffers that no checkpoint holds.
That the shards are what is gathered is checked once, by `unseen`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from probe.checkpoints.expected import ExpectedWeights
from probe.checkpoints.source import Source
from probe.errors import ParallelismError
from probe.parallel import Shard
from probe.parallel.buffers import fill_buffers
from probe.parallel.collectives import raise_together, require_process_group, sum_floats
from probe.parallel.deepspeed_library import import_deepspeed, off_stdout
from probe.parallel.fill import fill_persistent_buffers, fill_shards
from probe.parallel.islands import refuse_fp32_islands
from probe.parallel.offload import empty_base

# The name it has since torch 2.13; the one before is deprecated.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class DeepSpeed3Model:
    """A causal language model sharded over all ranks of the default process group.

    Args:
        model: Structure only, fp32 on the meta device (`Source.skeleton`); owned from here on.
        source: Its values. Each rank reads its own part and nothing else.
        device: Where this rank runs; the process group must serve it.
        dtype: Of the forward pass: float32, bfloat16 or float16.
        offload_base: Keep the base in pinned host memory; each point of the ray copies it over.

    Raises:
        ParallelismError: There is no process group, another rank failed, or the forward pass
            would not see what is written into the shards.
        CheckpointError: A weight is missing, left over or of another shape.
        ConfigError: DeepSpeed is not installed or does not run this dtype here, or the model keeps
            some weights in fp32 where a half precision is asked for.

    Memory: 4 bytes per parameter for the base and 4 (half precision: 2) for the live shard, over
        the number of ranks, and the modules that are gathered at the time.
    Cost: one broadcast of the model while it is made, one read of this rank's share, one gather.
    """

    backend = "deepspeed"

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
        deepspeed = import_deepspeed(device, dtype)
        options = engine_options(dtype)
        with off_stdout():
            _partition(model, deepspeed, options, device, dtype)
            fill_buffers(model)
            engine = deepspeed.initialize(model=model, config=options)[0]
        self.model: nn.Module = model.eval()  # type: ignore[no-untyped-call]
        self._partitioner: Any = engine.optimizer
        # They put nodes between the layers, so that bf16 gradients would be added in another order.
        for hook in self._partitioner.backward_hooks:
            hook.remove()
        self._parameters: dict[str, Any] = dict(model.named_parameters())
        self.shards: Sequence[Shard] = [
            _shard(name, parameter, offload_base) for name, parameter in self._parameters.items()
        ]
        self.load(source)
        self._check_seen()

    @property
    def num_parameters(self) -> int:
        """Distinct parameters of the whole model; tied ones count once."""
        return sum(parameter.ds_numel for parameter in self._parameters.values())

    def load(self, source: Source) -> None:
        """Take over the values of a checkpoint of this architecture, each rank its own part.

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
        """Drop every gathered copy, so that the next forward pass gathers what was written.

        On a GPU it also waits for the writes: DeepSpeed gathers on a stream of its own.
        """
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self._partitioner.partition_all_parameters()

    def close(self) -> None:
        """Give the memory back: DeepSpeed keeps every model it ever had in a list of its own."""
        self._partitioner.destroy()
        for parameter in self._parameters.values():
            parameter.ds_tensor.data = parameter.ds_tensor.new_empty(0)
        self.shards = ()

    def gradient(self, backward: Callable[[], None]) -> list[Tensor | None]:
        """This rank's part of the gradient that `backward` accumulates, summed over the ranks.

        ZeRO-3 without an optimizer reduces no gradients: each is reduced here, in fp32, as soon
        as autograd has it whole. Every rank must run as many forward and backward passes as the
        others.

        Memory: 4 bytes per parameter over the number of ranks, and twice 4 bytes per element of
            one whole parameter at a time.
        """
        self.push()
        found: dict[str, Tensor] = {}
        hooks = []
        for shard in self.shards:
            parameter = self._parameters[shard.name]
            # autograd compares the gradient's layout with the parameter's
            hooks.append(parameter.register_hook(partial(_gather_first, parameter)))
            hooks.append(parameter.register_post_accumulate_grad_hook(_reducer(shard, found)))
        try:
            with _weights_gathered_in_backward(self.model):
                backward()
            return [found.pop(shard.name, None) for shard in self.shards]
        finally:
            for hook in hooks:
                hook.remove()
            self.push()
            for parameter in self._parameters.values():
                parameter.grad = None

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Elementwise sums, rounded once each, the same floats on every rank."""
        return sum_floats(values, self.device)

    @torch.no_grad()
    def unseen(self) -> list[str]:
        """Parameters of which the forward pass would see other values than this rank's shard.

        Cost: every parameter is gathered once.
        """
        wrong: list[str] = []
        for shard in self.shards:
            parameter = self._parameters[shard.name]
            parameter.all_gather()
            seen = parameter.detach().reshape(-1)[shard.lo : shard.hi]
            if not torch.equal(seen, shard.live):
                wrong.append(shard.name)
            parameter.partition()
        return wrong

    def _check_seen(self) -> None:
        wrong = self.unseen()
        failure = None
        if wrong:
            failure = ParallelismError(
                f"{len(wrong)} shards, the first of {wrong[0]!r}, are not what the forward pass "
                "reads. This version of DeepSpeed keeps them elsewhere; use parallel.backend: fsdp2"
            )
        raise_together(failure, self.device, "the check of the shards")


def engine_options(dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's config: ZeRO-3, every parameter partitioned however small."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,  # small ones would stay gathered
            "memory_efficient_linear": False,  # would replace torch's linear for good
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }


@torch.no_grad()
def _partition(
    model: PreTrainedModel,
    deepspeed: Any,
    options: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Take a model off the meta device, one module's parameters at a time.

    DeepSpeed's own way, making modules inside `zero.Init`, would also make the rotary angles in
    half precision.
    """
    made: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        for name, parameter in own.items():
            if id(parameter) not in made:
                values = torch.zeros(parameter.shape, dtype=dtype, device=device)
                made[id(parameter)] = nn.Parameter(values)
            setattr(module, name, made[id(parameter)])
        if own:
            deepspeed.zero.Init(
                module=nn.ParameterList(module.parameters(recurse=False)),
                config_dict_or_path=options,
            )
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty_like(buffer, device=device)


def _shard(name: str, parameter: Any, offload_base: bool) -> Shard:
    part = parameter.ds_tensor
    lo = min(dist.get_rank() * part.numel(), parameter.ds_numel)
    hi = min(lo + part.numel(), parameter.ds_numel)
    live = part.detach()[: hi - lo]  # behind it: padding
    base = empty_base(live, offload=offload_base)
    return Shard(name=name, lo=lo, hi=hi, base=base, live=live)


def _reducer(shard: Shard, found: dict[str, Tensor]) -> Callable[[Any], None]:
    """A hook that moves a whole gradient out of `.grad` and adds its sum over ranks, in fp32."""

    def reduce(parameter: Any) -> None:
        grad, parameter.grad = parameter.grad, None
        # Nothing needs it after its gradient; a layer that was run again may have been broken off.
        parameter.ds_active_sub_modules.clear()
        parameter.partition()
        per_rank = parameter.ds_tensor.numel()
        whole = grad.new_zeros(per_rank * dist.get_world_size(), dtype=shard.base.dtype)
        whole[: grad.numel()] = grad.reshape(-1)
        part = whole.new_empty(per_rank)
        _reduce_scatter(part, whole, op=dist.ReduceOp.SUM)
        own = part[: shard.hi - shard.lo]
        if shard.name in found:
            found[shard.name] += own
        else:
            found[shard.name] = own.clone()

    return reduce


@contextmanager
def _weights_gathered_in_backward(model: nn.Module) -> Iterator[None]:
    """Inside, autograd saves no gathered weight, and gathers one again where it needs it.

    Stock linear layers save a transposed view, which would keep the whole model gathered from its
    forward to its backward pass.
    """
    running: dict[int, Any] = {}  # storage -> parameter, of the module whose forward runs now

    def entered(module: nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            running[parameter.untyped_storage().data_ptr()] = parameter

    def left(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            running.pop(parameter.untyped_storage().data_ptr(), None)

    def pack(tensor: Tensor) -> Any:
        place = tensor.untyped_storage().data_ptr()
        parameter = running.get(place)
        # A forward that was broken off leaves its entries behind: is the weight still there?
        if parameter is None or parameter.untyped_storage().data_ptr() != place:
            return tensor
        if parameter.dtype != tensor.dtype:
            return tensor
        offset = tensor.storage_offset() - parameter.storage_offset()
        return parameter, tensor.shape, tensor.stride(), offset

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        parameter, shape, stride, offset = saved
        _gather(parameter)
        values: Tensor = parameter.detach()
        return values.as_strided(shape, stride, values.storage_offset() + offset)

    hooks = [
        hook
        for module in model.modules()
        if module._parameters
        for hook in (
            module.register_forward_pre_hook(entered),  # after DeepSpeed's, which gathers
            module.register_forward_hook(left, prepend=True),  # before DeepSpeed's, which frees
        )
    ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _gather_first(parameter: Any, _: Tensor) -> None:
    _gather(parameter)


def _gather(parameter: Any) -> None:
    if parameter.numel() != parameter.ds_numel:
        parameter.all_gather()
