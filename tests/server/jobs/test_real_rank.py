"""The true chain once: worker, torchrun, `probe.rank`, a tiny checkpoint series on disk."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

from probe.checkpoints import save_checkpoint
from probe.engine import Session
from probe.plan import make_plan
from probe.result import Plan, UnitResult, eta_init_hint
from probe.spec import CheckpointSeriesSpec
from probe.spec_load import parse_spec

VOCAB = 50


@pytest.fixture
def series_spec(tmp_path: Path) -> dict[str, Any]:
    """Three random models with one tokenizer, and text."""
    vocab = {"<pad>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    tokens = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    config = Olmo2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    for step in (1, 2, 3):
        torch.manual_seed(step)
        save_checkpoint(Olmo2ForCausalLM(config), tmp_path / f"step-{step}", tokenizer=tokenizer)
    generator = random.Random(0)
    documents = [
        " ".join(f"w{generator.randrange(2, VOCAB)}" for _ in range(40)) for _ in range(99)
    ]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return {
        "kind": "checkpoint_series",
        "name": "tiny",
        "checkpoints": {"source": "local", "path": str(tmp_path / "step-*")},
        "optimizer": {"name": "adamw", "warmup_steps": 2},
        "batches": {
            "sources": [{"type": "files", "name": "words", "paths": [str(text)]}],
            "sequence_length": 16,
            "batch_sequences": 4,
            "held_out_sequences": 4,
        },
        "measurement": {"loss_batch": "both"},
    }


def numbers(results: list[UnitResult]) -> list[list[dict[str, Any]]]:
    """Everything measured, durations left out."""
    return [[m.model_dump(exclude={"duration_s"}) for m in r.measurements] for r in results]


def measured_here(plan: Plan, spec: CheckpointSeriesSpec) -> list[UnitResult]:
    """The same units without worker, gang or database, in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    session = Session(spec)
    results: list[UnitResult] = []
    hint = None
    for unit in plan.units:
        results.append(session.measure(unit, eta_init=hint))
        hint = eta_init_hint(results[-1]) or hint
    torch.set_num_threads(before)
    return results


@pytest.mark.slow
def test_a_killed_and_resumed_job_gives_bit_for_bit_the_same_numbers(lab, series_spec, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = parse_spec(series_spec)
    plan = make_plan(spec)
    job_id = lab.store.create_job(plan=plan, idempotency_key=None, body_sha256="0")[0].id
    worker = lab.start_worker(rank_command="[]")
    lab.until(lambda: lab.event_types(job_id).count("unit.finished") >= 1, "a first result")
    lab.kill(worker.pid)
    lab.until(lambda: not lab.processes(), "the gang to end with its worker")
    num_kept = lab.job(job_id).num_units_finished
    lab.start_worker(rank_command="[]")
    view = lab.until_status(job_id, "succeeded", "failed")
    assert view.status == "succeeded", view.error
    assert 1 <= num_kept < 3
    assert numbers(lab.store.unit_results(job_id)) == numbers(measured_here(plan, spec))
    events = lab.store.events_after(job_id, 0)
    started = [event.data["index"] for event in events if event.type == "unit.started"]
    assert started.count(0) == 1
