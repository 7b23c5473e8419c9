"""A mix scan on a real checkpoint, against AdamW and autograd on a dense fp64 twin."""

import json
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from probe.errors import BatchError
from probe.line_search import SearchOutcome
from probe.mix_engine import MixSession
from probe.mix_summary import summarise_scans
from probe.result import Unit
from probe.series import list_checkpoints
from probe.spec_mix import MixScanSpec
from probe.workbench import Opened

SHARES = {0.0: [0.0, 1.0], 0.3: [0.3, 0.7], 1.0: [1.0, 0.0]}


@pytest.fixture
def scan_spec(raw_scan):
    return lambda **changes: MixScanSpec.model_validate(raw_scan(**changes))


def unit_of(spec, ratio=None):
    (checkpoint,) = list_checkpoints(spec.checkpoints)
    return Unit(index=0, unit_id="0000", checkpoint=checkpoint, ratio=ratio)


class Dense:
    """The slow twin in fp64: autograd for gradients, torch's AdamW for directions."""

    def __init__(self, series, dense_loss, spec):
        model = AutoModelForCausalLM.from_pretrained(series.directory / "step-20")
        self.model = model.double().eval()
        self.base = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self._loss, self._spec = dense_loss, spec

    def loss(self, batch, eta=0.0, delta=None):
        at = {n: b if delta is None else b - eta * delta[n] for n, b in self.base.items()}
        return float(self._loss(self.model, at, batch))

    def gradient(self, batch):
        at = {n: b.clone().requires_grad_() for n, b in self.base.items()}
        loss = self._loss(self.model, at, batch)
        return dict(zip(at, torch.autograd.grad(loss, list(at.values())), strict=True))

    def delta(self, steps):
        """What AdamW subtracts at the last of these gradients over its lr, parameters held."""
        options = self._spec.optimizer
        parameters = {n: torch.nn.Parameter(b.clone()) for n, b in self.base.items()}
        groups = [
            {"params": [p], "weight_decay": 0.0 if "embed_tokens" in n else options.weight_decay}
            for n, p in parameters.items()
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=options.betas, eps=options.eps)
        for index, grads in enumerate(steps):
            for name, parameter in parameters.items():
                parameter.grad = grads[name]
            for group in optimizer.param_groups:
                group["lr"] = 1.0 if index == len(steps) - 1 else 0.0
            optimizer.step()
        return {n: self.base[n] - p.detach() for n, p in parameters.items()}


def combined(shares, by_source):
    return {n: sum(s * g[n] for s, g in zip(shares, by_source, strict=True)) for n in by_source[0]}


def check(dense, measurement, delta, task_batch):
    """The recorded search is one of the true loss along the true direction."""
    slope = -sum(float((delta[n] * g).sum()) for n, g in dense.gradient(task_batch).items())
    assert measurement.slope == pytest.approx(slope, rel=2e-3, abs=1e-6)
    if measurement.outcome is SearchOutcome.NOT_A_DESCENT_DIRECTION:
        assert slope >= 0
        return
    assert measurement.outcome is SearchOutcome.CONVERGED
    at_zero = dense.loss(task_batch)
    assert measurement.loss_at_zero == pytest.approx(at_zero, rel=1e-5)
    # Beyond the bracket's ends by more than the rounding of an fp32 loss.
    slack = measurement.loss_resolution
    assert dense.loss(task_batch, measurement.eta_lower * (1 - 1e-3), delta) <= at_zero + slack
    assert dense.loss(task_batch, measurement.eta_upper * (1 + 1e-3), delta) > at_zero - slack


def test_shared_gradients_give_adamw_on_the_weighted_gradients(series, dense_loss, scan_spec):
    spec = scan_spec()
    session = MixSession(spec)
    result = session.measure(unit_of(spec))
    batches, dense = session.workbench._batches, Dense(series, dense_loss, spec)
    gradients = [
        [dense.gradient(batches.source_step(source, step)) for source in (0, 1)]
        for step in range(5)
    ]
    assert len(result.measurements) == 2 * 3 * 2
    for measurement in result.measurements:
        shares = SHARES[measurement.ratio]
        assert measurement.shares == pytest.approx(shares)
        steps = [combined(shares, by_source) for by_source in gradients[: 4 + measurement.repeat]]
        check(dense, measurement, dense.delta(steps), batches.task(measurement.task))
        step = 3 + measurement.repeat
        assert measurement.update_batch_sha256 == [
            batches.source_step(source, step).sha256 for source in (0, 1)
        ]
    assert result.num_backward_passes == 2 + 2 * (3 + 2)  # tasks, then sources x steps
    assert result.provenance.moments == "warmup"
    assert "3 steps of every source" in result.provenance.moments_detail


