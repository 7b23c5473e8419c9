"""Rows to documents: which text conditions, and which text counts in the loss."""

import hashlib
from dataclasses import dataclass
from typing import Any

from probe.batches.readers import Row
from probe.errors import BatchError
from probe.spec import QuestionAnswerFormat, TextFormat


@dataclass(frozen=True, slots=True)
class Document:
    """One text, or one question with its answer."""

    prompt: str  # conditions only; empty for plain text
    body: str  # counts in the loss
    choices: tuple[str, ...] = ()  # of a question with choices; body is one of them
    right: int = 0  # which

    @property
    def digest(self) -> bytes:
        """16 bytes, equal for exact duplicates only (but for 2^-64 chances)."""
        length = len(self.prompt).to_bytes(8, "little")
        text = (self.prompt + self.body).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(length + text, digest_size=16).digest()

    @property
    def num_chars(self) -> int:
        """Length of both parts."""
        return len(self.prompt) + len(self.body)


def columns_of(task: TextFormat | QuestionAnswerFormat) -> list[str]:
    """The fields a task needs of every row."""
    if isinstance(task, TextFormat):
        return [task.field]
    return [task.question, task.answer, *([task.choices] if task.choices else [])]


def to_document(row: Row, task: TextFormat | QuestionAnswerFormat) -> Document | None:
    """The document of one row; None where its text, or its answer, is blank.

    A text counts whole. A question is put into the task's template and conditions only; its
    answer counts. With `choices` the answer is an index and the right choice's text counts
    (cloze, not the letter).

    Raises:
        BatchError: A field is missing or of the wrong type; names place, field and what the
            row holds.
    """
    if isinstance(task, TextFormat):
        text = _text(row, task.field)
        return Document("", text) if text.strip() else None
    choices, right = _choices(row, task, task.choices) if task.choices else ((), 0)
    answer = choices[right] if choices else _answer(row, task)
    if not answer.strip():
        return None
    # str.format would trip over braces in a question or a template about code
    prompt = task.template.replace("{question}", _text(row, task.question))
    return Document(prompt, answer, choices, right)


def _answer(row: Row, task: QuestionAnswerFormat) -> str:
    value = _field(row, task.answer)
    if isinstance(value, int) and not isinstance(value, bool):
        raise BatchError(
            f"{row.place}: field {task.answer!r} is the number {value}; where it is an index "
            "into a list, set format.choices to that list's field"
        )
    return _text(row, task.answer)


def _choices(row: Row, task: QuestionAnswerFormat, field: str) -> tuple[tuple[str, ...], int]:
    """Every choice, and the index of the right one."""
    choices = _field(row, field)
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise BatchError(
            f"{row.place}: field {field!r} must be a list of texts, found {_kind(choices)}"
        )
    index = _field(row, task.answer)
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
        raise BatchError(
            f"{row.place}: field {task.answer!r} must be an index 0..{len(choices) - 1} into "
            f"{field!r}, found {index!r}"
        )
    return tuple(choices), index


def _text(row: Row, field: str) -> str:
    value = _field(row, field)
    if not isinstance(value, str):
        raise BatchError(f"{row.place}: field {field!r} must be text, found {_kind(value)}")
    return value


def _field(row: Row, field: str) -> Any:
    if field not in row.fields:
        keys = ", ".join(map(repr, sorted(map(str, row.fields)))) or "no fields"
        raise BatchError(f"{row.place}: no field {field!r}; found {keys}")
    return row.fields[field]


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
