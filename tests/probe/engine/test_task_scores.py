"""Accuracy and its error on logits and sums made by hand."""

import json
import math
import statistics

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from probe.batches.choices import ChoiceQuestions, MixTrainBatches
from probe.errors import BatchError
from probe.loss import CausalLoss
from probe.spec_train import MixTrainSpec
from probe.task_scores import paired_change


class Output(torch.nn.Module):
    """A model whose logits after token t are a given table's row t."""

    def __init__(self, table, head_path):
        super().__init__()
        self.embed = torch.nn.Embedding.from_pretrained(torch.eye(len(table)), freeze=False)
        self.head = torch.nn.Linear(len(table), len(table), bias=False)
        self.head.weight.data = table.t().contiguous()
        self.head_path = head_path

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False):
        logits = self.head(self.embed(input_ids))
        if self.head_path == "plain":
            logits = logits * 1.5  # changed after the output layer: the chunked head would be wrong
        return type("Out", (), {"logits": logits})()


class Tokens:
    def __init__(self, ids, mask):
        self.input_ids, self.loss_mask = torch.tensor(ids), torch.tensor(mask).bool()


# After token 0 comes 1, after 1 comes 2, after 2 comes 0; 3 ties between 0 and 2.
TABLE = torch.tensor(
    [[0.0, 5, 1, 1], [0, 1, 5, 0], [5, 0, 1, 0], [2, 0, 2, 0]]
)  # row: token before, column: token after


@pytest.mark.parametrize("head_path", ["chunked", "plain"])
def test_tokens_that_are_the_most_likely_next_are_counted(head_path):
    loss = CausalLoss(Output(TABLE, head_path), micro_batch_sequences=2)
    assert loss.head_path == head_path
    batch = Tokens(
        [[0, 1, 2, 0, 1], [0, 2, 1, 2, 0], [3, 0, 3, 2, 0]],
        [[0, 1, 1, 1, 1], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]],
    )
    # row 0: all four right. row 1: 0->2 and 2->1 wrong, 1->2 right; 2->0 does not count.
    # row 2: 3->0 right (the first of a tie), 0->3 wrong, 3->2 wrong (the other), 2->0 right.
    assert loss.num_right(batch) == (4, 1, 2)
    whole = loss.model(input_ids=batch.input_ids).logits.log_softmax(-1)
    for row, found in enumerate(loss.sums(batch).nll):
        places = [t for t in range(1, 5) if batch.loss_mask[row, t]]
        expected = -sum(float(whole[row, t - 1, batch.input_ids[row, t]].detach()) for t in places)
        assert found == pytest.approx(expected, rel=1e-6)


def questions(num_choices, right, num_chars):
    return ChoiceQuestions(None, num_choices, right, num_chars)


def test_the_right_choice_must_have_the_highest_likelihood_per_character():
    asked = questions((3, 2, 2), (1, 0, 1), (1, 4, 2, 3, 3, 5, 5))
    # nats per character: 2, 0.5, 1 -> right; 1, 0.9 -> wrong; 0.7, 0.6 -> right
    # by the sum alone the first would be wrong (2 nats against 2 and 2).
    nll = [2.0, 2.0, 2.0, 3.0, 2.7, 3.5, 3.0]
    assert asked.answered_right(nll) == [True, False, True]
    assert asked.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)


def test_a_tie_is_no_answer():
    asked = questions((2,), (0,), (2, 4))
    assert asked.answered_right([1.0, 2.0]) == [False]
    assert asked.answered_right([0.99, 2.0]) == [True]


def test_the_error_of_a_change_is_that_of_the_pairs():
    start, end = [0.0, 1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0, 1.0]
    change, error = paired_change(start, end, [1] * 5)
    differences = [1.0, 0.0, -1.0, 0.0, 0.0]
    assert change == 0.0
    assert error == pytest.approx(statistics.stdev(differences) / math.sqrt(5))
    assert paired_change([1.0], [3.0], [4]) == (0.5, None)