def test_three_sources_of_which_two_keep_their_proportions(
    series, other_text, dense_loss, scan_spec, tmp_path
):
    third = tmp_path / "third.jsonl"
    lines = [json.loads(line)["text"].split() for line in other_text.read_text().splitlines()]
    third.write_text("".join(json.dumps({"text": " ".join(w[::-1])}) + "\n" for w in lines))
    sources = [
        {"type": "files", "name": name, "paths": [str(path)], "share": share}
        for name, path, share in [
            ("other", other_text, 1.0),
            ("walks", series.text, 7.0),  # varied: its share says nothing
            ("third", third, 3.0),
        ]
    ]
    spec = scan_spec(mixture={"sources": sources, "varied": "walks", "ratios": [0.2, 0.6]})
    session = MixSession(spec)
    result = session.measure(unit_of(spec))
    batches, dense = session.workbench._batches, Dense(series, dense_loss, spec)
    gradients = [
        [dense.gradient(batches.source_step(source, step)) for source in range(3)]
        for step in range(5)
    ]
    assert result.num_backward_passes == 2 + 3 * (3 + 2)
    shares_at = {0.2: [0.2, 0.2, 0.6], 0.6: [0.1, 0.6, 0.3]}
    for measurement in result.measurements:
        shares = shares_at[measurement.ratio]
        assert measurement.shares == pytest.approx(shares)
        steps = [combined(shares, by_source) for by_source in gradients[: 4 + measurement.repeat]]
        check(dense, measurement, dense.delta(steps), batches.task(measurement.task))


def test_exact_gradients_are_those_of_batches_mixed_at_the_ratio(series, dense_loss, scan_spec):
    spec = scan_spec(mixture__gradients="exact", mixture__ratios=[0.25])
    session = MixSession(spec)
    result = session.measure(unit_of(spec, ratio=0.25))
    batches, dense = session.workbench._batches, Dense(series, dense_loss, spec)
    mixed = [batches.mixed_step([0.25, 0.75], step) for step in range(5)]
    assert sorted(mixed[0].source_names) == ["other", "other", "other", "walks"]
    gradients = [dense.gradient(batch) for batch in mixed]
    assert {m.ratio for m in result.measurements} == {0.25}
    for measurement in result.measurements:
        delta = dense.delta(gradients[: 4 + measurement.repeat])
        check(dense, measurement, delta, batches.task(measurement.task))


def test_shared_and_exact_agree_where_no_batch_differs_from_another(
    series, other_text, scan_spec, tmp_path
):
    """One document a source, its words repeating with the sequences: every sequence is the same."""
    sources = []
    for name, step in [("up", 1), ("down", 94)]:
        words = " ".join(f"w{(7 + k * step) % 95 + 2}" for k in range(32))
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps({"text": " ".join([words] * 40)}) + "\n")
        sources.append({"type": "files", "name": name, "paths": [str(file)]})

    def measured(gradients):
        mixture = {"sources": sources, "ratios": [0.25], "gradients": gradients}
        spec = scan_spec(mixture=mixture)
        unit = unit_of(spec, ratio=0.25 if gradients == "exact" else None)
        return MixSession(spec).measure(unit).measurements

    shared, exact = measured("shared"), measured("exact")
    assert len({m.update_batch_sha256[0] for m in exact}) == 1  # of both repeats
    assert SearchOutcome.CONVERGED in {m.outcome for m in shared}
    for ours, theirs in zip(shared, exact, strict=True):
        assert (ours.task, ours.outcome) == (theirs.task, theirs.outcome)
        assert ours.loss_at_zero == theirs.loss_at_zero
        # Where the sources' gradients cancel, AdamW turns their fp32 rounding into whole steps.
        assert ours.slope == pytest.approx(theirs.slope, rel=2e-3)
        if ours.eta_c is not None:
            assert ours.eta_c == pytest.approx(theirs.eta_c, rel=1e-2)


def test_saved_moments_start_every_repeat(series, dense_loss, scan_spec):
    spec = scan_spec(optimizer={"betas": [0.9, 0.95], "moments": "checkpoint"})
    session = MixSession(spec)
    result = session.measure(unit_of(spec))
    assert result.provenance.moments == "checkpoint"
    assert result.num_backward_passes == 2 + 2 * 2
    exact = scan_spec(
        optimizer={"betas": [0.9, 0.95], "moments": "checkpoint"},
        mixture__gradients="exact",
        mixture__ratios=[1.0],
    )
    one = MixSession(exact).measure(unit_of(exact, ratio=1.0))
    shared = [m for m in result.measurements if m.ratio == 1.0]
    for ours, theirs in zip(shared, one.measurements, strict=True):
        assert ours.slope == pytest.approx(theirs.slope, rel=1e-5)
        assert ours.outcome == theirs.outcome
        if ours.lambda_c is not None:
            assert ours.lambda_c == pytest.approx(theirs.lambda_c, rel=1 / 8)


