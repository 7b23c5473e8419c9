"""A group's training against a plain loop, its runs against themselves alone, resume and reset."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from small_streams import made_images, small_spec
from torch import Tensor, nn

from probe.continual.draws import generator_for
from probe.continual.training import GroupTrainer
from probe.errors import ConfigError
from probe.plan_continual import run_groups
from probe.result import RunRef
from probe.result_continual import RunTask
from probe.spec_continual import ContinualLearningSpec

CPU = torch.device("cpu")
# A few dozen Adam steps in fp32: rounding of 6e-8 a step, amplified where gradients are small.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def trainer_of(spec: ContinualLearningSpec, runs: Sequence[RunRef] | None = None) -> GroupTrainer:
    chosen = run_groups(spec)[0] if runs is None else runs
    return GroupTrainer(spec, chosen, made_images(), CPU)


def run_of(method: str = "plain", control: str = "vanilla", seed: int = 0) -> RunRef:
    return RunRef(method=method, control=control, seed=seed)


def plain_loop(trainer: GroupTrainer, weight_decay: float) -> tuple[Tensor, list[float]]:
    """Task 0 of the trainer's only run, out of torch.nn and torch.optim: parameters, losses."""
    network, stream = trainer.network, trainer.stream
    start = trainer.parameters[0]
    modules: list[nn.Module] = []
    for layer in network.layers:
        linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[0])
        linear.weight.data = layer.weight.view(start[None])[0].clone()
        linear.bias.data = layer.bias.view(start[None])[0].clone()
        modules += [linear, nn.ReLU()]
    net = nn.Sequential(*modules[:-1])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=weight_decay)
    labels = stream.task(0).labels[0]
    losses = []
    for epoch in range(2):
        order = stream.order(0, epoch)[0]
        for index in order.split(16):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(stream.inputs[index]), labels[index])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return torch.cat([p.detach().flatten() for p in net.parameters()]), losses


def test_a_task_is_that_of_a_plain_loop():
    method = {"name": "plain", "regularizers": [{"type": "l2", "strength": 0.1}]}
    trainer = trainer_of(small_spec(methods=[method]))
    parameters, losses = plain_loop(trainer, weight_decay=0.1)
    (result,) = trainer.train_task()
    torch.testing.assert_close(trainer.parameters[0], parameters, **TOLERANCE)
    sizes = [16, 16, 8] * 2
    assert result.loss == pytest.approx(np.average(losses, weights=sizes), rel=1e-5)
    assert trainer.steps_per_task == len(losses) == 6
    assert result.outcome == "finished"


def test_accuracies_are_counted_over_steps_and_over_all_images():
    trainer = trainer_of(small_spec())
    stream = trainer.stream
    (result,) = trainer.train_task()
    task = stream.task(0)
    everything = torch.arange(stream.num_images)[None]
    x, y = stream.batch(task, everything)
    logits = trainer.network.forward(trainer.network.leaves(trainer.parameters), x)[0]
    assert result.accuracy_end == pytest.approx((logits.argmax(1) == y[0]).float().mean().item())
    assert result.loss_end == pytest.approx(nn.functional.cross_entropy(logits, y[0]).item())
    windows = result.windows
    assert windows.last_step == [3, 6]
    assert result.accuracy == pytest.approx(np.mean(windows.runs["accuracy"]))


def values(task: RunTask) -> dict[str, float]:
    """All numbers of a task that a chart shows, by name."""
    found = {"accuracy": task.accuracy, "loss": task.loss, "loss_end": task.loss_end}
    for name, layers in task.windows.layers.items():
        for layer, rows in enumerate(layers):
            found |= {f"{name}.{layer}.{row}": value for row, value in enumerate(rows)}
    return {name: value for name, value in found.items() if value is not None}


