"""Packing against the plain definition: join all documents with EOS, cut into equal parts."""

import pytest

from probe.batches.documents import Tally
from probe.batches.packing import encode, one_each, pack
from probe.batches.tasks import Document
from probe.errors import BatchError

from .conftest import make_tokenizer

TEXTS = ["one two", "the quick brown fox " * 9, "x", "seven eight nine ten " * 3, "dog"] * 5


def packed(tokenizer, texts, length):
    documents = [Document("", text) for text in texts]
    return list(pack(encode(documents, tokenizer), tokenizer, length, Tally()))


@pytest.mark.parametrize("length", [8, 16, 33])
def test_packs_documents_with_eos_between_and_drops_the_rest(tokenizer, length):
    stream = [t for text in TEXTS for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    expected = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    found = packed(tokenizer, TEXTS, length)
    assert [list(sequence.tokens) for sequence in found] == expected
    assert {(s.first_target, s.end) for s in found} == {(1, length)}


def test_chunks_do_not_show(tokenizer, monkeypatch):
    expected = [list(s.tokens) for s in packed(tokenizer, TEXTS, 16)]
    monkeypatch.setattr("probe.batches.packing.CHUNK_DOCUMENTS", 3)
    assert [list(s.tokens) for s in packed(tokenizer, TEXTS, 16)] == expected


def test_bos_goes_before_where_there_is_no_eos():
    tokenizer = make_tokenizer(bos_token="<s>")
    stream = [t for text in TEXTS for t in [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]]
    assert list(packed(tokenizer, TEXTS, 16)[0].tokens) == stream[:16]


def test_what_the_tokenizer_adds_is_kept_and_not_doubled():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    stream = [t for text in TEXTS for t in tokenizer(text)["input_ids"]]
    assert stream[0] == 0
    assert list(packed(tokenizer, TEXTS, 16)[0].tokens) == stream[:16]


def test_a_tokenizer_without_separators_is_an_error():
    with pytest.raises(BatchError, match="neither an EOS nor a BOS"):
        packed(make_tokenizer(), TEXTS, 8)


QUESTION = Document("Question: how many foxes?\nAnswer: ", "there are three foxes")


def test_targets_are_the_answers_tokens(tokenizer):
    """Decoding the targets gives the answer; the space before it may belong to its first token."""
    (encoded,) = encode([QUESTION], tokenizer)
    assert tokenizer.decode(encoded.tokens) == QUESTION.prompt + QUESTION.body
    targets = tokenizer.decode(encoded.tokens[encoded.first_target : encoded.end])
    assert targets.strip() == QUESTION.body
    before = tokenizer.decode(encoded.tokens[: encoded.first_target])
    assert before.rstrip() == QUESTION.prompt.rstrip()


def test_without_offsets_question_and_answer_are_taken_apart(tokenizer):
    class Slow:
        """A tokenizer without offsets: everything else is the fast one's."""

        is_fast = False
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, texts, *, return_offsets_mapping, **options):
            assert not return_offsets_mapping
            return tokenizer(texts, **options)

    (encoded,) = encode([QUESTION], Slow())
    prompt = tokenizer(QUESTION.prompt)["input_ids"]
    assert list(encoded.tokens) == prompt + tokenizer(QUESTION.body)["input_ids"]
    assert (encoded.first_target, encoded.end) == (len(prompt), len(encoded.tokens))


def test_questions_too_long_are_left_out_and_counted(tokenizer):
    long = Document("Question: " + "x" * 100 + "\nAnswer: ", "y")
    tally = Tally()
    (kept,) = one_each(encode([long, QUESTION, long], tokenizer), 64, tally)
    assert tally.num_too_long == 2
    assert kept.end == len(kept.tokens) <= 64


def test_the_first_token_is_never_a_target(tokenizer):
    (kept,) = one_each(encode([Document("", "fox and dog")], tokenizer), 64, Tally())
    assert kept.first_target == 1
