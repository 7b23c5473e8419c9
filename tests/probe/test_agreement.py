"""Two gloo ranks agree on every float, and failures reach both."""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from probe import critical_sharpness
from probe.agreement import Agreement
from probe.errors import ConfigError

OnTwoRanks = Callable[[Callable[[int], Any]], list[Any]]

# Unequal shares, so that a mean of rank means is not the mean of all.
SHARES = (slice(0, 10), slice(10, 16))


def _problem() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double(), x, y


def _sum_of_squares(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return ((model(x) - y) ** 2).sum()


def _with_union_gradient() -> tuple[nn.Module, torch.optim.Optimizer, Tensor, Tensor]:
    model, x, y = _problem()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    (_sum_of_squares(model, x, y) / 16).backward()
    return model, optimizer, x, y


def _fields(found: Any) -> dict[str, Any]:
    names = ("outcome", "eta_lower", "eta_upper", "loss_at_zero", "slope", "num_forward_passes")
    return {**{name: getattr(found, name) for name in names}, "trials": list(found.trials)}


def _measure_share(rank: int) -> Any:
    model, optimizer, x, y = _with_union_gradient()
    x, y = x[SHARES[rank]], y[SHARES[rank]]
    calls: list[int] = []

    def loss_fn() -> tuple[Tensor, int]:
        calls.append(1)
        return _sum_of_squares(model, x, y), len(x)

    found = critical_sharpness(model, loss_fn, optimizer=optimizer)
    at_zero = (_sum_of_squares(model, x, y), len(x))
    given = critical_sharpness(model, loss_fn, optimizer=optimizer, loss_at_zero=at_zero)
    return [_fields(found), _fields(given), len(calls)]


def _measure_mean_with_ddp(rank: int) -> Any:
    """Equal shares, means returned, gradients reduced by DistributedDataParallel."""
    model, x, y = _problem()
    ddp = nn.parallel.DistributedDataParallel(model)
    x, y = x[8 * rank : 8 * rank + 8], y[8 * rank : 8 * rank + 8]
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    loss = _sum_of_squares(ddp, x, y) / 8
    loss.backward()
    found = critical_sharpness(ddp, lambda: _sum_of_squares(ddp, x, y) / 8, optimizer=optimizer)
    given = critical_sharpness(
        ddp, lambda: _sum_of_squares(ddp, x, y) / 8, optimizer=optimizer, loss_at_zero=loss
    )
    optimizer.zero_grad()
    (_sum_of_squares(ddp, x, y) / 8).backward()  # DDP still reduces after a probe
    grads = [p.grad.flatten().tolist() for p in ddp.parameters() if p.grad is not None]
    return [_fields(found), _fields(given), grads]


def _collect_errors(rank: int) -> Any:
    """What each rank raises when rank 1 alone is at fault, and that a later call works."""
    model, optimizer, x, y = _with_union_gradient()

    def raised(call: Callable[[], object]) -> str:
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    def broken_loss() -> float:
        if rank == 1:
            raise ZeroDivisionError("on rank 1")
        return 1.0

    def mixed_forms() -> object:
        return 1.0 if rank == 0 else (1.0, 1)

    def local_gradient() -> object:
        optimizer.zero_grad()
        _sum_of_squares(model, x[SHARES[rank]], y[SHARES[rank]]).backward()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        return critical_sharpness(model, lambda: 1.0, optimizer=sgd)

    def no_gradient_on_one() -> object:
        optimizer.zero_grad()
        if rank == 0:
            _sum_of_squares(model, x, y).backward()
        return critical_sharpness(model, lambda: 1.0, optimizer=optimizer)

    measure = [
        lambda: critical_sharpness(model, broken_loss, optimizer=optimizer),
        lambda: critical_sharpness(model, mixed_forms, optimizer=optimizer),
        local_gradient,
        no_gradient_on_one,
    ]
    after = Agreement().mean_loss(lambda: (1.0, 4 * rank))  # a rank without tokens is fine
    return [*(raised(call) for call in measure), after]


JOBS: tuple[Callable[[int], Any], ...] = (_measure_share, _measure_mean_with_ddp, _collect_errors)


def _run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results = {job.__name__: job(rank) for job in JOBS}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)  # gloo's threads can abort the process while Python shuts down


@pytest.fixture(scope="module")
def on_two_ranks(
    tmp_path_factory: pytest.TempPathFactory,
) -> OnTwoRanks:
    """What a job returned on each rank; one pair of processes runs all jobs."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_run_rank, args=(str(folder),), nprocs=2)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return lambda job: [results[job.__name__] for results in ranks]


@pytest.mark.distributed
def test_sums_and_counts_equal_one_process_on_the_union(on_two_ranks: OnTwoRanks) -> None:
    first, second = on_two_ranks(_measure_share)
    assert first == second
    found, given, num_calls = first
    assert num_calls == found["num_forward_passes"] + given["num_forward_passes"]
    assert given["num_forward_passes"] == found["num_forward_passes"] - 1
    model, optimizer, x, y = _with_union_gradient()
    alone = critical_sharpness(
        model, lambda: (_sum_of_squares(model, x, y), 16), optimizer=optimizer
    )
    expected = json.loads(json.dumps(_fields(alone)))
    assert found["outcome"] == expected["outcome"] == "converged"
    assert found["num_forward_passes"] == expected["num_forward_passes"]
    for name in ("eta_lower", "eta_upper", "loss_at_zero", "slope"):
        # 16 fp64 squares summed in another order, then interpolated.
        assert found[name] == pytest.approx(expected[name], rel=1e-10)


@pytest.mark.distributed
def test_ddp_means_equal_one_process_and_training_goes_on(on_two_ranks: OnTwoRanks) -> None:
    first, second = on_two_ranks(_measure_mean_with_ddp)
    assert first == second  # the gradients after the probe too: DDP's hooks are still there
    found, given, grads = first
    model, optimizer, x, y = _with_union_gradient()
    alone = critical_sharpness(
        model, lambda: _sum_of_squares(model, x, y) / 16, optimizer=optimizer
    )
    assert found["eta_upper"] == pytest.approx(alone.eta_upper, rel=1e-10)
    assert found["slope"] == pytest.approx(alone.slope, rel=1e-10)
    assert given["eta_upper"] == pytest.approx(found["eta_upper"], rel=1e-10)
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert grad == pytest.approx(parameter.grad.flatten().tolist(), rel=1e-10, abs=1e-14)


@pytest.mark.distributed
def test_a_fault_on_one_rank_is_raised_on_all(on_two_ranks: OnTwoRanks) -> None:
    first, second = on_two_ranks(_collect_errors)
    assert first[0].startswith("ParallelismError: the measurement failed on rank [1]")
    assert second[0] == "ZeroDivisionError: on rank 1"
    for errors in (first, second):
        assert errors[1].startswith("ParallelismError: loss_fn returned a mean on some")
        assert errors[2].startswith("DirectionError: ranks 0 and 1 would move differently")
        assert errors[4] == 0.5
    assert first[3].startswith("ParallelismError: the measurement failed on rank [1]")
    assert second[3].startswith("DirectionError: no parameter of the optimizer has a gradient")


def test_one_process_needs_no_process_group() -> None:
    agreement = Agreement()
    assert agreement.num_ranks == 1
    assert agreement.mean_loss(lambda: (6.0, 4)) == 1.5
    assert agreement.same_direction(1.0, None) is None
    with pytest.raises(ConfigError):
        agreement.mean_loss(lambda: torch.ones(2))
    assert agreement.together(lambda: 7) == 7
