"""What a model scores on one evaluation task, and the change from one time to another.

Loss and accuracy keep their parts per sequence or question, so that a change is taken in pairs:
what varies from question to question, the same before and after, drops out of its error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from probe.batches import Batch
from probe.batches.choices import ChoiceQuestions, MixTrainBatches
from probe.loss import CausalLoss
from probe.progress import Meter
from probe.result_train import AccuracyKind, TaskChange
from probe.workbench import check_vocabulary


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One task at one time. Sums per item; an item is a sequence, or a question with choices."""

    nll: tuple[float, ...]  # nats per sequence of the fixed batch
    right: tuple[float, ...]  # right answers per item: tokens of a sequence, or 0 and 1

    @property
    def is_finite(self) -> bool:
        """Whether every sequence's loss is a number."""
        return all(map(math.isfinite, self.nll))


@dataclass(frozen=True, slots=True)
class ScoredTask:
    """An evaluation task: the fixed batch its loss is taken on, the questions it asks."""

    name: str
    batch: Batch
    questions: ChoiceQuestions | None  # None: the accuracy is that of the batch's target tokens

    @classmethod
    def of(cls, batches: MixTrainBatches, name: str) -> "ScoredTask":
        """The task of that name."""
        return cls(name, batches.task(name), batches.questions(name))

    @property
    def accuracy_kind(self) -> AccuracyKind:
        """`choice` where there are questions with choices, else `token`."""
        return "token" if self.questions is None else "choice"

    @property
    def num_targets(self) -> tuple[int, ...]:
        """Target tokens of each sequence of the fixed batch."""
        return tuple(self.batch.loss_mask.sum(1).tolist())

    @property
    def num_asked(self) -> tuple[int, ...]:
        """What can be right, per item: target tokens of a sequence, or 1 question."""
        if self.questions is None:
            return self.num_targets
        return (1,) * len(self.questions.right)

    def check(self, model: nn.Module) -> None:
        """Refuse tokens the model has no embedding for.

        Raises:
            ConfigError: The tokenizer is larger than the model's vocabulary.
        """
        check_vocabulary(self.batch, model)
        if self.questions is not None:
            check_vocabulary(self.questions.batch, model)

    def score(self, loss: CausalLoss, meter: Meter) -> TaskScore:
        """What the model, as it is now, scores.

        Cost: a forward pass of the fixed batch, and one more of it, or of every choice.
        """
        nll = loss.sums(self.batch).nll
        meter.count_forward_pass()
        if self.questions is None:
            right = tuple(map(float, loss.num_right(self.batch)))
        else:
            of_choices = loss.sums(self.questions.batch).nll
            right = tuple(map(float, self.questions.answered_right(of_choices)))
        meter.count_forward_pass()
        return TaskScore(nll, right)

    def change(self, start: TaskScore, end: TaskScore | None) -> TaskChange:
        """Both scores as numbers, and their difference with its error; end None: it diverged."""
        num_targets, num_asked = self.num_targets, self.num_asked
        loss_change = end and paired_change(start.nll, end.nll, num_targets)
        accuracy_change = end and paired_change(start.right, end.right, num_asked)
        return TaskChange(
            task=self.name,
            loss_start=math.fsum(start.nll) / sum(num_targets),
            loss_end=end and math.fsum(end.nll) / sum(num_targets),
            loss_change=loss_change and loss_change[0],
            loss_change_standard_error=loss_change and loss_change[1],
            accuracy_kind=self.accuracy_kind,
            accuracy_count=sum(num_asked),
            accuracy_chance=None if self.questions is None else self.questions.chance,
            accuracy_start=math.fsum(start.right) / sum(num_asked),
            accuracy_end=end and math.fsum(end.right) / sum(num_asked),
            accuracy_change=accuracy_change and accuracy_change[0],
            accuracy_change_standard_error=accuracy_change and accuracy_change[1],
            loss_batch_sha256=self.batch.sha256,
        )


def paired_change(
    start: Sequence[float], end: Sequence[float], counts: Sequence[int]
) -> tuple[float, float | None]:
    """Change of a mean over all tokens (questions), and its standard error over items.

    With d_i = end_i - start_i over n_i tokens of item i, S items: the change is
    D = sum d_i / sum n_i, its error that of a ratio of sums,
    sqrt(S / (S - 1) * sum (d_i - D n_i)^2) / sum n_i. For n_i = 1 that is stdev(d) / sqrt(S).

    Args:
        start: Sums of each item before.
        end: Sums of each item afterwards.
        counts: n_i.

    Returns:
        (change, standard error; None below two items).
    """
    total = sum(counts)
    differences = [after - before for before, after in zip(start, end, strict=True)]
    change = math.fsum(differences) / total
    if len(counts) < 2:
        return change, None
    rest = math.fsum((d - change * n) ** 2 for d, n in zip(differences, counts, strict=True))
    return change, math.sqrt(len(counts) / (len(counts) - 1) * rest) / total
