"""Continual learning, ours beside a straightforward PyTorch loop: training, and its diagnostics.

The loop is what one writes first: `nn.Sequential`, `torch.optim.Adam`, a batch index per step; and
every 40 steps the diagnostics as arXiv:2509.19698 describes them (appendix C.1): the per-sample
gradient variance by a loop over the batch's losses, the top Hessian eigenvalue of every layer by
100 power iterations with Hessian-vector products, each a call that makes the gradient anew, as
`torch.autograd.functional.hvp` does; a loop that keeps the gradient's graph for all products is
measured beside it. Network and batch are the paper's,
784-256-256-10 and 256 images, on made images, so that no file is needed. Ours measures more at the
same interval: all signals of `probe.result_continual`, also of the whole network, and the Hessian
rank.

Both sides take turns, so other load meets them alike; a row is the median of its rounds. On CUDA
also the 27 runs of figure 4 (3 methods x 3 controls x 3 seeds), all with their diagnostics, against
27 times the loop's plain ReLU network: what 27 loops in turn would take is extrapolated from the
steps measured of one.

    python benchmarks/continual.py [--quick] [--device cuda] [--threads 2]

Ends with RESULT lines; exits 1 when one is short of its target.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from probe.continual.datasets import Images
from probe.continual.training import GroupTrainer
from probe.plan_continual import run_groups
from probe.spec_continual import ContinualLearningSpec

NUM_IMAGES, NUM_FEATURES, NUM_CLASSES, WIDTH, BATCH = 2560, 784, 10, 256, 256
STEPS_PER_EPOCH = NUM_IMAGES // BATCH
INTERVAL = 40  # steps between two measurements: the paper's
POWER_ITERATIONS = 100  # the paper's
NEVER = 10**9
TARGET_TRAINING, TARGET_WHOLE, TARGET_BATCHED = 1.0, 6.0, 200.0


def made_images() -> Images:
    """Random inputs of MNIST's size: cost does not depend on what they show."""
    draws = np.random.default_rng(0)
    inputs = draws.random((NUM_IMAGES, NUM_FEATURES), dtype=np.float32)
    labels = draws.integers(NUM_CLASSES, size=NUM_IMAGES)
    return Images(inputs, labels, NUM_CLASSES, sha256="made", name="made images")


class Loop:
    """One run as one would write it first.

    Args:
        images: The data.
        device: Where to train.
        keeps_graph: Of the gradient, for all products of an iteration with the Hessian; else each
            product makes it anew, as `torch.autograd.functional.hvp` does.
    """

    def __init__(self, images: Images, device: torch.device, *, keeps_graph: bool = False) -> None:
        self._keeps_graph = keeps_graph
        torch.manual_seed(0)
        inputs = torch.from_numpy(images.inputs)
        self._inputs = ((inputs - inputs.mean()) / inputs.std()).to(device)
        self._labels = torch.randint(NUM_CLASSES, (NUM_IMAGES,)).to(device)
        self._device = device
        self._network = nn.Sequential(
            nn.Linear(NUM_FEATURES, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, NUM_CLASSES),
        ).to(device)
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=1e-3)
        self._layers = [list(m.parameters()) for m in self._network if isinstance(m, nn.Linear)]
        self.num_correct = torch.zeros((), device=device)

    def train(self, num_epochs: int, *, with_diagnostics: bool) -> int:
        """Returns the steps taken."""
        num_steps = 0
        for _ in range(num_epochs):
            order = torch.randperm(NUM_IMAGES, device=self._device)
            for index in order.split(BATCH):
                x, y = self._inputs[index], self._labels[index]
                num_steps += 1
                if with_diagnostics and num_steps % INTERVAL == 0:
                    self.gradient_variance(x, y)
                    self.sharpness(x, y)
                self._optimizer.zero_grad()
                logits = self._network(x)
                F.cross_entropy(logits, y).backward()
                self._optimizer.step()
                self.num_correct += (logits.argmax(dim=1) == y).sum()
        return num_steps

    def gradient_variance(self, x: Tensor, y: Tensor) -> list[float]:
        """Per layer, mean over the batch of |g_i - g|^2: a backward pass per sample."""
        sums = [[torch.zeros_like(p) for p in layer] for layer in self._layers]
        squares = torch.zeros(len(self._layers), device=self._device)
        for i in range(len(x)):
            self._optimizer.zero_grad()
            F.cross_entropy(self._network(x[i : i + 1]), y[i : i + 1]).backward()
            for number, layer in enumerate(self._layers):
                for total, parameter in zip(sums[number], layer, strict=True):
                    assert parameter.grad is not None
                    total += parameter.grad
                    squares[number] += parameter.grad.square().sum()
        means = torch.stack([_norm_squared([t / len(x) for t in layer]) for layer in sums])
        return (squares / len(x) - means).tolist()

    def sharpness(self, x: Tensor, y: Tensor) -> list[float]:
        """Per layer, the top eigenvalue of its block of the Hessian."""
        return [self._top_eigenvalue(layer, x, y) for layer in self._layers]

    def _gradient(self, layer: list[nn.Parameter], x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(self._network(x), y)
        return torch.autograd.grad(loss, layer, create_graph=True)

    def _top_eigenvalue(self, layer: list[nn.Parameter], x: Tensor, y: Tensor) -> float:
        gradient = self._gradient(layer, x, y)
        vector = [torch.randn_like(p) for p in layer]
        eigenvalue = torch.zeros((), device=self._device)
        for _ in range(POWER_ITERATIONS):
            norm = _norm_squared(vector).sqrt()
            vector = [v / norm for v in vector]
            if not self._keeps_graph:
                gradient = self._gradient(layer, x, y)
            product = torch.autograd.grad(gradient, layer, vector, retain_graph=True)
            eigenvalue = torch.stack(
                [(v * p).sum() for v, p in zip(vector, product, strict=True)]
            ).sum()
            vector = list(product)
        return eigenvalue.item()


def _norm_squared(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.square().sum() for t in tensors]).sum()


