"""Training on mixtures is stock AdamW on the same batches, and leaves the model as it was."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from probe.batches.choices import MixTrainBatches
from probe.checkpoints import open_checkpoint
from probe.errors import BatchError, CheckpointError, ConfigError, NonFiniteLossError
from probe.mix_train import MixTrainSession, learning_rates
from probe.result import Unit
from probe.result_train import MixTrainUnitResult
from probe.series import list_checkpoints
from probe.spec_train import MixTrainSpec, TrainGrid

ROOT = Path(__file__).resolve().parents[3]
RANKS = Path(__file__).with_name("mix_train_ranks.py")


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """Questions with choices of uneven length, in the tiny tokenizer's words."""
    generator = random.Random(4)
    file = tmp_path_factory.mktemp("questions") / "questions.jsonl"

    def words(count):
        return " ".join(f"w{generator.randrange(2, 97)}" for _ in range(count))

    with file.open("w") as stream:
        for _ in range(60):
            choices = [words(generator.randrange(1, 4)) for _ in range(4)]
            right = generator.randrange(4)
            row = {"question": words(5), "choices": choices, "answer": right}
            stream.write(json.dumps(row) + "\n")
    return file


@pytest.fixture
def train_spec(series, questions):
    def build(**changes) -> MixTrainSpec:
        walks = {"type": "files", "name": "walks", "paths": [str(series.text)]}
        asked = {"type": "question_answer", "choices": "choices", "template": "{question} "}
        quiz = {"type": "files", "name": "quiz", "paths": [str(questions)], "format": asked}
        raw = {
            "kind": "mix_train",
            "name": "tiny training",
            "checkpoints": {"source": "local", "path": str(series.directory / "step-20")},
            "optimizer": {"betas": [0.9, 0.95], "warmup_steps": 2, "moments": "warmup"},
            "mixture": {"sources": [walks, quiz]},
            "train": {"ratios": [0.5], "learning_rates": [1e-3], "steps": 3},
            "eval_tasks": [
                {"data": walks | {"name": "walks_task"}, "sequences": 6},
                {"data": quiz | {"name": "quiz_task"}, "sequences": 12},
            ],
            "batches": {"sequence_length": 32, "batch_sequences": 4, "micro_batch_sequences": 2},
        }
        for key, value in changes.items():
            target, _, inner = key.partition("__")
            raw[target] = raw.get(target, {}) | {inner: value} if inner else value
        return MixTrainSpec.model_validate(raw)

    return build


def unit_of(spec, ratio=0.5, rate=1e-3):
    (checkpoint,) = list_checkpoints(spec.checkpoints)
    return Unit(index=0, unit_id="0000", checkpoint=checkpoint, ratio=ratio, learning_rate=rate)


class Stock:
    """The same run by the libraries alone: transformers' own loss, torch's own AdamW."""

    def __init__(self, series, spec):
        self.model = AutoModelForCausalLM.from_pretrained(series.directory / "step-20").eval()
        options = spec.optimizer
        self.names = [name for name, _ in self.model.named_parameters()]
        groups = [
            {"params": [p], "weight_decay": 0.0 if "embed_tokens" in n else options.weight_decay}
            for n, p in self.model.named_parameters()
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=options.betas, eps=options.eps)
        self._clip = options.clip_grad_norm

    def loss(self, batch):
        labels = batch.input_ids.masked_fill(~batch.loss_mask, -100)
        return self.model(input_ids=batch.input_ids, labels=labels, use_cache=False).loss

    def step(self, batch, rate):
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return float(loss.detach())


def fresh_batches(spec, checkpoint):
    return MixTrainBatches(spec, open_checkpoint(checkpoint).load_tokenizer())


