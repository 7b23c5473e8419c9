"""The rules of a batch set: the same every time, disjoint, fixed shares, never repeated."""

import contextlib
import hashlib
import itertools
import re
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probe.batches import BatchSet
from probe.batches.batch_set import sequences_per_source
from probe.errors import BatchError, BatchUnavailableError

from .conftest import make_spec, numbered, write_rows

NUM_DOCUMENTS = 300


@pytest.fixture
def path(tmp_path):
    return str(write_rows(tmp_path / "a.jsonl", numbered(NUM_DOCUMENTS)))


def document_numbers(batch, tokenizer):
    """Numbers of all documents a batch touches; each document carries its own twice."""
    text = "\n".join(tokenizer.decode(row) for row in batch.input_ids)
    return {int(n) for n in re.findall(r"document (\d+) the", text)}


def test_batches_have_the_agreed_form(path, tokenizer):
    batches = BatchSet(make_spec({"paths": [path]}, held_out_sequences=6), tokenizer)
    for batch, rows in ((batches.update(0), 4), (batches.held_out, 6)):
        assert batch.input_ids.shape == batch.loss_mask.shape == (rows, 16)
        assert batch.input_ids.dtype == torch.int64
        assert batch.loss_mask.dtype == torch.bool
        assert not batch.loss_mask[:, 0].any()
        assert batch.loss_mask[:, 1:].all()
        assert batch.num_targets == rows * 15
        assert batch.source_names == ["source0"] * rows
    assert BatchSet(make_spec({"paths": [path]}), tokenizer).held_out is None


def test_the_hash_is_what_it_says(path, tokenizer):
    batch = BatchSet(make_spec({"paths": [path]}), tokenizer).update(2)
    raw = struct.pack("<2q", 4, 16)
    raw += struct.pack("<64q", *batch.input_ids.flatten().tolist())
    raw += bytes(batch.loss_mask.flatten().tolist())
    assert batch.sha256 == hashlib.sha256(raw).hexdigest()


def test_any_order_of_asking_gives_the_same_batches(path, tokenizer):
    spec = make_spec({"paths": [path]}, held_out_sequences=4)
    forward = BatchSet(spec, tokenizer)
    hashes = [forward.update(i).sha256 for i in range(6)]
    jumping = BatchSet(spec, tokenizer)
    assert [jumping.update(i).sha256 for i in (5, 0, 3)] == [hashes[i] for i in (5, 0, 3)]
    assert jumping.held_out.sha256 == forward.held_out.sha256
    assert len(set(hashes)) == 6


def test_another_seed_gives_other_batches(path, tokenizer):
    one, other = (
        BatchSet(make_spec({"paths": [path]}, seed=seed), tokenizer).update(0).sha256
        for seed in (0, 1)
    )
    assert one != other