def make_spec(num_epochs: int, interval: int, **changes: Any) -> ContinualLearningSpec:
    """Our side: the same network, batch and optimizer, one ReLU run unless changed."""
    return ContinualLearningSpec.model_validate(
        {
            "kind": "continual_learning",
            "name": "benchmark",
            "stream": {
                "type": "random_labels",
                "data": {"type": "packaged", "name": "digits"},  # made images take its place
                "num_tasks": 1000,
                "epochs": num_epochs,
                "batch_size": BATCH,
            },
            "methods": [{"name": "relu"}],
            "seeds": [0],
            "signals": {"log_every": interval, "control_every": interval},
            **changes,
        }
    )


# The 27 runs of figure 4, as in configs/continual/fig4.yaml.
FIGURE_4: dict[str, Any] = {
    "methods": [
        {"name": "crelu", "activation": "crelu"},
        {"name": "l2", "regularizers": [{"type": "l2", "strength": 1e-3}]},
        {"name": "wasserstein", "regularizers": [{"type": "wasserstein", "strength": 1e-3}]},
    ],
    "controls": [
        {"name": "vanilla"},
        {"name": "reset", "reset": "task"},
        {"name": "scheduler", "scheduler": {}},
    ],
    "seeds": [0, 1, 2],
}


class Ours:
    """All groups of a job; `train` takes every one of them through a task."""

    def __init__(self, spec: ContinualLearningSpec, images: Images, device: torch.device) -> None:
        self.trainers = [GroupTrainer(spec, runs, images, device) for runs in run_groups(spec)]
        self.num_runs = sum(len(trainer.runs) for trainer in self.trainers)

    def train(self) -> int:
        """Returns the steps of one run."""
        for trainer in self.trainers:
            trainer.train_task()
        return self.trainers[0].steps_per_task


Side = Callable[[], int]