def weights_after(session, unit, monkeypatch):
    """What the run leaves in the live shards before they are put back."""
    seen = {}

    def score(tasks, opened, meter):
        seen.update((s.name, s.live.float().clone()) for s in opened.model.shards)
        return real(tasks, opened, meter)

    real = session.measure.__globals__["_scores"]
    monkeypatch.setitem(session.measure.__globals__, "_scores", score)
    return session.measure(unit), seen


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("zero", {"train__moments": "zero"}),
        ("warmup", {}),
        ("checkpoint", {"optimizer": {"betas": [0.9, 0.95], "moments": "checkpoint"}}),
        ("clipped", {"train__moments": "zero", "optimizer__clip_grad_norm": 0.3}),
        ("rising", {"train__moments": "zero", "train__warmup_steps": 2}),
    ],
)
def test_a_run_is_stock_adamw_on_the_same_batches(series, train_spec, monkeypatch, case, changes):
    spec = train_spec(**changes)
    unit = unit_of(spec)
    result, ours = weights_after(MixTrainSession(spec), unit, monkeypatch)
    stock, batches = Stock(series, spec), fresh_batches(spec, unit.checkpoint)
    first = 0
    if case == "checkpoint":
        saved = open_checkpoint(unit.checkpoint)
        for name, parameter in stock.model.named_parameters():
            stock.optimizer.state[parameter] = {
                "step": torch.tensor(20.0),
                "exp_avg": saved.read(name, "exp_avg").view_as(parameter).clone(),
                "exp_avg_sq": saved.read(name, "exp_avg_sq").view_as(parameter).clone(),
            }
    if case == "warmup":
        first = 2
        for step in range(2):
            stock.step(batches.mixed_step([0.5, 0.5], step), 0.0)
    rates = [5e-4, 1e-3, 1e-3] if case == "rising" else [1e-3] * 3
    theirs = [
        stock.step(batches.mixed_step([0.5, 0.5], first + i), rate) for i, rate in enumerate(rates)
    ]
    assert result.outcome == "finished"
    assert result.num_steps == 3
    # fp32 gradients whose micro-batches are added in another order: some 1e-7 relative, and
    # Adam's quotient turns that of a small gradient into up to 1e-3 of a step of 1e-3.
    assert result.train_losses == pytest.approx(theirs, rel=1e-5)
    moved = 0.0
    start = AutoModelForCausalLM.from_pretrained(series.directory / "step-20")
    for (name, parameter), before in zip(
        stock.model.named_parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(ours[name], parameter.detach().flatten(), rtol=0, atol=1e-6)
        moved = max(moved, float((parameter - before).detach().abs().max()))
    assert moved > 1e-3
    assert result.first_batch_sha256 == batches.mixed_step([0.5, 0.5], first).sha256
    for task, change in zip(spec.eval_tasks, result.tasks, strict=True):
        batch = batches.task(task.data.name)
        with torch.no_grad():
            assert change.loss_end == pytest.approx(float(stock.loss(batch)), rel=1e-5)
    expected = {"zero": "none", "clipped": "none", "rising": "none"}.get(case, case)
    assert result.provenance.moments == expected


def test_one_micro_batch_gives_stock_adamw_bit_for_bit(series, train_spec, monkeypatch):
    """Fed with the same gradients, every bit is torch's own."""
    spec = train_spec(train__moments="zero")
    session, grads_seen = MixTrainSession(spec), []
    unit = unit_of(spec)
    from probe.mix_training import ShardAdamW

    real = ShardAdamW.step

    def step(self, grads, rate):
        grads_seen.append([g.clone() for g in grads])
        real(self, grads, rate)

    monkeypatch.setattr(ShardAdamW, "step", step)
    _, ours = weights_after(session, unit, monkeypatch)
    stock = Stock(series, spec)
    for grads in grads_seen:
        for parameter, grad in zip(stock.model.parameters(), grads, strict=True):
            parameter.grad = grad.view_as(parameter)
        for group in stock.optimizer.param_groups:
            group["lr"] = 1e-3
        stock.optimizer.step()
    assert len(grads_seen) == 3
    for name, parameter in stock.model.named_parameters():
        assert torch.equal(ours[name], parameter.detach().flatten())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_at_its_base_again_and_runs_repeat(train_spec, dtype):
    spec = train_spec(model={"dtype": dtype})
    session = MixTrainSession(spec)
    first = session.measure(unit_of(spec))
    model = session.workbench._resident[0]
    stored = open_checkpoint(unit_of(spec).checkpoint)
    for shard in model.shards:
        base = stored.read(shard.name, "weight").flatten()
        assert torch.equal(shard.base, base)
        assert torch.equal(shard.live, base.to(shard.live.dtype))
    session.measure(unit_of(spec, rate=1e-2))
    for ran_before in (session, MixTrainSession(spec)):  # between others, or after a restart
        again = ran_before.measure(unit_of(spec))
        assert again.tasks == first.tasks
        assert again.train_losses == first.train_losses


def test_bf16_trains_fp32_weights(train_spec, monkeypatch):
    """A step far below bf16's resolution still adds up: 3 steps of 1e-6 at weights of 0.2."""
    changes = {"train__moments": "zero", "optimizer__weight_decay": 0.0}
    masters = []
    from probe.mix_training import ShardAdamW

    real = ShardAdamW.step

    def step(self, grads, rate):
        real(self, grads, rate)
        masters.append([w.detach().clone() for w in self._weights])

    monkeypatch.setattr(ShardAdamW, "step", step)
    spec = train_spec(model={"dtype": "bfloat16"}, train__learning_rates=[1e-6], **changes)
    session = MixTrainSession(spec)
    session.measure(unit_of(spec, rate=1e-6))
    base = [shard.base for shard in session.workbench._resident[0].shards]
    assert all(w.dtype == torch.float32 for w in masters[-1])
    moved = torch.cat([(w - b).abs() for w, b in zip(masters[-1], base, strict=True)])
    # Adam's first steps are of size lr where there is a gradient, 3 of them at most.
    assert 1e-6 < float(moved.max()) < 4e-6


def test_runs_of_one_ratio_see_the_same_batches(train_spec):
    spec = train_spec(train__learning_rates=[1e-4, 1e-2], train__ratios=[0.25, 0.5])
    session = MixTrainSession(spec)
    slow, fast = (session.measure(unit_of(spec, rate=rate)) for rate in (1e-4, 1e-2))
    other = session.measure(unit_of(spec, ratio=0.25, rate=1e-4))
    assert slow.first_batch_sha256 == fast.first_batch_sha256 != other.first_batch_sha256
    assert slow.train_losses[0] == fast.train_losses[0]  # nothing has moved yet
    assert slow.train_losses[1:] != fast.train_losses[1:]
    assert [t.loss_start for t in slow.tasks] == [t.loss_start for t in other.tasks]


def test_a_run_that_blows_up_is_an_outcome(train_spec):
    spec = train_spec(train__moments="zero", train__steps=4, optimizer__weight_decay=10.0)
    session = MixTrainSession(spec)
    # decay of (1 - 1e30 * 10) a step: weights beyond fp32 in the second step at the latest
    result = session.measure(unit_of(spec, rate=1e30))
    assert result.outcome == "diverged"
    assert 1 <= result.num_steps < 4
    assert result.train_losses[-1] is None
    for change in result.tasks:
        assert change.loss_start > 0
        assert change.loss_end is change.loss_change is change.accuracy_change is None
    after = session.measure(unit_of(spec))
    assert after.outcome == "finished"
    assert after.tasks == MixTrainSession(spec).measure(unit_of(spec)).tasks


def test_a_run_that_blows_up_in_its_last_step_is_one_too(train_spec):
    spec = train_spec(train__moments="zero", train__steps=1, optimizer__weight_decay=10.0)
    result = MixTrainSession(spec).measure(unit_of(spec, rate=1e37))
    assert result.outcome == "diverged"
    assert result.num_steps == 1
    assert all(change.loss_end is None for change in result.tasks)


def test_a_gradient_that_cannot_be_clipped_is_an_outcome(train_spec, monkeypatch):
    spec = train_spec(train__moments="zero", optimizer__clip_grad_norm=1.0)
    session = MixTrainSession(spec)
    opened = session.workbench.open(unit_of(spec).checkpoint)
    real = type(opened).loss_and_gradient

    def broken(self, batch, meter):
        loss, grads = real(self, batch, meter)
        grads[0][0] = float("inf")
        return loss, grads

    monkeypatch.setattr(type(opened), "loss_and_gradient", broken)
    result = session.measure(unit_of(spec))
    assert result.outcome == "diverged"
    assert result.num_steps == 0


def test_errors_name_what_is_wrong_and_leave_the_model_alone(train_spec, series, tmp_path):
    spec = train_spec(train__steps=500)
    session = MixTrainSession(spec)
    with pytest.raises(BatchError, match="has too few documents"):
        session.measure(unit_of(spec))
    assert all(torch.equal(s.live, s.base) for s in session.workbench._resident[0].shards)
    with pytest.raises(ConfigError, match="needs both"):
        session.measure(unit_of(spec).model_copy(update={"ratio": None}))
    wanted = train_spec(optimizer={"moments": "checkpoint"})
    bare = tmp_path / "step-20"
    bare.mkdir()
    for file in (series.directory / "step-20").iterdir():
        if not file.name.startswith(("optimizer", "training_state")):
            (bare / file.name).write_bytes(file.read_bytes())
    unit = unit_of(train_spec(checkpoints={"source": "local", "path": str(bare)}))
    with pytest.raises(CheckpointError, match="adamw direction needs exp_avg_sq"):
        MixTrainSession(wanted).measure(unit)


def test_a_checkpoint_that_has_diverged_is_refused(train_spec, monkeypatch):
    spec = train_spec()
    session = MixTrainSession(spec)
    real = session.workbench.open

    def broken(checkpoint):
        opened = real(checkpoint)
        for shard in opened.model.shards:
            shard.base.fill_(float("nan"))
            shard.live.copy_(shard.base)
        return opened

    monkeypatch.setattr(session.workbench, "open", broken)
    with pytest.raises(NonFiniteLossError, match="walks_task"):
        session.measure(unit_of(spec))


def test_the_learning_rate_rises_and_stays():
    grid = TrainGrid(ratios=[0.5], learning_rates=[1.0], steps=5, warmup_steps=4)
    assert learning_rates(grid, 8.0) == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert learning_rates(grid.model_copy(update={"warmup_steps": 0}), 8.0) == [8.0] * 5


def on_two_ranks(spec, unit, directory):
    file = directory / "spec.json"
    file.write_text(spec.model_dump_json())
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(file), unit.model_dump_json(), str(rank), "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            output, _ = rank.communicate(timeout=240)
            assert rank.returncode == 0, output
    finally:
        for rank in ranks:
            rank.kill()
    files = [directory / f"result-{rank}.json" for rank in range(2)]
    return [MixTrainUnitResult.model_validate_json(file.read_text()) for file in files]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        (
            "fsdp2",
            {"optimizer": {"betas": [0.9, 0.95], "moments": "checkpoint", "clip_grad_norm": 0.3}},
        ),
        ("fsdp2", {"model": {"dtype": "bfloat16"}}),
        ("deepspeed", {}),
    ],
    ids=["saved moments, clipped", "bf16, accumulated moments", "deepspeed"],
)
def test_two_ranks_train_as_one_process_does(train_spec, tmp_path, backend, changes):
    spec = train_spec(**changes)
    alone = MixTrainSession(spec).measure(unit_of(spec))
    sharded = train_spec(**changes, parallel={"backend": backend, "ranks": 2})
    first, second = on_two_ranks(sharded, unit_of(sharded), tmp_path)
    assert first.tasks == second.tasks
    assert first.provenance.backend == backend
    assert first.outcome == alone.outcome == "finished"
    # fp32: sums in another order, through Adam's quotient. bf16: the ranks' micro-batches are
    # added in another order and what is gathered is rounded: some 1e-3 nats.
    rel = 1e-5 if "model" not in changes else 1e-3
    assert first.train_losses == pytest.approx(alone.train_losses, rel=rel)
    for ours, theirs in zip(first.tasks, alone.tasks, strict=True):
        assert ours.loss_end == pytest.approx(theirs.loss_end, rel=rel)
        assert ours.accuracy_count == theirs.accuracy_count
        # Two answers may sit on the fence.
        assert ours.accuracy_end == pytest.approx(
            theirs.accuracy_end, abs=2 / theirs.accuracy_count
        )
