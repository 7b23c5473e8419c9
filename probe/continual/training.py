"""Train a group of runs, task after task, as one batched model.

A step is a dozen tensor operations whatever the number of runs; signals are measured at an
interval, and a scheduler decides on them. Nothing here knows of jobs or files.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from probe.continual.course import TaskCourse
from probe.continual.datasets import Images
from probe.continual.draws import generator_for
from probe.continual.flat_optimizer import FlatOptimizer, initial_learning_rates
from probe.continual.networks import BatchedMlp, NetworkShape, batch_losses
from probe.continual.recorded_steps import RecordedSteps
from probe.continual.regularizers import Term, terms_of
from probe.continual.scheduler import SchedulerGroup
from probe.continual.signals import SignalTracker
from probe.continual.streams import Task, TaskStream
from probe.errors import ConfigError
from probe.plan_continual import EVALUATION_IMAGES, activation_family
from probe.result import RunRef
from probe.result_continual import RunTask
from probe.spec_continual import ContinualLearningSpec, Method

OnStep = Callable[[int], None]


class GroupTrainer:
    """Runs of one shape, from their initial parameters on.

    Args:
        spec: The job.
        runs: Of one shape (`probe.plan_continual.run_groups`), at least one.
        images: The whole data set; the stream takes its choice of it.
        device: Where to train.

    Attributes:
        next_task: The task `train_task` will train, from 0.
        steps_per_task: Gradient steps of a task.

    Raises:
        ConfigError: The stream asks for more images than there are, or its last batch holds one
            image and a method normalises over batches.
    """

    def __init__(
        self,
        spec: ContinualLearningSpec,
        runs: Sequence[RunRef],
        images: Images,
        device: torch.device,
    ) -> None:
        self.spec, self.runs, self._device = spec, list(runs), device
        methods = [spec.method(run.method) for run in runs]
        controls = [spec.control(run.control) for run in runs]
        self.stream = TaskStream(spec.stream, images, [run.seed for run in runs], device)
        fault = spec.fault_of_last_batch(self.stream.num_images)
        if fault is not None:
            raise ConfigError(fault)
        self._epochs = spec.epochs_of(controls[0])
        self.steps_per_task = self._epochs * self.stream.num_batches
        shape = NetworkShape(
            self.stream.num_features,
            tuple(spec.model.hidden),
            images.num_classes,
            activation_family(methods[0]),
            methods[0].normalization,
        )
        self.network = BatchedMlp(shape, [_slope(method) for method in methods], device)
        self._initial = self._drawn_parameters(0)
        self.parameters = self._initial.clone()
        rates = [method.learning_rate or spec.optimizer.learning_rate for method in methods]
        self._rates = initial_learning_rates(rates, len(self.network.layers), device)
        self.optimizer = FlatOptimizer(spec.optimizer, self._rates, self.network.columns)
        places = [place for layer in self.network.layers for place in layer.places]
        self._terms: list[Term] = terms_of(methods, places, self._initial)
        self._scheduler = SchedulerGroup(
            [control.scheduler for control in controls],
            self.steps_per_task * spec.stream.num_tasks,
            device,
        )
        self._is_reset = torch.tensor([c.reset == "task" for c in controls], device=device)
        self.tracker = SignalTracker(
            self.network, spec.signals, spec.optimizer, self._power_draws(0)
        )
        self._leaves = self.network.leaves(self.parameters)
        self._gradient = torch.empty_like(self.parameters)
        self._sums = torch.zeros(2, len(runs), dtype=torch.float64, device=device)
        task = self.stream.task(0)
        permutation = None if task.permutation is None else task.permutation.clone()
        self._task = Task(0, task.labels.clone(), permutation)  # buffers of the task in hand
        self._advance: Callable[[Tensor], None] = self._step
        if device.type == "cuda":
            self._advance = RecordedSteps(self._step, self._written)
        self.next_task = 0

    def train_task(self, on_step: OnStep | None = None) -> list[RunTask]:
        """Train the next task to its end.

        Args:
            on_step: Called after every window with the steps of this task so far.

        Returns:
            One result per run, in their order.

        Cost: `steps_per_task` steps; a measurement every `signals.log_every` of them; one
        evaluation of all images.
        """
        self._begin_task()
        signals = self.spec.signals
        course = TaskCourse(
            self.next_task,
            self.steps_per_task,
            signals.windows_per_task,
            len(self.runs),
            len(self.network.layers),
            self._sums,
        )
        done = 0
        for epoch in range(self._epochs):
            order = self.stream.order(self.next_task, epoch)
            for index in torch.split(order, self.spec.stream.batch_size, dim=1):
                self._measure(course, index, self.next_task * self.steps_per_task + done + 1)
                self._advance(index)
                course.count_step(index.shape[1])
                done += 1
                if done == course.next_end:
                    course.end_window()
                    if on_step is not None:
                        on_step(done)
        self.next_task += 1
        return course.results(self._evaluate())

    def _step(self, index: Tensor) -> None:
        """One gradient step of every run on its images `index` (R, B).

        Only tensors that keep their place are read and written, and nothing waits for the device:
        on a GPU the whole is recorded once and replayed.
        """
        x, y = self.stream.batch(self._task, index)
        logits = self.network.forward(self._leaves, x, update_running=True)
        losses = batch_losses(logits, y)
        gradients = torch.autograd.grad(losses.sum(), self._leaves)
        torch.cat([g.flatten(1) for g in gradients], dim=1, out=self._gradient)
        with torch.no_grad():
            for term in self._terms:
                term.add_gradient(self._gradient, self.parameters)
            self.optimizer.step(self.parameters, self._gradient)
            self._sums[0] += (logits.argmax(dim=2) == y).sum(dim=1)
            self._sums[1] += losses.detach().double() * index.shape[1]

    def _written(self) -> list[Tensor]:
        """Every tensor a step writes."""
        state = self.optimizer.state()
        moments = [state[name] for name in ("num_steps", "exp_avg", "exp_avg_sq")]
        return [self.parameters, self._sums, *moments, *self.network.running]

    def _begin_task(self) -> None:
        """Take up the next task; start anew those runs that are reset at a task."""
        task = self.stream.task(self.next_task)
        self._task.labels.copy_(task.labels)
        if self._task.permutation is not None and task.permutation is not None:
            self._task.permutation.copy_(task.permutation)
        if self.next_task == 0 or not bool(self._is_reset.any()):
            return
        fresh = self._drawn_parameters(self.next_task)
        rows = self._is_reset.unsqueeze(1)
        self._initial = torch.where(rows, fresh, self._initial)
        self.parameters.copy_(torch.where(rows, fresh, self.parameters))
        for term in self._terms:
            term.start_from(self._initial)
        self.network.reset_running(self._is_reset)
        self.optimizer.reset(self._is_reset)
        self.optimizer.set_learning_rate(
            torch.where(rows, self._rates, self.optimizer.learning_rate)
        )
        self.tracker.reset(self._is_reset, self._power_draws(self.next_task))

    def _measure(self, course: TaskCourse, index: Tensor, step: int) -> None:
        """Measure, and let the schedulers decide, if that is due just before this step (from 1)."""
        signals = self.spec.signals
        is_logged = step % signals.log_every == 0
        is_controlled = step % signals.control_every == 0
        if not (is_logged or is_controlled):
            return
        x, y = self.stream.batch(self._task, index)
        measurement = self.tracker.measure(self.network, self.parameters, x, y, self.optimizer)
        course.add_measurement(measurement)
        if is_controlled and self._scheduler.is_any:
            rates = self._scheduler.decide(self.optimizer.learning_rate, measurement.layers, step)
            self.optimizer.set_learning_rate(rates)

    @torch.no_grad()
    def _evaluate(self) -> list[tuple[float, float]]:
        """(accuracy, loss in nats) of every run over all images of the task."""
        sums = torch.zeros(2, len(self.runs), dtype=torch.float64, device=self._device)
        everything = torch.arange(self.stream.num_images, device=self._device)
        rows = everything.expand(len(self.runs), -1)
        for index in torch.split(rows, EVALUATION_IMAGES, dim=1):
            x, y = self.stream.batch(self._task, index)
            logits = self.network.forward(self._leaves, x, training=False)
            sums[0] += (logits.argmax(dim=2) == y).sum(dim=1)
            sums[1] += batch_losses(logits, y).double() * x.shape[1]
        accuracy, loss = (sums / self.stream.num_images).tolist()
        return list(zip(accuracy, loss, strict=True))

    @property
    def num_evaluation_passes(self) -> int:
        """Forward passes of the evaluation after a task, each run's counted."""
        return -(-self.stream.num_images // EVALUATION_IMAGES) * len(self.runs)

    def _drawn_parameters(self, task: int) -> Tensor:
        draws = [generator_for("parameters", run.seed, task) for run in self.runs]
        return self.network.initial_parameters(draws)

    def _power_draws(self, task: int) -> list[np.random.Generator]:
        return [generator_for("power_iteration", run.seed, task) for run in self.runs]

    def state(self) -> dict[str, Tensor]:
        """Everything that the tasks to come depend on, beside the spec."""
        running = {f"running.{i}": value for i, value in enumerate(self.network.running)}
        return {
            "next_task": torch.tensor(self.next_task),
            "parameters": self.parameters,
            **running,
            **{f"optimizer.{name}": value for name, value in self.optimizer.state().items()},
            **{f"tracker.{name}": value for name, value in self.tracker.state().items()},
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave for the same spec and runs."""
        self.next_task = int(state["next_task"])
        self.parameters.copy_(state["parameters"])
        for number, running in enumerate(self.network.running):
            running.copy_(state[f"running.{number}"])
        self.optimizer.load(_under("optimizer.", state))
        self.tracker.load(_under("tracker.", state))


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _slope(method: Method) -> float:
    """Of the activation below zero, where it has one."""
    return {"linear": 1.0, "leaky_relu": method.leak or 0.0}.get(method.activation, 0.0)
