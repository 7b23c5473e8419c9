"""Batched perceptrons against stock modules of torch.nn, network by network."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from probe.continual.networks import BatchedMlp, NetworkShape, Trace, batch_losses

# Sums of at most 12 products in fp32: a few units in the last place, 6e-8 each.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
CPU = torch.device("cpu")


class Crelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.relu(x), torch.relu(-x)], dim=1)


def draws(seeds: list[int]) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in seeds]


def stock(network: BatchedMlp, parameters: Tensor, run: int, activation: nn.Module) -> nn.Module:
    """The same network out of torch.nn, with copies of its parameters."""
    modules: list[nn.Module] = []
    for number, layer in enumerate(network.layers):
        linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[0])
        linear.weight.data = layer.weight.view(parameters)[run].clone()
        linear.bias.data = layer.bias.view(parameters)[run].clone()
        modules.append(linear)
        if number == len(network.layers) - 1:
            break
        if layer.scale is not None:
            units = layer.scale.shape[0]
            is_batch = network.shape.normalization == "batch"
            norm = nn.BatchNorm1d(units) if is_batch else nn.LayerNorm(units)
            norm.weight.data = layer.scale.view(parameters)[run].clone()
            norm.bias.data = layer.shift.view(parameters)[run].clone()
            modules.append(norm)
        modules.append(activation)
    return nn.Sequential(*modules)


CASES = [
    ("sloped", [0.0, 0.0, 0.0], [nn.ReLU()] * 3),
    ("sloped", [0.0, 0.3, 1.0], [nn.ReLU(), nn.LeakyReLU(0.3), nn.Identity()]),
    ("crelu", [0.0, 0.0, 0.0], [Crelu()] * 3),
    ("tanh", [0.0, 0.0, 0.0], [nn.Tanh()] * 3),
]


@pytest.mark.parametrize("normalization", ["none", "batch", "layer"])
@pytest.mark.parametrize(("family", "slopes", "activations"), CASES)
def test_logits_losses_and_gradients_are_those_of_stock_modules(
    family, slopes, activations, normalization
):
    shape = NetworkShape(12, (7, 5), 4, family, normalization)
    network = BatchedMlp(shape, slopes, CPU)
    # not only the initial values: scales and shifts must matter
    noise = torch.from_numpy(np.random.default_rng(9).normal(size=(3, network.num_parameters)))
    parameters = network.initial_parameters(draws([0, 1, 2])) + 0.1 * noise.float()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 16, 12, generator=generator)
    y = torch.randint(0, 4, (3, 16), generator=generator)

    leaves = network.leaves(parameters)
    logits = network.forward(leaves, x)
    losses = batch_losses(logits, y)
    gradients = torch.autograd.grad(losses.sum(), leaves)

    for run in range(3):
        twin = stock(network, parameters, run, activations[run])
        expected = twin(x[run])
        loss = nn.functional.cross_entropy(expected, y[run])
        loss.backward()
        torch.testing.assert_close(logits[run], expected, **TOLERANCE)
        torch.testing.assert_close(losses[run], loss, **TOLERANCE)
        named = [parameter.grad for parameter in twin.parameters()]
        for own, other in zip(gradients, named, strict=True):
            torch.testing.assert_close(own[run], other, **TOLERANCE)


def test_running_statistics_and_evaluation_are_those_of_batchnorm1d():
    network = BatchedMlp(NetworkShape(6, (5,), 3, "sloped", "batch"), [0.0, 0.0], CPU)
    parameters = network.initial_parameters(draws([0, 1]))
    twins = [stock(network, parameters, run, nn.ReLU()) for run in range(2)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = 2 * torch.randn(2, 8, 6, generator=generator) + 1
        network.forward(network.leaves(parameters), x, update_running=True)
        for run, twin in enumerate(twins):
            twin(x[run])
    for run, twin in enumerate(twins):
        mean, variance = network.running[0][:, run]
        torch.testing.assert_close(mean, twin[1].running_mean, **TOLERANCE)
        torch.testing.assert_close(variance, twin[1].running_var, **TOLERANCE)
        twin.eval()
        own = network.forward(network.leaves(parameters), x, training=False)[run]
        torch.testing.assert_close(own, twin(x[run]), **TOLERANCE)
    network.reset_running(torch.tensor([True, False]))
    assert torch.equal(network.running[0][0, 0], torch.zeros(5))
    assert torch.equal(network.running[0][1, 0], torch.ones(5))
    assert not torch.equal(network.running[0][0, 1], torch.zeros(5))


def test_measuring_passes_leave_the_running_statistics_alone():
    network = BatchedMlp(NetworkShape(6, (5,), 3, "sloped", "batch"), [0.0], CPU)
    before = network.running[0].clone()
    network.forward(network.leaves(network.initial_parameters(draws([0]))), torch.randn(1, 8, 6))
    assert torch.equal(network.running[0], before)


def test_initial_values_are_uniform_within_one_over_root_inputs_and_each_networks_own():
    shape = NetworkShape(100, (50,), 10, "crelu", "layer")
    alone = BatchedMlp(shape, [0.0], CPU).initial_parameters(draws([7]))
    network = BatchedMlp(shape, [0.0, 0.0], CPU)
    together = network.initial_parameters(draws([3, 7]))
    assert torch.equal(alone[0], together[1])
    assert not torch.equal(together[0], together[1])
    weight = network.layers[0].weight.view(together)[0]
    assert weight.abs().max() <= 0.1
    # 5,000 uniform draws within +-0.1: variance 0.1^2 / 3, known to 0.9 / sqrt(5000) of itself
    assert weight.var().item() == pytest.approx(0.01 / 3, rel=0.05)
    assert network.layers[1].weight.shape == (10, 100)  # CReLU doubles the features
    assert torch.equal(network.layers[0].scale.view(together)[0], torch.ones(50))
    assert torch.equal(network.layers[0].shift.view(together)[0], torch.zeros(50))


def test_a_trace_holds_what_entered_and_left_every_linear_map():
    network = BatchedMlp(NetworkShape(6, (5, 4), 3, "sloped", "none"), [0.0], CPU)
    parameters = network.initial_parameters(draws([0]))
    x = torch.randn(1, 8, 6, generator=torch.Generator().manual_seed(2))
    trace = Trace()
    logits = network.forward(network.leaves(parameters), x, trace=trace)
    for number, layer in enumerate(network.layers):
        weight, bias = layer.weight.view(parameters)[0], layer.bias.view(parameters)[0]
        out = trace.inputs[number][0] @ weight.T + bias
        torch.testing.assert_close(trace.linear[number][0], out, **TOLERANCE)
    assert trace.linear[-1] is logits
    assert len(trace.pre_activations) == 2
    torch.testing.assert_close(trace.inputs[1], torch.relu(trace.pre_activations[0]))


def test_a_diverged_network_leaves_its_neighbours_alone():
    network = BatchedMlp(NetworkShape(6, (5,), 3, "sloped", "none"), [0.0, 0.0], CPU)
    parameters = network.initial_parameters(draws([0, 1]))
    x = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(3))
    expected = network.forward(network.leaves(parameters), x)[1].detach()
    parameters[0] = torch.nan
    assert torch.equal(network.forward(network.leaves(parameters), x)[1], expected)


@pytest.mark.parametrize("slopes", [(0.0,) * 3, (0.3,) * 3, (1.0,) * 3, (0.0, 0.3, 1.0)])
def test_at_a_kink_the_slope_is_that_below_whatever_stands_beside(slopes):
    network = BatchedMlp(NetworkShape(2, (1,), 2, "sloped", "none"), slopes, CPU)
    z = torch.zeros(3, 1, 1, requires_grad=True)
    (found,) = torch.autograd.grad(network.activate(z).sum(), z)
    for run, slope in enumerate(slopes):
        own = torch.zeros(1, requires_grad=True)
        (expected,) = torch.autograd.grad(nn.LeakyReLU(slope)(own).sum(), own)
        assert found[run].item() == expected.item()
