"""First and second derivatives of the batch losses of R networks, written out.

One forward pass serves everything that is measured on a batch: gradients of single samples in
factored form, the gradient, and products with the Hessian or one layer's diagonal block of it.
A product is the tangent of the backward pass (Pearlmutter 1994). For one layer's block it starts
and ends at that layer; where activations are piecewise linear and nothing is normalised, such a
block is exactly J' S J (the layer's weights enter the logits linearly, S is the softmax's
Hessian), and the terms of second order vanish by themselves.

At a kink of an activation (pre-activation exactly 0) the slope below is taken.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from probe.continual.networks import NORM_EPS, BatchedMlp, Trace


@dataclass(frozen=True, slots=True)
class Deltas:
    """Derivatives of every sample's own loss (not divided by the batch size).

    Attributes:
        linear: By the output of every linear map, (R, B, out).
        pre_activation: By every hidden pre-activation, (R, B, units).
    """

    linear: list[Tensor]
    pre_activation: list[Tensor]


class BatchDerivatives:
    """R networks and a batch: what one forward pass leaves, and derivatives from it.

    Args:
        network: The networks.
        parameters: (R, P).
        x: (R, B, num_inputs).
        y: (R, B) classes.

    Cost: a forward pass; memory for its values.
    """

    def __init__(self, network: BatchedMlp, parameters: Tensor, x: Tensor, y: Tensor) -> None:
        self.network = network
        self.parameters = parameters
        self.batch_size = x.shape[1]
        self.trace = Trace()
        places = [place for layer in network.layers for place in layer.places]
        self._weights = [layer.weight.view(parameters) for layer in network.layers]
        with torch.no_grad():
            tensors = [place.view(parameters) for place in places]
            logits = network.forward(tensors, x, trace=self.trace)
            self.probabilities = torch.softmax(logits, dim=2)
            self._labels = y.unsqueeze(2)
            self._slopes = [self._slope(z) for z in self.trace.pre_activations]
            self._inverse_std = [
                None if n is None else self._root(z)
                for z, n in zip(self.trace.linear, self.trace.normalized, strict=False)
            ]
        self._own: Deltas | None = None
        self._of_samples: Deltas | None = None

    @property
    def deltas(self) -> Deltas:
        """Of the batch's loss, times the batch size. Cost, once: a backward pass to the inputs."""
        if self._own is None:
            self._own = self._backward(is_frozen=False)
        return self._own

    @property
    def sample_deltas(self) -> Deltas:
        """Of single samples: statistics of batch normalisation are taken as constants.

        Without batch normalisation a sample's loss depends on that sample alone, and these are
        `deltas`. Cost, once: a backward pass to the inputs.
        """
        if self.network.shape.normalization != "batch":
            return self.deltas
        if self._of_samples is None:
            self._of_samples = self._backward(is_frozen=True)
        return self._of_samples

    @torch.no_grad()
    def gradient(self, deltas: Deltas) -> Tensor:
        """(R, P) mean over the batch of the samples' gradients. Cost: half a backward pass."""
        result = torch.empty_like(self.parameters)
        for number, layer in enumerate(self.network.layers):
            own = deltas.linear[number]
            self._put_linear(result, number, own.transpose(1, 2) @ self.trace.inputs[number], own)
            normalized = self._normalized(number)
            if normalized is not None and layer.scale is not None:
                above = deltas.pre_activation[number]
                self._put_norm(result, number, above * normalized, above)
        return result

    @torch.no_grad()
    def hessian_product(self, vectors: Tensor, first: int, last: int, result: Tensor) -> None:
        """H v for the Hessian of each batch loss restricted to the layers `first` to `last`.

        Args:
            vectors: (R, P); read in the columns of those layers.
            first: Number of the first layer, from 0.
            last: Number of the last, inclusive.
            result: (R, P), written in the same columns.

        Cost: of all layers about 1.3 gradient steps' products of matrices, of one layer's block
        the tangent pass above it and twice its own product.
        """
        tangents = self._forward_tangent(vectors, first, last)
        probabilities = self.probabilities
        logits = tangents.linear
        above = probabilities * (logits - (probabilities * logits).sum(dim=2, keepdim=True))
        self._backward_tangent(vectors, first, last, tangents, above, result)

    def _forward_tangent(self, vectors: Tensor, first: int, last: int) -> "_Tangents":
        kept = _Tangents()
        features: Tensor | None = None
        for number in range(first, len(self.network.layers)):
            layer = self.network.layers[number]
            kept.inputs[number] = features
            z: Tensor | None = None
            if number <= last:
                weight, bias = layer.weight.view(vectors), layer.bias.view(vectors)
                z = torch.baddbmm(
                    bias.unsqueeze(1), self.trace.inputs[number], weight.transpose(1, 2)
                )
            if features is not None:
                through = self._weights[number].transpose(1, 2)
                z = features @ through if z is None else torch.baddbmm(z, features, through)
            assert z is not None
            kept.linear = z
            if number == len(self.network.layers) - 1:
                break
            normalized = self._normalized(number)
            if normalized is not None and layer.scale is not None and layer.shift is not None:
                kept.before_norm[number] = z
                moved = self._through_norm(z, number)
                kept.normalized[number] = moved
                z = layer.scale.view(self.parameters).unsqueeze(1) * moved
                if number <= last:
                    scale, shift = layer.scale.view(vectors), layer.shift.view(vectors)
                    z = z + scale.unsqueeze(1) * normalized + shift.unsqueeze(1)
            kept.pre_activation[number] = z
            features = self._push(z, number)
        return kept

    def _backward_tangent(
        self,
        vectors: Tensor,
        first: int,
        last: int,
        tangents: "_Tangents",
        above: Tensor,
        result: Tensor,
    ) -> None:
        """From the tangent of the logits' deltas down to layer `first`."""
        own = self.deltas
        for number in range(len(self.network.layers) - 1, first - 1, -1):
            if number < len(self.network.layers) - 1:
                above = self._below_activation(vectors, number, last, tangents, above, result)
            if number <= last:
                product = above.transpose(1, 2) @ self.trace.inputs[number]
                features = tangents.inputs[number]
                if features is not None:
                    product = product.baddbmm_(own.linear[number].transpose(1, 2), features)
                self._put_linear(result, number, product, above)
            if number == first:
                return
            delta = above
            above = delta @ self._weights[number]
            if number <= last:
                weight = self.network.layers[number].weight.view(vectors)
                above.baddbmm_(own.linear[number], weight)

    def _below_activation(
        self,
        vectors: Tensor,
        number: int,
        last: int,
        tangents: "_Tangents",
        above: Tensor,
        result: Tensor,
    ) -> Tensor:
        """Tangent of the delta of a linear map's output from that of the features after it."""
        layer, delta = self.network.layers[number], self.deltas.pre_activation[number]
        moved = self._pull(above, number)
        if self.network.shape.activation == "tanh":  # tanh'' = -2 tanh tanh'; delta has the tanh'
            value = self.trace.inputs[number + 1]
            moved = moved - 2 * value * tangents.pre_activation[number] * delta
        n, inverse_std = self._normalized(number), self._inverse_std[number]
        if n is None or inverse_std is None or layer.scale is None:
            return moved
        n_tangent = tangents.normalized[number]
        if number <= last:
            self._put_norm(result, number, moved * n + delta * n_tangent, moved)
        scale = layer.scale.view(self.parameters).unsqueeze(1)
        by_n, by_n_tangent = scale * delta, scale * moved
        if number <= last:
            by_n_tangent = by_n_tangent + layer.scale.view(vectors).unsqueeze(1) * delta
        dim = self._norm_dim
        z_tangent = tangents.before_norm[number]
        spread = (n * z_tangent).mean(dim=dim, keepdim=True) * inverse_std
        bent = n_tangent * (n * by_n).mean(dim=dim, keepdim=True)
        bent = bent + n * (n_tangent * by_n).mean(dim=dim, keepdim=True)
        straight = self._through_norm(by_n_tangent, number) - inverse_std * bent
        return straight - self.deltas.linear[number] * spread

    @torch.no_grad()
    def _backward(self, *, is_frozen: bool) -> Deltas:
        hits = torch.ones_like(self._labels, dtype=self.probabilities.dtype)
        above = self.probabilities.scatter_add(2, self._labels, -hits)
        linear, pre_activation = [above], []
        for number in range(len(self.network.layers) - 2, -1, -1):
            above = self._pull(above @ self._weights[number + 1], number)
            pre_activation.append(above)
            scale, inverse_std = self.network.layers[number].scale, self._inverse_std[number]
            if scale is not None and inverse_std is not None:
                above = scale.view(self.parameters).unsqueeze(1) * above
                above = inverse_std * above if is_frozen else self._through_norm(above, number)
            linear.append(above)
        return Deltas(linear[::-1], pre_activation[::-1])

    def _normalized(self, number: int) -> Tensor | None:
        hidden = self.trace.normalized
        return hidden[number] if number < len(hidden) else None

    @property
    def _norm_dim(self) -> int:
        return 2 if self.network.shape.normalization == "layer" else 1

    def _root(self, z: Tensor) -> Tensor:
        """1 / sqrt(variance + eps), the dimension of the statistics kept."""
        variance = torch.var(z, dim=self._norm_dim, correction=0, keepdim=True)
        return torch.rsqrt(variance + NORM_EPS)

    def _through_norm(self, moved: Tensor, number: int) -> Tensor:
        """The Jacobian of (z - mean) / std, which is symmetric, times tangents or deltas."""
        n, inverse_std = self._normalized(number), self._inverse_std[number]
        assert n is not None
        assert inverse_std is not None
        dim = self._norm_dim
        along = (n * moved).mean(dim=dim, keepdim=True)
        return inverse_std * (moved - moved.mean(dim=dim, keepdim=True) - n * along)

    def _slope(self, z: Tensor) -> Tensor:
        """The activation's derivative; of crelu of its two halves, side by side."""
        kind = self.network.shape.activation
        if kind == "tanh":
            return 1 - torch.tanh(z).square()
        if kind == "crelu":
            return torch.cat([(z > 0).to(z.dtype), -(z < 0).to(z.dtype)], dim=2)
        slope = self.network.slope
        if isinstance(slope, Tensor):
            below = slope.to(z.dtype)
        else:
            below = torch.full((), slope, dtype=z.dtype, device=z.device)
        return torch.where(z > 0, torch.ones_like(below), below)

    def _push(self, z: Tensor, number: int) -> Tensor:
        """Tangent of the features from that of the pre-activations."""
        if self.network.shape.activation == "crelu":
            z = torch.cat([z, z], dim=2)
        return self._slopes[number] * z

    def _pull(self, above: Tensor, number: int) -> Tensor:
        """Derivative by the pre-activations from that by the features."""
        below = self._slopes[number] * above
        if self.network.shape.activation == "crelu":
            first, second = below.chunk(2, dim=2)
            return first + second
        return below

    def _put_linear(self, result: Tensor, number: int, weight: Tensor, bias: Tensor) -> None:
        layer = self.network.layers[number]
        torch.div(weight, self.batch_size, out=layer.weight.view(result))
        layer.bias.view(result).copy_(bias.mean(dim=1))

    def _put_norm(self, result: Tensor, number: int, scale: Tensor, shift: Tensor) -> None:
        layer = self.network.layers[number]
        for place, values in ((layer.scale, scale), (layer.shift, shift)):
            if place is not None:
                place.view(result).copy_(values.mean(dim=1))