def test_a_run_in_a_group_is_the_run_alone():
    methods = [
        {"name": "plain"},
        {"name": "leaky", "activation": "leaky_relu", "leak": 0.3, "learning_rate": 0.02},
        {
            "name": "w",
            "regularizers": [{"type": "wasserstein", "strength": 0.1, "reduction": "sum"}],
        },
    ]
    controls = [{"name": "vanilla"}, {"name": "cooled", "scheduler": {"min_effective_step": 0}}]
    spec = small_spec(methods=methods, controls=controls, seeds=[0, 5])
    (runs,) = run_groups(spec)
    group = trainer_of(spec)
    together = [group.train_task(), group.train_task()]
    for number, run in enumerate(runs):
        alone = trainer_of(spec, [run])
        for results in together:
            expected, found = values(alone.train_task()[0]), values(results[number])
            assert set(found) == set(expected)
            for name, value in found.items():
                # the volatility is a square of a difference of nearly equal numbers
                if "volatility" not in name and "bound" not in name and "residual" not in name:
                    assert value == pytest.approx(expected[name], rel=2e-3, abs=1e-4), (run, name)
        torch.testing.assert_close(group.parameters[number], alone.parameters[0], **TOLERANCE)


def test_a_resumed_group_goes_on_bit_for_bit():
    spec = small_spec(
        methods=[{"name": "plain", "normalization": "batch"}],
        controls=[
            {"name": "reset", "reset": "task"},
            {"name": "s", "scheduler": {"min_effective_step": 0}},
        ],
    )
    straight = trainer_of(spec)
    results = [straight.train_task() for _ in range(3)]
    first = trainer_of(spec)
    assert first.train_task() == results[0]
    state = {name: value.clone() for name, value in first.state().items()}
    for expected in (results[1], results[2]):
        resumed = trainer_of(spec)
        resumed.load(state)
        assert resumed.train_task() == expected
        state = {name: value.clone() for name, value in resumed.state().items()}
    assert torch.equal(resumed.parameters, straight.parameters)


def test_a_last_batch_of_one_image_is_refused_under_batch_normalisation():
    method = {"name": "plain", "normalization": "batch"}
    stream = small_spec().stream.model_copy(update={"batch_size": 3})
    spec = small_spec(methods=[method], stream=stream)
    with pytest.raises(ConfigError, match="40 images in batches of 3 leave a last batch of one"):
        trainer_of(spec)


def test_reset_at_task_begins_with_new_parameters_and_a_new_optimizer():
    controls = [{"name": "reset", "reset": "task"}, {"name": "vanilla"}]
    spec = small_spec(controls=controls)
    group = trainer_of(spec)
    group.train_task()
    found = group.train_task()

    twin = trainer_of(spec, [run_of()])
    twin.next_task = 1
    draws = [generator_for("parameters", 0, 1)]
    twin.parameters.copy_(twin.network.initial_parameters(draws))
    expected = twin.train_task()[0]
    assert found[0].loss == pytest.approx(expected.loss, rel=1e-5)
    assert found[1].loss != pytest.approx(expected.loss, rel=1e-3)
    assert group.optimizer.num_steps.tolist() == [6, 12]


def test_wasserstein_of_a_reset_run_is_to_its_own_new_start():
    method = {
        "name": "plain",
        "regularizers": [{"type": "wasserstein", "strength": 1.0, "reduction": "sum"}],
    }
    spec = small_spec(methods=[method], controls=[{"name": "reset", "reset": "task"}])
    group = trainer_of(spec)
    group.train_task()
    found = group.train_task()
    resumed = trainer_of(spec)
    first = trainer_of(spec)
    first.train_task()
    resumed.load(first.state())
    assert resumed.train_task() == found


def test_only_runs_with_a_scheduler_change_their_rates():
    controls = [
        {"name": "vanilla"},
        {"name": "hot", "scheduler": {"min_effective_step": 0, "safety": 0.999999}},
    ]
    group = trainer_of(small_spec(controls=controls))
    group.train_task()
    rates = group.optimizer.learning_rate
    assert torch.equal(rates[0], torch.full((3,), 0.01))
    # every bound is a millionth of itself: each of the three decisions cools every layer that has
    # a bound; (t + 1) % 2 == 0 at steps 1, 3 and 5
    torch.testing.assert_close(rates[1], torch.full((3,), 0.01 * 0.99**3))


