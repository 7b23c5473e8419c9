"""Networks small enough for dense Hessians and loops over samples, and their plain twins."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from probe.continual.derivatives import BatchDerivatives
from probe.continual.networks import BatchedMlp, NetworkShape

CPU = torch.device("cpu")
KINDS = list(product(["sloped", "crelu", "tanh"], ["none", "batch", "layer"]))
SLOPES = (0.0, 0.25, 1.0)  # relu, leaky_relu, linear; 0.25 is the same in float32 and float64
HIDDEN = (4, 3)
NUM_INPUTS, NUM_CLASSES = 5, 3


class Crelu(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([torch.relu(z), torch.relu(-z)], dim=1)


@dataclass
class Case:
    """Three runs and a batch of each."""

    network: BatchedMlp
    parameters: Tensor
    x: Tensor
    y: Tensor

    def derivatives(self) -> BatchDerivatives:
        return BatchDerivatives(self.network, self.parameters, self.x, self.y)

    def twin(self, run: int) -> nn.Sequential:
        """The same network of stock modules; normalisation by the statistics of what it is given.

        Parameters of a Sequential lie in the order of ours.
        """
        shape, modules = self.network.shape, list[nn.Module]()
        activations = {"crelu": Crelu(), "tanh": nn.Tanh(), "sloped": nn.LeakyReLU(SLOPES[run])}
        for layer in self.network.layers:
            modules.append(nn.Linear(layer.weight.shape[1], layer.weight.shape[0]))
            if layer.name == self.network.layers[-1].name:
                break
            units = layer.weight.shape[0]
            if shape.normalization == "batch":
                modules.append(nn.BatchNorm1d(units, track_running_stats=False))
            elif shape.normalization == "layer":
                modules.append(nn.LayerNorm(units))
            modules.append(activations[shape.activation])
        model = nn.Sequential(*modules).to(self.parameters.dtype)
        nn.utils.vector_to_parameters(self.parameters[run], model.parameters())
        return model

    def loss_of(self, run: int, flat: Tensor) -> Tensor:
        """The run's batch loss at other parameters (P,)."""
        model, at = self.twin(run), 0
        values = {}
        for name, old in model.named_parameters():
            values[name] = flat[at : at + old.numel()].view_as(old)
            at += old.numel()
        logits = torch.func.functional_call(model, values, (self.x[run],))
        return F.cross_entropy(logits, self.y[run])

    def dense_hessian(self, run: int) -> Tensor:
        def loss(flat: Tensor) -> Tensor:
            return self.loss_of(run, flat)

        hessian: Tensor = torch.autograd.functional.hessian(loss, self.parameters[run])
        return hessian

    def sample_gradients(self, run: int) -> Tensor:
        """(B, P) by a loop over samples; statistics of batch normalisation are those of the batch,
        as constants."""
        model = self.twin(run)
        if self.network.shape.normalization == "batch":
            model = _with_constant_statistics(model, self.x[run])
        rows = []
        for x, y in zip(self.x[run], self.y[run], strict=True):
            loss = F.cross_entropy(model(x.unsqueeze(0)), y.unsqueeze(0))
            found = torch.autograd.grad(loss, list(model.parameters()))
            rows.append(torch.cat([gradient.flatten() for gradient in found]))
        return torch.stack(rows)

    def columns(self) -> Iterator[slice]:
        """Of every layer, and of all."""
        for layer in self.network.layers:
            yield slice(layer.start, layer.stop)
        yield slice(0, self.network.num_parameters)

    def single(self, run: int) -> "Case":
        """The run by itself."""
        network = BatchedMlp(self.network.shape, [SLOPES[run]], CPU)
        rows = slice(run, run + 1)
        return Case(network, self.parameters[rows].clone(), self.x[rows], self.y[rows])


def make_case(
    activation: str,
    normalization: str,
    *,
    batch_size: int = 7,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    """Three runs of one shape; scales and shifts of normalisation are not at 1 and 0."""
    shape = NetworkShape(NUM_INPUTS, HIDDEN, NUM_CLASSES, activation, normalization)
    network = BatchedMlp(shape, SLOPES, CPU)
    generator = torch.Generator().manual_seed(seed)
    parameters = network.initial_parameters(draws(3, seed)).double()
    parameters += 0.3 * torch.randn(parameters.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(3, batch_size, NUM_INPUTS, generator=generator, dtype=torch.float64)
    y = torch.randint(NUM_CLASSES, (3, batch_size), generator=generator)
    return Case(network, parameters.to(dtype), x.to(dtype), y)


def make_certain_case(dtype: torch.dtype) -> Case:
    """Every sample right with probability 1 - 1e-26: squares of its gradients are 0 in float32."""
    case = make_case("tanh", "none", batch_size=64, dtype=dtype)
    case.y = torch.zeros_like(case.y)
    case.parameters[:, -NUM_CLASSES] += 60
    return case


def draws(num_runs: int, seed: int = 0) -> list[np.random.Generator]:
    """A generator per run: that of run r does not depend on how many there are."""
    return [np.random.default_rng([seed, run]) for run in range(num_runs)]


def _with_constant_statistics(model: nn.Sequential, x: Tensor) -> nn.Sequential:
    frozen: list[nn.Module] = []
    with torch.no_grad():
        for module in model:
            constant = module
            if isinstance(module, nn.BatchNorm1d):
                constant = nn.BatchNorm1d(module.num_features).to(x.dtype).eval()
                constant.weight, constant.bias = module.weight, module.bias
                assert constant.running_mean is not None
                assert constant.running_var is not None
                constant.running_mean.copy_(x.mean(dim=0))
                constant.running_var.copy_(x.var(dim=0, correction=0))
            frozen.append(constant)
            x = constant(x)
    return nn.Sequential(*frozen)
