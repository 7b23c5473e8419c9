"""Several multilayer perceptrons of one shape, run as one batched model.

R networks live in one tensor `parameters` (R, P): a matrix product of the batch serves all of
them, and whatever acts on parameters (optimizer, regulariser) is one operation for all layers of
all networks. A layer is a linear map and the normalisation after it; the last has none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

NORM_EPS = 1e-5  # within the root of a normalisation's variance
_BATCH_NORM_MOMENTUM = 0.1


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One parameter tensor of every network: columns `start:stop` of the flat parameters."""

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]

    def view(self, flat: Tensor) -> Tensor:
        """(R, P) -> (R, *shape), sharing memory."""
        return flat[:, self.start : self.stop].view(-1, *self.shape)


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear map (out, in), its bias, and where normalised a scale and a shift (out)."""

    name: str
    weight: TensorPlace
    bias: TensorPlace
    scale: TensorPlace | None = None
    shift: TensorPlace | None = None

    @property
    def places(self) -> list[TensorPlace]:
        """Its tensors in the order they lie."""
        optional = [place for place in (self.scale, self.shift) if place is not None]
        return [self.weight, self.bias, *optional]

    @property
    def start(self) -> int:
        """First column of the layer."""
        return self.weight.start

    @property
    def stop(self) -> int:
        """Column after its last."""
        return self.places[-1].stop


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """What the networks of one batch have in common.

    Attributes:
        num_inputs: Features of an image.
        hidden: Units of every hidden layer.
        num_classes: Outputs.
        activation: `sloped` (ReLU, leaky ReLU and linear: a slope below zero per network),
            `crelu` (relu(x) beside relu(-x): twice the features) or `tanh`.
        normalization: Before every activation.
    """

    num_inputs: int
    hidden: tuple[int, ...]
    num_classes: int
    activation: str
    normalization: str

    def layers(self) -> list[Layer]:
        """Every layer with its place in the flat parameters."""
        widths = [self.num_inputs, *self.hidden, self.num_classes]
        growth = 2 if self.activation == "crelu" else 1
        layers: list[Layer] = []
        start = 0
        for number, (before, after) in enumerate(pairwise(widths), 1):
            num_inputs = before if number == 1 else growth * before
            shapes: dict[str, tuple[int, ...]] = {"weight": (after, num_inputs), "bias": (after,)}
            if self.normalization != "none" and number < len(widths) - 1:
                shapes |= {"scale": (after,), "shift": (after,)}
            places = {}
            for name, shape in shapes.items():
                stop = start + int(np.prod(shape))
                places[name] = TensorPlace(f"fc{number}.{name}", start, stop, shape)
                start = stop
            layers.append(Layer(f"fc{number}", **places))
        return layers


@dataclass(slots=True)
class Trace:
    """What one forward pass leaves behind for measurements.

    Attributes:
        inputs: Of every linear map, (R, B, in).
        linear: Outputs of every linear map, (R, B, out), before normalisation.
        normalized: What scale and shift are applied to, (R, B, out); None where there is none.
        pre_activations: Of every hidden layer, (R, B, out).
    """

    inputs: list[Tensor] = field(default_factory=list)
    linear: list[Tensor] = field(default_factory=list)
    normalized: list[Tensor | None] = field(default_factory=list)
    pre_activations: list[Tensor] = field(default_factory=list)


class BatchedMlp:
    """R perceptrons of one shape.

    Args:
        shape: Theirs.
        slopes: (R,) slope of the activation below zero: 0 ReLU, 1 linear; of `sloped` only.
        device: Where everything lives.

    Attributes:
        slope: One number where all networks share it, else (R, 1, 1).
    """

    def __init__(self, shape: NetworkShape, slopes: Sequence[float], device: torch.device) -> None:
        self.shape = shape
        self.layers = shape.layers()
        self.device = device
        self.num_runs = len(slopes)
        self.num_parameters = self.layers[-1].stop
        self.slope: float | Tensor
        if len(set(slopes)) == 1:
            self.slope = float(slopes[0])
        else:
            self.slope = torch.tensor(slopes, device=device).view(-1, 1, 1)
        # (layer, 2, R, units): running mean and variance of batch normalisation, for evaluation.
        self.running: list[Tensor] = []
        if shape.normalization == "batch":
            self.running = [self._fresh_running(units) for units in shape.hidden]

    def _fresh_running(self, units: int) -> Tensor:
        mean = torch.zeros(self.num_runs, units, device=self.device)
        return torch.stack([mean, torch.ones_like(mean)])

    @property
    def columns(self) -> list[tuple[int, int]]:
        """(start, stop) of every layer in the flat parameters."""
        return [(layer.start, layer.stop) for layer in self.layers]

    def initial_parameters(self, draws: Sequence[np.random.Generator]) -> Tensor:
        """(R, P) new parameters as `torch.nn.Linear` draws them: uniform within 1 / sqrt(in).

        Args:
            draws: One generator per network, so that a network's values are its own whatever
                stands beside it. Scales of normalisation are 1, shifts 0.
        """
        return torch.from_numpy(np.stack([self._initial(draw) for draw in draws])).to(self.device)

    def _initial(self, draw: np.random.Generator) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
        values = np.zeros(self.num_parameters, dtype=np.float32)
        for layer in self.layers:
            limit = layer.weight.shape[1] ** -0.5
            for place in (layer.weight, layer.bias):
                size = place.stop - place.start
                uniform = draw.random(size, dtype=np.float32)
                values[place.start : place.stop] = (2 * uniform - 1) * np.float32(limit)
            if layer.scale is not None:
                values[layer.scale.start : layer.scale.stop] = 1
        return values

    def reset_running(self, is_reset: Tensor) -> None:
        """Forget the running statistics of the networks where `is_reset` (R,) is true."""
        for running in self.running:
            running[:, is_reset] = self._fresh_running(running.shape[-1])[:, is_reset]

    def leaves(self, parameters: Tensor) -> list[Tensor]:
        """Every tensor of every layer, (R, *shape), as leaves that share the parameters' memory."""
        return [
            place.view(parameters).detach().requires_grad_()
            for layer in self.layers
            for place in layer.places
        ]

    def forward(
        self,
        tensors: Sequence[Tensor],
        x: Tensor,
        *,
        training: bool = True,
        update_running: bool = False,
        trace: Trace | None = None,
    ) -> Tensor:
        """Logits of every network on its own batch.

        Args:
            tensors: As `leaves` gives them.
            x: (R, B, num_inputs).
            training: Batch normalisation by the batch's own statistics; else by the running ones.
            update_running: Let this batch enter the running statistics.
            trace: Is filled where given.

        Returns:
            (R, B, num_classes).
        """
        rest = iter(tensors)
        for number, layer in enumerate(self.layers):
            weight, bias = next(rest), next(rest)
            z = batched_linear(x, weight, bias)
            if trace is not None:
                trace.inputs.append(x)
                trace.linear.append(z)
            if number == len(self.layers) - 1:
                break
            normalized: Tensor | None = None
            if layer.scale is not None:
                normalized = self._normalize(z, number, training, update_running)
                scale, shift = next(rest).unsqueeze(1), next(rest).unsqueeze(1)
                z = torch.addcmul(shift, normalized, scale)
            if trace is not None:
                trace.normalized.append(normalized)
                trace.pre_activations.append(z)
            x = self.activate(z)
        return z

    def activate(self, z: Tensor) -> Tensor:
        """The hidden units' outputs (R, B, features) for their pre-activations (R, B, units)."""
        if self.shape.activation == "crelu":
            return torch.relu(torch.cat([z, -z], dim=2))
        if self.shape.activation == "tanh":
            return torch.tanh(z)
        if isinstance(self.slope, float):
            return torch.relu(z) if self.slope == 0 else F.leaky_relu(z, self.slope)
        # A product with constants: its derivative at a kink is the slope below, as that of torch.
        return z * torch.where(z > 0, torch.ones_like(self.slope), self.slope)

    def _normalize(self, z: Tensor, number: int, training: bool, update_running: bool) -> Tensor:
        if self.shape.normalization == "layer":
            return F.layer_norm(z, z.shape[-1:], eps=NORM_EPS)
        if not training:
            running = self.running[number].unsqueeze(2)  # (2, R, 1, units)
            return (z - running[0]) * torch.rsqrt(running[1] + NORM_EPS)
        variance, mean = torch.var_mean(z, dim=1, correction=0, keepdim=True)
        if update_running:
            size = z.shape[1]
            unbiased = variance * (size / max(1, size - 1))
            seen = torch.stack([mean.squeeze(1), unbiased.squeeze(1)]).detach()
            self.running[number].lerp_(seen, _BATCH_NORM_MOMENTUM)
        return (z - mean) * torch.rsqrt(variance + NORM_EPS)


def batched_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Linear maps x W' + b of all networks: (R, B, in), (R, out, in), (R, out) -> (R, B, out).

    On the CPU a batched product gives each matrix to one thread, so that threads idle where their
    number does not divide R; one product after the other, each on all threads, is then faster.
    """
    if len(x) == 1:  # plain views: nothing is copied, forward or backward
        return torch.addmm(bias.squeeze(0), x.squeeze(0), weight.squeeze(0).t()).unsqueeze(0)
    if x.is_cpu and len(x) % torch.get_num_threads() != 0:
        runs = zip(bias.unbind(), x.unbind(), weight.unbind(), strict=True)
        return torch.stack([torch.addmm(b, inputs, w.t()) for b, inputs, w in runs])
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))


def batch_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(R,) cross-entropy of every network, nats, mean over its batch.

    Args:
        logits: (R, B, num_classes).
        labels: (R, B) classes.
    """
    chosen: Tensor = torch.log_softmax(logits, dim=2).gather(2, labels.unsqueeze(2))
    return -chosen.squeeze(2).mean(dim=1)
