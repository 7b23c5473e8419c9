"""What conditions and what counts, and rows that do not fit."""

import pytest

from probe.batches.readers import Row
from probe.batches.tasks import Document, to_document
from probe.errors import BatchError
from probe.spec import QuestionAnswerFormat, TextFormat

QA = QuestionAnswerFormat(type="question_answer")
MMLU = QuestionAnswerFormat(type="question_answer", choices="choices")


def document(task, **fields):
    return to_document(Row(fields, "a.jsonl, line 7"), task)


def test_text_counts_whole():
    assert document(TextFormat(), text=" a ") == Document("", " a ")
    assert document(TextFormat(field="content"), content="b") == Document("", "b")


def test_a_question_conditions_and_its_answer_counts():
    assert document(QA, question="Why {x}?", answer="So.") == Document(
        "Question: Why {x}?\nAnswer: ", "So."
    )


def test_the_right_choices_text_counts():
    found = document(MMLU, question="q", choices=["w", "x", "y"], answer=2)
    assert found == Document("Question: q\nAnswer: ", "y", ("w", "x", "y"), 2)


@pytest.mark.parametrize(
    ("task", "fields"),
    [(TextFormat(), {"text": " \n"}), (QA, {"question": "q", "answer": ""})],
)
def test_blank_documents_are_left_out(task, fields):
    assert document(task, **fields) is None


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        (TextFormat(), {"content": "x", "id": 1}, "no field 'text'; found 'content', 'id'"),
        (TextFormat(), {}, "no field 'text'; found no fields"),
        (TextFormat(), {"text": None}, "field 'text' must be text, found null"),
        (TextFormat(), {"text": 3}, "field 'text' must be text, found int"),
        (QA, {"question": "q"}, "no field 'answer'; found 'question'"),
        (QA, {"question": ["q"], "answer": "a"}, "'question' must be text, found list"),
        (QA, {"question": "q", "answer": 1}, "set format.choices"),
        (MMLU, {"question": "q", "answer": 0}, "no field 'choices'"),
        (MMLU, {"question": "q", "choices": "ab", "answer": 0}, "list of texts, found str"),
        (MMLU, {"question": "q", "choices": ["a", "b"], "answer": 2}, r"0\.\.1 .* found 2"),
        (MMLU, {"question": "q", "choices": ["a", "b"], "answer": -1}, "found -1"),
        (MMLU, {"question": "q", "choices": ["a", "b"], "answer": "A"}, "found 'A'"),
        (MMLU, {"question": "q", "choices": ["a", "b"], "answer": True}, "found True"),
    ],
)
def test_a_row_that_does_not_fit_is_named(task, fields, message):
    with pytest.raises(BatchError, match=message) as error:
        document(task, **fields)
    assert str(error.value).startswith("a.jsonl, line 7: ")


def test_digests_tell_prompt_from_body():
    digests = {d.digest for d in (Document("a", "b"), Document("", "ab"), Document("ab", ""))}
    assert len(digests) == 3
    assert Document("a", "b").digest == Document("a", "b").digest