def test_sequences_count_by_their_tokens():
    counts = [1, 2, 5]
    start = [2.0, 3.0, 4.0]
    all_alike = [s + 0.25 * n for s, n in zip(start, counts, strict=True)]
    assert paired_change(start, all_alike, counts) == (0.25, 0.0)  # each token by as much
    change, error = paired_change(start, [3.0, 3.0, 4.0], counts)
    assert change == pytest.approx(1 / 8)
    rest = (1 - 1 / 8) ** 2 + (2 / 8) ** 2 + (5 / 8) ** 2
    assert error == pytest.approx(math.sqrt(3 / 2 * rest) / 8)


@pytest.fixture
def tokenizer():
    words = {"</s>": 0} | {f"w{i}": i for i in range(1, 60)}
    made = Tokenizer(WordLevel(words, unk_token="</s>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="</s>")


def spec_for(path, num_questions, text):
    asked = {"type": "question_answer", "choices": "choices", "template": "{question} "}
    quiz = {"type": "files", "name": "quiz", "paths": [str(path)], "format": asked}
    plain = {"type": "files", "name": "text", "paths": [str(text)]}
    return MixTrainSpec.model_validate(
        {
            "kind": "mix_train",
            "name": "questions",
            "checkpoints": {"source": "local", "path": "nowhere"},
            "mixture": {"sources": [plain, quiz]},
            "train": {"ratios": [1.0], "learning_rates": [1e-3], "steps": 1},
            "eval_tasks": [
                {"data": quiz | {"name": "asked"}, "sequences": num_questions},
                {"data": plain | {"name": "read"}, "sequences": 1},
            ],
            "batches": {"sequence_length": 8, "batch_sequences": 2},
        }
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_are_those_of_the_fixed_batch_with_every_choice(tokenizer, tmp_path):
    long = " ".join(f"w{i}" for i in range(1, 9))
    rows = [
        {"question": f"w{i}", "choices": [f"w{20 + i} w1", f"w{30 + i}", f"w{40 + i}"], "answer": 1}
        for i in range(1, 9)
    ]
    rows[2]["choices"][2] = long  # a wrong choice too long: in the loss, not among the questions
    rows[3]["choices"][1] = long  # the right one: in neither
    rows[5]["choices"][0] = ""
    text = write(tmp_path / "text.jsonl", [{"text": long}] * 1)
    spec = spec_for(write(tmp_path / "quiz.jsonl", rows), 7, text)
    batches = MixTrainBatches(spec, tokenizer)
    assert batches.questions("read") is None
    found = batches.questions("asked")
    assert found.num_choices == (3,) * 5
    assert found.right == (1,) * 5
    assert len(found.num_chars) == found.batch.num_sequences == 15
    kept = [int(ids[0]) for ids in batches.task("asked").input_ids]
    assert sorted(kept) == [1, 2, 3, 5, 6, 7, 8]
    asked = [i for i in kept if i not in (3, 6)]  # in the batch's order
    for index, number in enumerate(asked):
        for place in range(3):
            row = 3 * index + place
            tokens = tokenizer(f"w{number} {rows[number - 1]['choices'][place]}")["input_ids"]
            assert found.batch.input_ids[row, : len(tokens)].tolist() == tokens
            targets = found.batch.loss_mask[row].nonzero()[:, 0].tolist()
            assert targets == list(range(1, len(tokens)))
            assert found.num_chars[row] == len(rows[number - 1]["choices"][place])


def test_no_question_that_fits_is_an_error(tokenizer, tmp_path):
    long = " ".join(f"w{i}" for i in range(1, 9))
    rows = [{"question": f"w{i}", "choices": ["w9", long], "answer": 0} for i in range(3)]
    text = write(tmp_path / "text.jsonl", [{"text": long}])
    spec = spec_for(write(tmp_path / "quiz.jsonl", rows), 2, text)
    with pytest.raises(BatchError, match="'asked': none of its 2 questions"):
        MixTrainBatches(spec, tokenizer)
