"""What runs learn, task after task: chosen images, drawn labels, drawn orders.

Every draw has a random generator of its own, keyed by what is drawn, the run's seed, the task and
the epoch, on the CPU. So a seed means the same stream on every device, beside any other runs, and
after a resume, which needs no random state. The numbers are those of NumPy's `Generator`, whose
methods may change between NumPy's feature releases; results record the version.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probe.continual.datasets import Images
from probe.continual.draws import generator_for
from probe.errors import BatchError, ConfigError
from probe.spec_continual import Stream


@dataclass(frozen=True, eq=False)
class Task:
    """What one task asks of every run."""

    number: int
    labels: Tensor  # (R, N) int64
    permutation: Tensor | None  # (R, F) int64: input j is number permutation[r, j] of the image


class TaskStream:
    """The tasks of a group of R runs on the same N images of F numbers.

    Attributes:
        chosen: (N,) indices of the images within the data set, ascending.
        inputs: (N, F) fp32, normalised by the chosen images' global mean and standard deviation.
        num_classes: Of the data set, also where the chosen images lack one.
        num_batches: Steps of one epoch; the last takes what is left.
    """

    def __init__(
        self, stream: Stream, images: Images, runs_seeds: Sequence[int], device: torch.device
    ) -> None:
        """Chooses the images and puts them on the device.

        Args:
            stream: Kind of tasks, number of images, batch size and the seed of the choice.
            images: The data set.
            runs_seeds: One seed per run, in the runs' order; equal seeds mean equal streams.
            device: Of all tensors handed out.

        Raises:
            ConfigError: More images are asked for than there are, or a batch is more than all.
            BatchError: The chosen images are constant, or their numbers lie further apart than
                fp32 reaches, so that they cannot be normalised.
        """
        self.chosen = _choose(stream, images)
        self.inputs = _on(device, _normalised(images.inputs[self.chosen], images.name))
        self.num_images, self.num_features = self.inputs.shape
        self.num_classes = images.num_classes
        self.num_batches = -(-self.num_images // stream.batch_size)
        self._true_labels = images.labels[self.chosen]
        self._type = stream.type
        self._device = device
        # runs of equal seed (other methods, other controls) share what is drawn
        self._seeds = sorted(set(runs_seeds))
        places = [self._seeds.index(seed) for seed in runs_seeds]
        self._place = torch.tensor(places, dtype=torch.int64, device=device)  # (R,)

    def task(self, task: int) -> Task:
        """Labels and order of inputs of one task; the same whenever it is asked for.

        random_labels: every label uniform over the classes, drawn anew for each seed and task.
        permuted_inputs: true labels, and one order of the F inputs per seed and task.

        Args:
            task: Number of the task, from 0.
        """
        if self._type == "permuted_inputs":
            labels = _on(self._device, self._true_labels).expand(len(self._place), -1)
            order = [
                generator_for("permutation", seed, task).permutation(self.num_features)
                for seed in self._seeds
            ]
            return Task(task, labels, self._per_run(order))
        drawn = [
            generator_for("labels", seed, task).integers(self.num_classes, size=self.num_images)
            for seed in self._seeds
        ]
        return Task(task, self._per_run(drawn), None)

    def order(self, task: int, epoch: int) -> Tensor:
        """(R, N) int64: each row the image indices in the order of this pass, every one once.

        Step k of the epoch takes columns k * batch_size to (k + 1) * batch_size.

        Args:
            task: Number of the task, from 0.
            epoch: Number of the pass within the task, from 0.

        Cost: one permutation on the CPU per distinct seed, 0.2 to 0.4 ms for 21,000 images.
        """
        drawn = [
            generator_for("order", seed, task, epoch).permutation(self.num_images)
            for seed in self._seeds
        ]
        return self._per_run(drawn)

    def batch(self, task: Task, index: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs and labels of one step.

        Args:
            task: From `task`.
            index: (R, B) int64 image indices, columns of `order`.

        Returns:
            x (R, B, F) fp32 and y (R, B) int64.

        Cost: copies on the device; no loop over runs and no wait for the CPU.
        """
        num_runs, batch_size = index.shape
        x = self.inputs.index_select(0, index.reshape(-1))
        x = x.view(num_runs, batch_size, self.num_features)
        if task.permutation is not None:
            x = x.gather(2, task.permutation[:, None, :].expand_as(x))
        return x, task.labels.gather(1, index)

    def _per_run(self, drawn: list[NDArray[np.int64]]) -> Tensor:
        """What was drawn per distinct seed, as one row per run."""
        return _on(self._device, np.stack(drawn)).index_select(0, self._place)


def _choose(stream: Stream, images: Images) -> NDArray[np.int64]:
    available = len(images.inputs)
    wanted = available if stream.num_images is None else stream.num_images
    if wanted > available:
        raise ConfigError(
            f"stream.num_images is {wanted}, and {images.name} has {available} images"
        )
    if stream.batch_size > wanted:
        raise ConfigError(
            f"stream.batch_size is {stream.batch_size}, and {wanted} images of {images.name} are "
            "used"
        )
    drawn = generator_for("images", stream.seed).permutation(available)[:wanted]
    return np.sort(drawn)


def _normalised(inputs: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """(x - mean) / std over all numbers together; moments and difference in fp64."""
    if inputs.min() == inputs.max():
        raise BatchError(
            f"{name}: all {inputs.size} numbers of the {len(inputs)} chosen images are "
            f"{inputs.flat[0]}; constant images cannot be normalised"
        )
    mean = inputs.mean(dtype=np.float64)
    std = inputs.std(dtype=np.float64)
    shifted = np.empty_like(inputs)
    with np.errstate(over="ignore"):  # beyond fp32: found below
        np.subtract(inputs, mean, out=shifted, dtype=np.float64, casting="same_kind")
        shifted /= std
    if not np.isfinite(shifted).all():
        raise BatchError(
            f"{name}: the chosen images reach from {inputs.min():.3g} to {inputs.max():.3g}, "
            "too far apart for fp32; scale them down"
        )
    return shifted


def _on(device: torch.device, array: NDArray[np.int64] | NDArray[np.float32]) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # pinned: the CPU need not wait until the GPU has come this far
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
