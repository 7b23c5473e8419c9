"""A session on real checkpoint directories, against a dense twin that shares none of its code."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from probe.checkpoints import open_checkpoint
from probe.engine import Session
from probe.errors import (
    CheckpointError,
    ConfigError,
    DirectionError,
    NonFiniteLossError,
    OutOfMemoryError,
)
from probe.line_search import SearchOutcome
from probe.loss import CausalLoss
from probe.plan import expand_units, make_plan
from probe.result import UnitResult, eta_init_hint
from probe.spec_load import parse_spec, spec_sha256
from probe.workbench import check_vocabulary


def open_session(series, **changes):
    spec = parse_spec(series.spec(**changes))
    return Session(spec), expand_units(spec)


def numbers(result: UnitResult) -> dict:
    """Everything of a result that must repeat."""
    kept = result.model_dump(mode="json")
    for volatile in ("duration_s", "memory_bytes", "provenance"):
        kept.pop(volatile)
    for measurement in kept["measurements"]:
        measurement.pop("duration_s")
    return kept


@pytest.fixture
def dense_ray(series, dense_loss):
    """Loss along the ray of a real torch AdamW step from the saved state, in plain torch."""

    def build(step, update, loss_batch):
        directory = series.directory / f"step-{step}"
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        state = load_file(directory / "optimizer.safetensors")
        groups = [
            {"params": [p], "weight_decay": 0.0 if "embed_tokens" in n else 0.1}
            for n, p in model.named_parameters()
        ]
        # At lr 1 the step is -delta itself, in which fp32 loses little.
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=series.betas, eps=1e-8)
        for name, parameter in model.named_parameters():
            optimizer.state[parameter] = {
                key: state[f"{name}.{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
            }
        base = {n: p.detach().clone() for n, p in model.named_parameters()}
        dense_loss(model, dict(model.named_parameters()), update).backward()
        optimizer.step()
        delta = {n: base[n] - p.detach() for n, p in model.named_parameters()}

        def loss_at(eta):
            at = {n: base[n] - eta * delta[n] for n in base}
            with torch.no_grad():
                return dense_loss(model, at, loss_batch).item()

        return model, base, delta, loss_at

    return build


@pytest.mark.parametrize("search", ["interpolate", "bisect"])
def test_eta_c_is_the_dense_crossing_of_a_real_adamw_step(series, dense_ray, search):
    session, units = open_session(series, measurement__search=search)
    result = session.measure(units[1])
    assert result.provenance.moments == "checkpoint"
    assert len(result.measurements) == 4
    for measurement in result.measurements:
        update = session.workbench._batches.update(3 + measurement.repeat)
        batch = (
            update if measurement.loss_batch == "update" else session.workbench._batches.held_out
        )
        assert measurement.update_batch_sha256 == update.sha256
        assert measurement.loss_batch_sha256 == batch.sha256
        *_, loss_at = dense_ray(12, update, batch)

        assert measurement.outcome is SearchOutcome.CONVERGED
        assert measurement.loss_at_zero == pytest.approx(loss_at(0.0), rel=1e-5)
        for eta, loss in measurement.trials:
            assert loss == pytest.approx(loss_at(eta), rel=1e-4)
        assert 1 - measurement.eta_lower / measurement.eta_upper <= 1 / 16
        assert loss_at(measurement.eta_lower * 0.999) <= loss_at(0.0)
        assert loss_at(measurement.eta_upper * 1.001) > loss_at(0.0)
        # The first crossing, by a scan of a fine grid.
        grid = [measurement.eta_upper * 1.1 * k / 60 for k in range(1, 61)]
        first = next(eta for eta in grid if loss_at(eta) > loss_at(0.0))
        assert measurement.eta_lower * 0.98 <= first <= measurement.eta_upper * 1.03


def test_slope_and_curvature_equal_autograd_on_the_dense_twin(series, dense_ray, dense_loss):
    session, units = open_session(series, measurement__repeats=1)
    result = session.measure(units[2])
    for measurement in result.measurements:
        update = session.workbench._batches.update(3)
        batch = (
            update if measurement.loss_batch == "update" else session.workbench._batches.held_out
        )
        model, base, delta, _ = dense_ray(20, update, batch)
        at = {n: b.clone().requires_grad_() for n, b in base.items()}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = dense_loss(model, at, batch)
        grads = torch.autograd.grad(loss, list(at.values()), create_graph=True)
        descent = sum((g * delta[n]).sum() for n, g in zip(at, grads, strict=True))
        bend = torch.autograd.grad(descent, list(at.values()))
        curvature = sum((h * delta[n]).sum().item() for n, h in zip(at, bend, strict=True))

        assert measurement.slope == pytest.approx(-descent.item(), rel=1e-3)
        # The even part of L along the session's own model: L(e) + L(-e) - 2 L0 = e^2 curvature.
        eta = 0.01 * measurement.eta_c
        moved = []
        for sign in (1, -1):
            for shard in session.workbench._resident[0].shards:
                step = delta[shard.name].flatten()
                shard.live.copy_(shard.base - sign * eta * step)
            moved.append(session.workbench._resident[1].mean(batch))
        bent = (sum(moved) - 2 * measurement.loss_at_zero) / eta**2
        assert bent == pytest.approx(curvature, rel=0.03)


def test_the_same_unit_gives_the_same_numbers_again(series):
    session, units = open_session(series)
    first = session.measure(units[0])
    session.measure(units[2])  # another checkpoint in between, in the same resident model
    again = session.measure(units[0])
    fresh = open_session(series)[0].measure(units[0])
    assert numbers(first) == numbers(again) == numbers(fresh)


def test_parameters_are_the_base_bit_for_bit_at_every_gradient(series, monkeypatch):
    session, units = open_session(series)
    seen = []
    real = CausalLoss.backward

    def checked(self, batch):
        stored = load_file(series.directory / "step-12" / "model.safetensors")
        for name, parameter in self.model.named_parameters():
            assert torch.equal(parameter, stored[name]), name
        seen.append(batch.sha256)
        return real(self, batch)

    monkeypatch.setattr(CausalLoss, "backward", checked)
    session.measure(units[1])
    assert len(seen) == 3  # two repeats and the held-out batch


def test_parameters_come_back_when_a_trial_raises(series, monkeypatch):
    session, units = open_session(series)
    real, calls = CausalLoss.mean, []

    def failing(self, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyError("a trial breaks")
        return real(self, batch)

    monkeypatch.setattr(CausalLoss, "mean", failing)
    with pytest.raises(KeyError):
        session.measure(units[0])
    model = session.workbench._resident[0]
    assert all(torch.equal(shard.live, shard.base) for shard in model.shards)


def test_passes_are_counted_as_they_are_run(series, monkeypatch):
    session, units = open_session(series, measurement__repeats=3, optimizer__moments="warmup")
    forward, backward = [], []
    real_mean, real_backward = CausalLoss.mean, CausalLoss.backward
    monkeypatch.setattr(
        CausalLoss, "mean", lambda self, batch: forward.append(1) or real_mean(self, batch)
    )
    monkeypatch.setattr(
        CausalLoss,
        "backward",
        lambda self, batch: backward.append(batch.sha256) or real_backward(self, batch),
    )
    result = session.measure(units[1])
    assert result.num_forward_passes == len(forward)
    # 3 to warm up, 1 for the held-out gradient, 1 per repeat; on successive, different batches.
    assert result.num_backward_passes == len(backward) == 7 == len(set(backward))
    # The measurements account for all but the two passes behind the loss resolution.
    assert sum(m.num_forward_passes for m in result.measurements) == len(forward) - 2
    for m in result.measurements:
        # L0 of the held-out batch is taken once per checkpoint, of update batches each time.
        at_zero = 0 if m.loss_batch == "held_out" and m.repeat > 0 else 1
        assert m.num_forward_passes == len(m.trials) + at_zero
    assert make_plan(session.spec).num_backward_passes == 3 * 7


def test_warmup_moments_when_there_is_no_optimizer_state(series, tmp_path):
    bare = tmp_path / "step-12"
    bare.mkdir()
    for file in (series.directory / "step-12").iterdir():
        if file.name != "optimizer.safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    session, units = open_session(series, checkpoints={"source": "local", "path": str(bare)})
    result = session.measure(units[0])
    assert result.provenance.moments == "warmup"
    assert "over 3 batches" in result.provenance.moments_detail
    with_state = open_session(series)
    same_batches = with_state[0].measure(with_state[1][1])
    # `auto` measures every checkpoint of a series on the same tokens, with or without moments.
    assert [m.update_batch_sha256 for m in result.measurements] == [
        m.update_batch_sha256 for m in same_batches.measurements
    ]
    strict = {"path": str(bare), "source": "local"}
    session, units = open_session(series, checkpoints=strict, optimizer__moments="checkpoint")
    with pytest.raises(CheckpointError, match=r"adamw direction needs exp_avg_sq .* has none"):
        session.measure(units[0])


def test_each_search_starts_from_the_last_answer_then_the_hint_then_the_spec(series):
    session, units = open_session(
        series, measurement__search="bisect", measurement__eta_init=0.5, measurement__repeats=2
    )
    first = session.measure(units[0])
    by_batch = {
        name: [m for m in first.measurements if m.loss_batch == name]
        for name in ("update", "held_out")
    }
    for measurements in by_batch.values():
        assert measurements[0].trials[0][0] == 0.5
        assert measurements[1].trials[0][0] == measurements[0].eta_c
    hint = eta_init_hint(first)
    assert hint == {name: ms[1].eta_c for name, ms in by_batch.items()}
    second = session.measure(units[1], eta_init=hint)
    for name in by_batch:
        begun = next(m for m in second.measurements if m.loss_batch == name)
        assert begun.trials[0][0] == hint[name]
    outside = session.measure(units[1], eta_init={"update": 1e99})
    assert outside.measurements[0].trials[0][0] == session.spec.measurement.eta_max


def test_bf16_runs_from_an_fp32_base(series):
    wide, units = open_session(series, measurement__repeats=1)
    half, _ = open_session(series, measurement__repeats=1, model={"dtype": "bfloat16"})
    full, rounded = wide.measure(units[1]), half.measure(units[1])
    stored = load_file(series.directory / "step-12" / "model.safetensors")
    for shard in half.workbench._resident[0].shards:
        assert shard.live.dtype == torch.bfloat16
        assert torch.equal(shard.base, stored[shard.name].flatten())
    assert rounded.provenance.dtype == "bfloat16"
    for ours, theirs in zip(rounded.measurements, full.measurements, strict=True):
        # bf16 forwards carry 1e-3 of noise; eta_c is where the loss crosses, not a rounding.
        assert ours.loss_at_zero == pytest.approx(theirs.loss_at_zero, rel=5e-3)
        assert ours.eta_c == pytest.approx(theirs.eta_c, rel=0.25)
        assert ours.loss_resolution > 1000 * theirs.loss_resolution


def test_a_result_says_where_it_came_from(series):
    events = []
    session, units = open_session(
        series, schedule={"type": "constant", "peak": 0.01}, measurement__repeats=1
    )
    result = session.measure(units[0], on_progress=events.append)
    found = result.provenance
    assert found.spec_sha256 == spec_sha256(session.spec)
    assert found.attention == "sdpa"
    assert found.head_path == "chunked"
    assert found.device == "cpu (1 threads)"
    assert found.versions["torch"] == torch.__version__
    assert found.num_parameters == sum(
        shard.base.numel() for shard in session.workbench._resident[0].shards
    )
    assert found.num_ranks == 1
    assert found.memory_kind
    assert result.memory_bytes > 4 * 3 * found.num_parameters
    assert result.stability_threshold == 200.0
    assert UnitResult.model_validate(json.loads(result.model_dump_json())) == result
    assert {event["phase"] for event in events} == {"load", "gradient", "search"}
    assert events[-1] == {
        "phase": "search", "done": 2, "total": 2,
        "num_forward_passes": result.num_forward_passes,
    }  # fmt: skip
    assert all(0 <= event["done"] <= event["total"] for event in events)
    assert [e["num_forward_passes"] for e in events] == sorted(
        e["num_forward_passes"] for e in events
    )


@pytest.fixture
def broken_series(series, tmp_path):
    """A copy of one checkpoint whose weights a function may spoil."""

    def build(spoil):
        target = tmp_path / "step-12"
        target.mkdir()
        for file in (series.directory / "step-12").iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        weights = load_file(target / "model.safetensors")
        spoil(weights)
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        return open_session(series, checkpoints={"source": "local", "path": str(target)})

    return build


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_checkpoint_is_an_error_not_a_number(broken_series, bad):
    def spoil(weights):
        weights["model.norm.weight"][3] = bad

    session, units = broken_series(spoil)
    with pytest.raises(NonFiniteLossError, match="so no ray can be measured") as caught:
        session.measure(units[0])
    assert caught.value.retryable is False


def test_a_gradient_that_overflows_is_an_error(series, monkeypatch):
    session, units = open_session(series)
    real = CausalLoss.backward

    def overflow(self, batch):
        value = real(self, batch)
        self.model.lm_head.weight.grad[0, 0] = math.inf
        return value

    monkeypatch.setattr(CausalLoss, "backward", overflow)
    with pytest.raises(DirectionError, match=r"lm_head\.weight"):
        session.measure(units[0])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    ids=["device", "python", "host"],
)
def test_out_of_memory_says_what_to_change(series, monkeypatch, error):
    def exhausted(self, batch):
        raise error

    session, units = open_session(series)
    monkeypatch.setattr(CausalLoss, "backward", exhausted)
    with pytest.raises(OutOfMemoryError, match="micro_batch_sequences is 2") as caught:
        session.measure(units[0])
    assert caught.value.code == "out_of_memory"


def test_other_runtime_errors_are_not_called_out_of_memory(series, monkeypatch):
    def broken(self, batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    session, units = open_session(series)
    monkeypatch.setattr(CausalLoss, "backward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        session.measure(units[0])


def test_a_tokenizer_larger_than_the_model_is_refused(broken_series, series, tmp_path):
    session, units = open_session(series)
    update = session.measure(units[0]) and session.workbench._batches.update(0)
    update.input_ids[0, 0] = 97
    with pytest.raises(ConfigError, match="token 97, the model has 97 embeddings"):
        check_vocabulary(update, session.workbench._resident[0].model)


def test_a_device_that_is_not_there_is_refused(series):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        open_session(series, model={"device": "cuda"})


def test_another_architecture_is_built_anew(series, tmp_path, tiny_model, monkeypatch):
    session, units = open_session(series)
    session.measure(units[0])
    model, loss = session.workbench._resident
    session.measure(units[1])
    assert session.workbench._resident == (model, loss)
    wider = tiny_model(intermediate_size=40)
    wider.save_pretrained(tmp_path / "other")
    source = open_checkpoint(
        units[0].checkpoint.model_copy(update={"location": str(tmp_path / "other")})
    )
    rebuilt, _ = session.workbench._models.load(source)
    assert rebuilt is not model
    assert rebuilt.num_parameters == sum(p.numel() for p in wider.parameters())
