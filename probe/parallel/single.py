"""The whole model on one device: every shard is a whole parameter."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from probe.errors import CheckpointError
from probe.parallel import Shard
from probe.parallel.offload import empty_base
from probe.perturb import HALF_PRECISION


class SingleModel:
    """A model on one device, with a base of full stored precision.

    Args:
        model: Runs forward and backward, in the forward dtype; owned from here on: its
            parameters are made contiguous, moved to `device`, and written by whoever moves the
            live shards.
        weights: The same checkpoint in fp32 (it may be `model` itself): the base is copied from
            it, so that a half-precision run still steps from what was stored.
        device: Where forward and backward passes run.
        offload_base: Keep the base in pinned host memory; each point of the ray copies it over.

    Memory: live weights plus 4 bytes per parameter for the base, the latter on the host where it
        is offloaded.
    """

    backend = "single"
    num_ranks = 1

    def __init__(
        self,
        model: nn.Module,
        weights: nn.Module,
        device: torch.device,
        *,
        offload_base: bool = False,
    ) -> None:
        self.model = model.to(device).eval()
        self.device = device
        self._parameters = dict(model.named_parameters())
        self.dtype = next(iter(self._parameters.values())).dtype
        stored = dict(weights.named_parameters())
        self.shards: Sequence[Shard] = [
            _shard(name, parameter, stored[name], offload_base)
            for name, parameter in self._parameters.items()
        ]

    @property
    def num_parameters(self) -> int:
        """Distinct parameters; tied ones count once."""
        return sum(shard.hi - shard.lo for shard in self.shards)

    @torch.no_grad()
    def load(self, weights: nn.Module) -> None:
        """Take over the values of another checkpoint of the same architecture, in place.

        Args:
            weights: That checkpoint in fp32, on any device; not kept.

        Raises:
            CheckpointError: Its parameters have other names or shapes.
        """
        stored = dict(weights.named_parameters())
        for name, parameter in self._parameters.items():
            if name not in stored or stored[name].shape != parameter.shape:
                found = tuple(stored[name].shape) if name in stored else "nothing"
                raise CheckpointError(
                    f"weight {name!r} is {found} in the checkpoint, {tuple(parameter.shape)} in "
                    "the one before it. The checkpoints of a series must share one architecture."
                )
        for shard in self.shards:
            shard.base.copy_(stored[shard.name].reshape(-1))
            shard.live.copy_(shard.base)
        own = self.model.state_dict()  # persistent buffers: a few models keep state there
        for name, buffer in weights.named_buffers():
            if name in own:
                own[name].copy_(buffer)

    def push(self) -> None:
        """Nothing to do: the live shards are the parameters themselves."""

    def gradient(self, backward: Callable[[], None]) -> list[Tensor | None]:
        """Gradients of what `backward` accumulates into `.grad`, which is left empty.

        Half-precision gradients are added up over micro-batches in fp32: each one is moved
        out of `.grad` as soon as it is complete.

        Memory: 4 bytes per parameter.
        """
        self.model.zero_grad(set_to_none=True)
        wide: dict[str, Tensor] = {}

        def widen(name: str) -> Callable[[Tensor], None]:
            def take(parameter: Tensor) -> None:
                assert parameter.grad is not None
                if name in wide:
                    wide[name] += parameter.grad
                else:
                    wide[name] = parameter.grad.float()
                parameter.grad = None

            return take

        hooks = [
            parameter.register_post_accumulate_grad_hook(widen(name))  # type: ignore[no-untyped-call]
            for name, parameter in self._parameters.items()
            if parameter.dtype in HALF_PRECISION
        ]
        try:
            backward()
            return [self._taken(name, wide) for name in self._parameters]
        finally:
            for hook in hooks:
                hook.remove()
            self.model.zero_grad(set_to_none=True)

    def _taken(self, name: str, wide: dict[str, Tensor]) -> Tensor | None:
        found = wide.pop(name, None)
        if found is None:
            found, self._parameters[name].grad = self._parameters[name].grad, None
        return None if found is None else found.detach().reshape(-1)

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """One rank: the values themselves."""
        return list(values)


@torch.no_grad()
def _shard(name: str, parameter: nn.Parameter, stored: Tensor, offload_base: bool) -> Shard:
    if not parameter.is_contiguous():
        parameter.data = parameter.data.contiguous()
    live = parameter.data.view(-1)
    base = empty_base(live, offload=offload_base)
    base.copy_(stored.detach().reshape(-1))
    live.copy_(base)  # also gives pages mapped from the checkpoint file a private copy
    return Shard(name=name, lo=0, hi=live.numel(), base=base, live=live)