@pytest.mark.parametrize(
    ("gradients", "moments", "at_once"),
    [
        ("shared", "warmup", [0, 1]),  # a step's first source, then its second beside the first
        ("shared", "checkpoint", [0, 1]),
        ("exact", "warmup", [0]),
        ("exact", "checkpoint", [0]),
    ],
)
def test_no_gradient_outlives_its_step(scan_spec, monkeypatch, gradients, moments, at_once):
    """What a plan's memory counts on: how many stand beside the tasks' when another is made."""
    made, beside = [], []
    gradient = Opened.gradient

    def counted(self, batch, meter):
        beside.append(sum(earlier() is not None for earlier in made))
        grads = gradient(self, batch, meter)
        made.append(weakref.ref(grads[0]))
        return grads

    monkeypatch.setattr(Opened, "gradient", counted)
    spec = scan_spec(
        mixture__gradients=gradients,
        mixture__ratios=[0.5],
        optimizer={"betas": [0.9, 0.95], "warmup_steps": 3, "moments": moments},
    )
    MixSession(spec).measure(unit_of(spec, ratio=0.5 if gradients == "exact" else None))
    num_steps = 2 + (3 if moments == "warmup" else 0)
    assert beside == [0, 1] + [2 + n for n in at_once] * num_steps


def test_a_scan_repeats_and_leaves_the_model_as_it_was(scan_spec):
    spec = scan_spec()
    session = MixSession(spec)
    first = session.measure(unit_of(spec))
    model = session.workbench._resident[0]
    assert all(torch.equal(s.live, s.base) for s in model.shards)
    again = session.measure(unit_of(spec))

    def numbers(result):
        return [m.model_dump(exclude={"duration_s"}) for m in result.measurements]

    assert numbers(first) == numbers(again)


def test_further_ratios_lie_beside_the_best_and_are_measured_in_every_repeat(scan_spec):
    spec = scan_spec(mixture__refine=2, mixture__ratios=[0.0, 0.5, 1.0])
    result = MixSession(spec).measure(unit_of(spec))
    (scan,) = summarise_scans([result])
    ratios = sorted({p.ratio for p in scan.points})
    assert len(ratios) == 5
    assert {p.num_repeats for p in scan.points} == {2}
    assert scan.sweet_spot is None or scan.sweet_spot.ratio in ratios


def test_tasks_and_updates_share_no_document(scan_spec):
    spec = scan_spec()
    session = MixSession(spec)
    session.measure(unit_of(spec))
    batches = session.workbench._batches
    task_rows = {tuple(row) for row in batches.task("walks_task").input_ids.tolist()}
    for step in range(5):
        rows = {tuple(row) for row in batches.source_step(0, step).input_ids.tolist()}
        assert not rows & task_rows


def test_a_source_that_runs_out_says_so(scan_spec):
    spec = scan_spec(optimizer={"warmup_steps": 500})
    with pytest.raises(BatchError, match="source 'walks' has too few documents"):
        MixSession(spec).measure(unit_of(spec))


def test_bf16_buffers_and_a_bf16_forward_stay_near_fp32(scan_spec):
    """Measured here: 0.6 % of eta where buffers are rounded, 3 % where every loss is."""

    def measured(**changes):
        spec = scan_spec(**changes)
        return MixSession(spec).measure(unit_of(spec))

    single = measured()
    buffers = measured(mixture__buffers="bfloat16")
    forward = measured(model={"dtype": "bfloat16"})
    assert "kept in bfloat16" in buffers.provenance.moments_detail
    assert forward.provenance.dtype == "bfloat16"
    for result, tolerance in ((buffers, 0.01), (forward, 0.05)):
        num_compared = 0
        for rounded, truth in zip(result.measurements, single.measurements, strict=True):
            assert rounded.slope != truth.slope
            # Nearly at right angles to the gradient, a slope is a difference of large numbers.
            assert rounded.slope == pytest.approx(truth.slope, rel=tolerance, abs=0.02)
            if truth.slope < -1:
                num_compared += 1
                assert rounded.eta_interpolated == pytest.approx(
                    truth.eta_interpolated, rel=tolerance
                )
        assert num_compared >= 8