def test_pythons_hash_plays_no_part(path, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    spec = make_spec({"paths": [path]}, held_out_sequences=4)
    code = (
        "import sys; from transformers import AutoTokenizer; "
        "from probe.batches import BatchSet; from probe.spec import Batches; "
        "spec = Batches.model_validate_json(sys.argv[1]); "
        "batches = BatchSet(spec, AutoTokenizer.from_pretrained(sys.argv[2])); "
        "sys.stdout.write(batches.held_out.sha256 + batches.update(1).sha256)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, spec.model_dump_json(), str(tmp_path / "tokenizer")],
        env={"PYTHONHASHSEED": str(hash("x") % 1000), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    here = BatchSet(spec, tokenizer)
    assert found == here.held_out.sha256 + here.update(1).sha256


def all_update_documents(batches, tokenizer):
    found = set()
    with contextlib.suppress(BatchError):  # the source has run out
        for i in itertools.count():
            found |= document_numbers(batches.update(i), tokenizer)
    return found


@pytest.mark.parametrize("num_sources", [1, 2], ids=["one source", "two that share documents"])
def test_held_out_and_update_documents_are_disjoint(path, tokenizer, num_sources):
    sources = [{"paths": [path]}] * num_sources
    spec = make_spec(*sources, held_out_sequences=8, sequence_length=64)
    batches = BatchSet(spec, tokenizer)
    held_out = document_numbers(batches.held_out, tokenizer)
    updates = all_update_documents(batches, tokenizer)
    assert len(held_out) > 5
    assert len(updates) > NUM_DOCUMENTS / 2
    assert not held_out & updates


def test_update_batches_never_overlap(path, tokenizer):
    batches = BatchSet(make_spec({"paths": [path]}), tokenizer)
    rows = [tuple(row.tolist()) for i in range(20) for row in batches.update(i).input_ids]
    assert len(set(rows)) == len(rows) == 80


def test_exact_duplicates_count_once(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", numbered(50) * 3)
    batches = BatchSet(make_spec({"paths": [str(path)]}), tokenizer)
    with pytest.raises(BatchError, match=r"150 rows read .* 100 exact duplicates"):
        batches.update(1000)
    once = write_rows(tmp_path / "b.jsonl", numbered(50))
    assert BatchSet(make_spec({"paths": [str(once)]}), tokenizer).update(0).sha256 == (
        batches.update(0).sha256
    )


def test_running_out_is_an_error_that_counts(path, tokenizer):
    batches = BatchSet(make_spec({"paths": [path]}), tokenizer)
    stream = sum(len(tokenizer(row["text"])["input_ids"]) + 1 for row in numbered(NUM_DOCUMENTS))
    num_sequences = stream // 16
    batches.update(num_sequences // 4 - 1)
    message = (
        f"{num_sequences} update sequences of 16 tokens where {num_sequences // 4 * 4 + 4} are "
        rf"needed; {NUM_DOCUMENTS} rows read .* {stream} tokens"
    )
    with pytest.raises(BatchError, match=message):
        batches.update(num_sequences // 4)
    batches.update(0)  # earlier batches are still there
    with pytest.raises(BatchError, match="held-out sequences"):
        BatchSet(make_spec({"paths": [path]}, held_out_sequences=60000), tokenizer)
    with pytest.raises(IndexError):
        batches.update(-1)


def test_mixing_keeps_the_shares_in_every_batch(tmp_path, tokenizer):
    paths = {
        name: str(write_rows(tmp_path / f"{name}.jsonl", numbered(200, name)))
        for name in ("web", "code")
    }
    spec = make_spec(
        {"name": "web", "paths": [paths["web"]], "share": 3},
        {"name": "code", "paths": [paths["code"]], "share": 1},
        batch_sequences=8,
    )
    batches = BatchSet(spec, tokenizer)
    for i in range(3):
        batch = batches.update(i)
        assert batch.source_names == ["web", "web", "code", "web", "web", "web", "code", "web"]
        for row, name in zip(batch.input_ids, batch.source_names, strict=True):
            other = {"web": "code", "code": "web"}[name]
            assert other not in tokenizer.decode(row)


@given(
    shares=st.lists(st.floats(0.05, 20), min_size=1, max_size=5),
    num_sequences=st.integers(1, 200),
)
def test_shares_by_largest_remainder(shares, num_sequences):
    spec = make_spec(*({"paths": ["x"], "share": share} for share in shares))
    exact = [num_sequences * share / sum(shares) for share in shares]
    try:
        counts = sequences_per_source(spec, num_sequences, "batch")
    except BatchError:
        assert min(exact) < 1
        return
    assert sum(counts) == num_sequences
    assert min(counts) >= 1
    rests = [amount - count for count, amount in zip(counts, exact, strict=True)]
    assert all(abs(rest) < 1 for rest in rests)
    assert max(rests) - min(rests) < 1 + 1e-9  # whoever was rounded up had the larger remainder


def test_a_share_too_small_for_one_sequence_is_an_error(path, tokenizer):
    spec = make_spec({"paths": [path]}, {"paths": [path], "share": 0.01})
    with pytest.raises(BatchError, match=r"'source1' with share 0.01 gives none of the 4"):
        BatchSet(spec, tokenizer)


def test_questions_are_padded_and_only_answers_count(tmp_path, tokenizer):
    rows = [{"question": f"how many in {i}?", "answer": f"there are {i}"} for i in range(40)]
    spec = make_spec(
        {
            "paths": [str(write_rows(tmp_path / "a.jsonl", rows))],
            "format": {"type": "question_answer"},
        },
        sequence_length=64,
    )
    batch = BatchSet(spec, tokenizer).update(1)
    for ids, mask in zip(batch.input_ids, batch.loss_mask, strict=True):
        text = tokenizer.decode(ids).replace("</s>", "")
        number = re.search(r"how many in (\d+)", text).group(1)
        assert text == f"Question: how many in {number}?\nAnswer: there are {number}"
        assert tokenizer.decode(ids[mask]).strip() == f"there are {number}"
        end = int(mask.nonzero().max()) + 1
        assert (ids[end:] == tokenizer.eos_token_id).all()  # padding, and never a target


def test_questions_that_all_are_too_long_are_an_error(tmp_path, tokenizer):
    rows = [{"question": "how many? " * 9 + str(i), "answer": "three"} for i in range(5)]
    path = str(write_rows(tmp_path / "a.jsonl", rows))
    spec = make_spec({"paths": [path], "format": {"type": "question_answer"}})
    with pytest.raises(BatchError, match="5 longer than a sequence left out"):
        BatchSet(spec, tokenizer).update(0)


def test_streams_no_more_than_the_shuffle_buffer_needs(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("probe.batches.documents.SHUFFLE_DOCUMENTS", 100)
    path = write_rows(tmp_path / "a.jsonl", numbered(10_000))
    batches = BatchSet(make_spec({"paths": [str(path)]}), tokenizer)
    numbers = document_numbers(batches.update(0), tokenizer)
    assert max(numbers) <= 200  # 100 in the buffer, 64 for one call of the tokenizer, and some
    assert batches.tallies["source0"].num_rows <= 200
    assert numbers != set(range(len(numbers)))  # and yet shuffled


@pytest.fixture
def hub(monkeypatch):
    """`datasets.load_dataset` replaced by one that gives rows, or raises."""
    answer = {"rows": numbered(100), "asked": None}

    def load_dataset(path, **options):
        answer["asked"] = (path, options)
        if isinstance(answer["rows"], Exception):
            raise answer["rows"]
        return iter(answer["rows"])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return answer


HUB = {"type": "hub", "name": "h", "dataset": "openai/gsm8k", "config": "main", "revision": "v1"}


def test_hub_data_read_like_files(hub, path, tmp_path, tokenizer):
    batch = BatchSet(make_spec(HUB), tokenizer).update(0)
    options = {"name": "main", "split": "train", "revision": "v1", "streaming": True}
    assert hub["asked"] == ("openai/gsm8k", options)
    same = write_rows(tmp_path / "same.jsonl", hub["rows"])
    local = BatchSet(make_spec({"name": "h", "paths": [str(same)]}), tokenizer)
    assert batch.sha256 == local.update(0).sha256


def test_hub_failures_say_whether_to_try_again(hub, tokenizer):
    hub["rows"] = ValueError("Unknown split")
    with pytest.raises(BatchError, match=r"openai/gsm8k.*Unknown split") as caught:
        BatchSet(make_spec(HUB), tokenizer).update(0)
    assert not caught.value.retryable
    hub["rows"] = ConnectionError("no route")
    with pytest.raises(BatchUnavailableError, match="no route") as caught:
        BatchSet(make_spec(HUB), tokenizer).update(0)
    assert caught.value.retryable


def test_a_bad_row_of_the_hub_is_named(hub, tokenizer):
    hub["rows"] = [{"content": "x"}]
    with pytest.raises(BatchError, match="row 1: no field 'text'; found 'content'"):
        BatchSet(make_spec(HUB), tokenizer).update(0)