class _Tangents:
    """Of the forward pass, by number of the layer where there are several."""

    def __init__(self) -> None:
        self.linear: Tensor = torch.empty(0)  # of the layer reached last: of the logits at the end
        self.inputs: dict[int, Tensor | None] = {}
        self.before_norm: dict[int, Tensor] = {}
        self.normalized: dict[int, Tensor] = {}
        self.pre_activation: dict[int, Tensor] = {}


def sums_by_layer(network: BatchedMlp, values: Tensor) -> Tensor:
    """(R, L) sums of (R, P) over every layer's columns, in float64."""
    columns = [
        values[:, layer.start : layer.stop].sum(dim=1, dtype=torch.float64)
        for layer in network.layers
    ]
    return torch.stack(columns, dim=1)


def squares_by_layer(network: BatchedMlp, values: Tensor) -> Tensor:
    """(R, L) sums of the squares of (R, P) over every layer's columns, in float64.

    Squared after conversion: in float32 the square of less than 1e-23 is 0, and gradients of a
    batch that is learned by heart come to that.
    """
    norms = [
        torch.linalg.vector_norm(values[:, layer.start : layer.stop], dim=1, dtype=torch.float64)
        for layer in network.layers
    ]
    return torch.stack(norms, dim=1).square()


def with_whole(layers: Tensor) -> Tensor:
    """(R, L) -> (R, L + 1): the sum over layers as the last column."""
    return torch.cat([layers, layers.sum(dim=1, keepdim=True)], dim=1)
