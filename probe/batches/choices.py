"""Questions with choices: every choice as a sequence, so that a model can be asked which it takes.

The questions are those of a task's fixed batch, in which only the right choice stands; those of
which some choice is empty or too long for a sequence are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import tee

from transformers import PreTrainedTokenizerBase

from probe.batches.batch import Batch
from probe.batches.batch_set import interleave, padding_token
from probe.batches.documents import Tally, read_documents
from probe.batches.mixtures import MixtureBatches
from probe.batches.packing import Encoded, encode, one_each
from probe.batches.packing import Sequence as TokenSequence
from probe.batches.tasks import Document
from probe.errors import BatchError
from probe.spec import QuestionAnswerFormat
from probe.spec_mix import EvalTask
from probe.spec_train import MixTrainSpec


@dataclass(frozen=True, slots=True)
class ChoiceQuestions:
    """Questions of one task, a sequence for every choice of each, one question after the other."""

    batch: Batch
    num_choices: tuple[int, ...]  # of each question
    right: tuple[int, ...]  # index of each question's right choice
    num_chars: tuple[int, ...]  # of each sequence's choice

    @property
    def chance(self) -> float:
        """Share of right answers a guess would give: the mean of 1 / choices."""
        return sum(1 / count for count in self.num_choices) / len(self.num_choices)

    def answered_right(self, nll: Sequence[float]) -> list[bool]:
        """Whether each question's right choice alone has the highest log-likelihood per character.

        Args:
            nll: Nats of each sequence of the batch, summed over the choice's tokens.
        """
        scores = [-nats / chars for nats, chars in zip(nll, self.num_chars, strict=True)]
        found, start = [], 0
        for count, right in zip(self.num_choices, self.right, strict=True):
            of_question = scores[start : start + count]
            best = of_question.pop(right)
            found.append(all(best > other for other in of_question))
            start += count
        return found


class MixTrainBatches(MixtureBatches):
    """The batches of a training grid, and the questions with choices of its tasks.

    Args:
        spec: Sources, tasks, and how both are cut.
        tokenizer: The checkpoint's.

    Raises:
        BatchError: As `MixtureBatches`; or no question of a task has choices that fit.
    """

    def __init__(self, spec: MixTrainSpec, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(spec, tokenizer)
        self._questions = {
            task.data.name: _questions(task, spec, tokenizer)
            for task in spec.eval_tasks
            if isinstance(task.data.format, QuestionAnswerFormat) and task.data.format.choices
        }

    def questions(self, name: str) -> ChoiceQuestions | None:
        """Those of an evaluation task with choices; None for other tasks."""
        return self._questions.get(name)


def _questions(
    task: EvalTask, spec: MixTrainSpec, tokenizer: PreTrainedTokenizerBase
) -> ChoiceQuestions:
    length = spec.batches.sequence_length
    sequences: list[TokenSequence] = []
    kept: list[Document] = []
    for document in _of_fixed_batch(task, spec, tokenizer):
        choices = [Document(document.prompt, choice) for choice in document.choices]
        rows = list(one_each(encode(choices, tokenizer), length, Tally()))
        if len(rows) == len(choices):
            kept.append(document)
            sequences += rows
    if not kept:
        raise BatchError(
            f"eval task {task.data.name!r}: none of its {task.sequences} questions has choices "
            f"that all fit into {length} tokens with the question. Raise batches.sequence_length"
        )
    names = [task.data.name]
    return ChoiceQuestions(
        batch=interleave([sequences], names, length, padding_token(tokenizer)),
        num_choices=tuple(len(document.choices) for document in kept),
        right=tuple(document.right for document in kept),
        num_chars=tuple(len(choice) for document in kept for choice in document.choices),
    )


def _of_fixed_batch(
    task: EvalTask, spec: MixTrainSpec, tokenizer: PreTrainedTokenizerBase
) -> list[Document]:
    """The documents whose right answers make the task's fixed batch, in its order."""
    documents, to_encode = tee(read_documents(task.data, spec.batches.seed, Tally()))
    found: list[Document] = []
    for document, encoded in zip(documents, encode(to_encode, tokenizer), strict=True):
        if _fits(encoded, spec.batches.sequence_length):
            found.append(document)
        if len(found) == task.sequences:
            break
    return found


def _fits(encoded: Encoded, sequence_length: int) -> bool:
    return bool(list(one_each([encoded], sequence_length, Tally())))