def measured(sides: dict[str, Side], num_rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds per step of every side: the median of rounds in turns, after one of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(num_rounds + 1):
        for name, side in sides.items():
            _wait(device)
            started = time.perf_counter()
            num_steps = side()
            _wait(device)
            if number:
                seconds[name].append((time.perf_counter() - started) / num_steps)
    for name, values in seconds.items():
        shown = "  ".join(f"{1 / value:8.1f}" for value in values)
        print(f"  {name:<28} steps/s by round: {shown}")
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def result_line(name: str, value: float, baseline: float, target: float | None = None) -> bool:
    """Prints a row; True unless its ratio is below the target."""
    ratio = value / baseline
    ok = target is None or ratio >= target
    end = "" if target is None else f" target={target:g} {'ok' if ok else 'short'}"
    print(f"RESULT {name} value={value:.4g} baseline={baseline:.4g} ratio={ratio:.3f}{end}")
    return ok


def compare_training(images: Images, device: torch.device, quick: bool) -> list[bool]:
    """Training alone: one run, and several as one model; steps/s of all runs together."""
    num_epochs = 10 if quick else 40
    loop = Loop(images, device)
    sides: dict[str, Side] = {
        "loop": lambda: loop.train(num_epochs, with_diagnostics=False),
    }
    for number in (1, 3, 9):
        ours = Ours(make_spec(num_epochs, NEVER, seeds=list(range(number))), images, device)
        sides[f"ours, {number} runs"] = ours.train
    print(f"\ntraining alone, {num_epochs * STEPS_PER_EPOCH} steps a round")
    found = measured(sides, 3 if quick else 5, device)
    base = 1 / found["loop"]
    return [
        result_line("training_alone_over_loop", 1 / found["ours, 1 runs"], base, TARGET_TRAINING),
        result_line("training_alone_3_runs_over_loop", 3 / found["ours, 3 runs"], base),
        result_line("training_alone_9_runs_over_loop", 9 / found["ours, 9 runs"], base),
    ]


def compare_whole(images: Images, device: torch.device, quick: bool) -> list[bool]:
    """Training with its diagnostics every 40 steps; one run."""
    num_epochs = 8 if quick else 20
    loop, frugal = Loop(images, device), Loop(images, device, keeps_graph=True)
    ours = Ours(make_spec(num_epochs, INTERVAL), images, device)
    print(
        f"\nwith diagnostics every {INTERVAL} steps, {num_epochs * STEPS_PER_EPOCH} steps a round"
    )
    sides: dict[str, Side] = {
        "loop": lambda: loop.train(num_epochs, with_diagnostics=True),
        "loop that keeps the graph": lambda: frugal.train(num_epochs, with_diagnostics=True),
        "ours, 1 runs": ours.train,
    }
    found = measured(sides, 2 if quick else 3, device)
    value, baseline = 1 / found["ours, 1 runs"], 1 / found["loop"]
    kept = 1 / found["loop that keeps the graph"]
    return [
        result_line("whole_with_diagnostics_over_loop", value, baseline, TARGET_WHOLE),
        result_line("whole_over_loop_that_keeps_the_graph", value, kept),
    ]


def compare_figure_4(images: Images, device: torch.device, quick: bool) -> list[bool]:
    """27 runs as the job trains them against 27 loops in turn; rows are steps/s of all 27."""
    num_epochs = 8 if quick else 20
    loop, ours = (
        Loop(images, device),
        Ours(make_spec(num_epochs, INTERVAL, **FIGURE_4), images, device),
    )
    print(f"\n{ours.num_runs} runs of figure 4, {num_epochs * STEPS_PER_EPOCH} steps a round")
    sides: dict[str, Side] = {
        "loop, one run": lambda: loop.train(num_epochs, with_diagnostics=True),
        f"ours, {ours.num_runs} runs": ours.train,
    }
    found = measured(sides, 2 if quick else 3, device)
    in_turn = ours.num_runs * found["loop, one run"]
    print(f"  the loops in turn, extrapolated: {in_turn:.4f} s for one step of every run")
    value = 1 / found[f"ours, {ours.num_runs} runs"]
    return [result_line("batched_27_over_in_turn", value, 1 / in_turn, TARGET_BATCHED)]


def show_agreement(images: Images, device: torch.device) -> None:
    """The same three runs as one model and one by one: largest relative differences, no target."""
    num_epochs, seeds = 20, [0, 1, 2]
    together = Ours(make_spec(num_epochs, NEVER, seeds=seeds), images, device).trainers[0]
    accuracies = [task.accuracy or 0.0 for task in together.train_task()]
    gaps, accuracy_gaps = [], []
    for row, seed in enumerate(seeds):
        alone = Ours(make_spec(num_epochs, NEVER, seeds=[seed]), images, device).trainers[0]
        (task,) = alone.train_task()
        accuracy_gaps.append(abs(accuracies[row] / (task.accuracy or 1.0) - 1.0))
        difference = together.parameters[row] - alone.parameters[0]
        gaps.append((difference.norm() / alone.parameters[0].norm()).item())
    num_steps = num_epochs * STEPS_PER_EPOCH
    print(f"\nbatched and single runs after {num_steps} steps, largest relative difference")
    print(f"RESULT agreement_of_parameters value={max(gaps):.3g}")
    print(f"RESULT agreement_of_accuracy value={max(accuracy_gaps):.3g}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads on a CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sys.stdout.reconfigure(line_buffering=True)
    has_gpu = torch.cuda.is_available()
    name = ("cuda" if has_gpu else "cpu") if arguments.device == "auto" else arguments.device
    device = torch.device(name)
    hardware = (
        torch.cuda.get_device_name(device) if name == "cuda" else f"{arguments.threads} threads"
    )
    print(f"{name}: {hardware}; {NUM_FEATURES}-{WIDTH}-{WIDTH}-{NUM_CLASSES}, batch {BATCH}")
    images = made_images()
    rows = compare_training(images, device, arguments.quick)
    rows += compare_whole(images, device, arguments.quick)
    if name == "cuda":
        rows += compare_figure_4(images, device, arguments.quick)
    show_agreement(images, device)
    return 0 if all(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