@pytest.mark.parametrize(("warm_until", "is_warmed"), [(0.5, False), (0.51, True)])
def test_a_scheduler_counts_the_step_about_to_be_taken(warm_until, is_warmed):
    # 18 steps, a decision at the 9th: at half of them. The first volatility is 0, which lets warm.
    scheduler = {"signal": "curvature", "warm_until": warm_until, "min_effective_step": 1e9}
    controls = [{"name": "scheduler", "scheduler": scheduler}]
    signals = {"log_every": 9, "control_every": 9}
    trainer = trainer_of(small_spec(controls=controls, signals=signals))
    for _ in range(3):
        trainer.train_task()
    assert bool((trainer.optimizer.learning_rate > 0.0100001).all()) == is_warmed


def test_a_diverged_run_is_told_and_its_neighbour_goes_on():
    methods = [{"name": "plain"}, {"name": "wild", "learning_rate": 10.0}]
    spec = small_spec(
        methods=methods,
        optimizer={"name": "sgd", "learning_rate": 0.01},
        stream=small_spec().stream.model_dump() | {"epochs": 40},
    )
    group = trainer_of(spec)
    group.parameters[1] *= 1e18  # the next loss is beyond fp32
    good, wild = group.train_task()
    assert wild.outcome == "diverged"
    assert wild.accuracy is None
    alone = trainer_of(spec, [run_of()])
    assert good.loss == pytest.approx(alone.train_task()[0].loss, rel=1e-4)


def test_log_and_control_intervals_are_apart():
    signals = {"log_every": 3, "control_every": 2, "windows_per_task": 1, "rank_samples": 8}
    seen: list[Tensor] = []
    spec = small_spec(
        signals=signals,
        controls=[{"name": "hot", "scheduler": {"min_effective_step": 0, "safety": 0.999999}}],
    )
    group = trainer_of(spec)
    measure = group.tracker.measure

    def counted(*arguments):
        found = measure(*arguments)
        seen.append(group.optimizer.learning_rate.clone())
        return found

    group.tracker.measure = counted
    group.train_task()
    # before steps 2, 3, 4 and 6 of the six; decided at 2, 4 and 6, where rates are those before
    assert [round(float(rates[0, 0]) / 0.01, 4) for rates in seen] == [1, 0.99, 0.99, 0.9801]
    torch.testing.assert_close(group.optimizer.learning_rate, torch.full((1, 3), 0.01 * 0.99**3))


def test_what_a_step_writes_can_be_put_back():
    """What the warm-up of a recorded step relies on, here without a GPU."""
    methods = [
        {
            "name": "plain",
            "normalization": "batch",
            "regularizers": [{"type": "wasserstein", "strength": 0.1}],
        }
    ]
    group = trainer_of(small_spec(methods=methods))
    index = group.stream.order(0, 0)[:, :16]
    group._step(index)
    kept = [tensor.clone() for tensor in group._written()]
    group._step(index)
    once = [tensor.clone() for tensor in group._written()]
    for tensor, before in zip(group._written(), kept, strict=True):
        tensor.copy_(before)
    group._step(index)
    assert all(torch.equal(a, b) for a, b in zip(group._written(), once, strict=True))
    assert not torch.equal(kept[0], once[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_steps_are_the_steps_themselves():
    methods = [
        {"name": "plain", "regularizers": [{"type": "l2", "strength": 0.01}]},
        {
            "name": "w",
            "regularizers": [{"type": "wasserstein", "strength": 0.1, "reduction": "sum"}],
        },
    ]
    controls = [{"name": "reset", "reset": "task"}, {"name": "s", "scheduler": {}}]
    spec = small_spec(methods=methods, controls=controls)
    (runs,) = run_groups(spec)
    recorded, plain = (
        GroupTrainer(spec, runs, made_images(), torch.device("cuda")) for _ in range(2)
    )
    plain._advance = plain._step
    for _ in range(3):
        for found, expected in zip(recorded.train_task(), plain.train_task(), strict=True):
            assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    torch.testing.assert_close(recorded.parameters, plain.parameters, **TOLERANCE)
