"""Flat optimizers against torch.optim: the same steps, network by network and layer by layer."""

import pytest
import torch

from probe.continual.flat_optimizer import FlatOptimizer, initial_learning_rates
from probe.spec_continual import Adam, PlainSgd

LAYERS = [(0, 3), (3, 5)]
RATES = torch.tensor([[0.1, 0.01], [0.2, 0.3]])


def gradients(num_steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_steps, 2, 5, generator=generator)


@pytest.mark.parametrize(
    ("options", "stock"),
    [
        (
            Adam(betas=(0.8, 0.95), eps=1e-3),
            lambda groups: torch.optim.Adam(groups, betas=(0.8, 0.95), eps=1e-3),
        ),
        (PlainSgd(name="sgd"), torch.optim.SGD),
    ],
)
def test_steps_are_those_of_torch(options, stock):
    start = torch.arange(10, dtype=torch.float32).view(2, 5)
    own = start.clone()
    optimizer = FlatOptimizer(options, RATES, LAYERS)
    twins = [
        [torch.nn.Parameter(start[run, :3].clone()), torch.nn.Parameter(start[run, 3:].clone())]
        for run in range(2)
    ]
    stocks = [
        stock([{"params": [p], "lr": RATES[run, k].item()} for k, p in enumerate(twins[run])])
        for run in range(2)
    ]
    for gradient in gradients(20):
        optimizer.step(own, gradient.clone())
        for run in range(2):
            twins[run][0].grad, twins[run][1].grad = gradient[run, :3], gradient[run, 3:]
            stocks[run].step()
    for run in range(2):
        # 20 steps, each rounded a few times in fp32
        torch.testing.assert_close(own[run], torch.cat(twins[run]), rtol=1e-5, atol=1e-5)


def test_a_new_learning_rate_holds_from_the_next_step_on():
    own = torch.zeros(2, 5)
    optimizer = FlatOptimizer(PlainSgd(name="sgd"), RATES, LAYERS)
    optimizer.set_learning_rate(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    optimizer.step(own, torch.ones(2, 5))
    assert own.tolist() == [[-1, -1, -1, -2, -2], [-3, -3, -3, -4, -4]]


def test_a_reset_network_is_as_new_and_the_others_go_on():
    optimizer = FlatOptimizer(Adam(), RATES, LAYERS)
    fresh = FlatOptimizer(Adam(), RATES, LAYERS)
    own = torch.zeros(2, 5)
    for gradient in gradients(3):
        optimizer.step(own, gradient.clone())
    before = optimizer.exp_avg_sq[1].clone()
    optimizer.reset(torch.tensor([True, False]))
    assert optimizer.num_steps.tolist() == [0, 3]
    assert torch.equal(optimizer.exp_avg_sq[1], before)
    a, b = torch.zeros(2, 5), torch.zeros(2, 5)
    gradient = gradients(1)[0]
    optimizer.step(a, gradient.clone())
    fresh.step(b, gradient)
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[1], b[1])


def test_a_saved_optimizer_goes_on_bit_for_bit():
    one, other = (FlatOptimizer(Adam(), RATES, LAYERS) for _ in range(2))
    own = torch.zeros(2, 5)
    first, second = gradients(2)
    one.step(own, first)
    one.set_learning_rate(RATES * 0.5)
    copy = own.clone()
    other.load({name: value.clone() for name, value in one.state().items()})
    one.step(own, second.clone())
    other.step(copy, second)
    assert torch.equal(own, copy)


def test_every_layer_begins_with_the_networks_rate():
    rates = initial_learning_rates([0.1, 0.2], 3, torch.device("cpu"))
    assert torch.equal(rates, torch.tensor([[0.1] * 3, [0.2] * 3]))
