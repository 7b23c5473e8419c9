"""Training steps as CUDA graphs: recorded once per batch size, replayed without Python.

A step of small networks is some fifty short kernels; launching them one by one takes longer than
they do. A replay launches all of them at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP_STEPS = 3  # allocations and library start-up must not be recorded


class RecordedSteps:
    """Calls `step` by replaying it.

    Args:
        step: Takes (R, B) indices; reads and writes only tensors that keep their place, and never
            waits for the device.
        written: All tensors it writes; they are put back after the steps that warm it up.
    """

    def __init__(self, step: Callable[[Tensor], None], written: Callable[[], list[Tensor]]) -> None:
        self._step = step
        self._written = written
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, index: Tensor) -> None:
        """One step on the images `index` (R, B). The first of a batch size records it."""
        size = index.shape[1]
        if size not in self._recorded:
            self._recorded[size] = self._record(index)
        graph, place = self._recorded[size]
        place.copy_(index)
        graph.replay()

    def _record(self, index: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        place = index.clone()
        kept = [tensor.clone() for tensor in self._written()]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_STEPS):
                self._step(place)
        torch.cuda.current_stream().wait_stream(side)
        for tensor, before in zip(self._written(), kept, strict=True):
            tensor.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # records, runs nothing
            self._step(place)
        return graph, place
