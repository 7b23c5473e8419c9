"""FSDP2 on 2 and 3 gloo ranks gives the single back-end's numbers, and each guard is needed."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from probe.batches.batch import make_batch
from probe.checkpoints import open_checkpoint, save_checkpoint
from probe.errors import CheckpointError, ConfigError, ParallelismError
from probe.line_search import find_critical_learning_rate
from probe.loss import CausalLoss
from probe.moments import CheckpointMoments
from probe.parallel.buffers import fill_buffers
from probe.parallel.fsdp2 import Fsdp2Model
from probe.parallel.islands import refuse_fp32_islands
from probe.parallel.single import SingleModel
from probe.perturb import Ray
from probe.progress import Meter
from probe.ray_search import RaySearch
from probe.result import CheckpointRef
from probe.spec import AdamW, MeasurementOptions
from probe.update import UpdateRule

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[3]
RANKS = Path(__file__).with_name("fsdp2_ranks.py")
CPU = torch.device("cpu")
TIMEOUT_S = 120
# Uneven over 2 and 3 ranks (97, 31, 20), and 4 rows over 3 ranks leave the last rank none.
OPTIONS: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 20,
    "intermediate_size": 31,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "eos_token_id": 1,
}
ETAS = [0.0, 1e-4, 1e-2, 1e-1, 1.0]
SEARCHES = ["bisect", "interpolate"]
CASES = [f"{m}-{d}" for m in ("plain", "tied") for d in ("float32", "bfloat16")]


def write_model(directory: Path, *, tied: bool) -> None:
    """An Olmo2 after two steps of AdamW, so that its moments are real."""
    torch.manual_seed(3)
    config = Olmo2Config(**OPTIONS, tie_word_embeddings=tied, attn_implementation="sdpa")
    model = Olmo2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        ids = torch.randint(97, (2, 16))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    save_checkpoint(model, directory, optimizer=optimizer)


def measure(directory: Path, dtype: torch.dtype, batch: Any) -> dict[str, Any]:
    """What the single back-end finds, and the case the ranks are given."""
    source = open_checkpoint(CheckpointRef(source="local", location=str(directory)))
    weights = source.load_model(torch.float32, "sdpa")
    runs = weights if dtype == torch.float32 else source.load_model(dtype, "sdpa")
    model = SingleModel(runs, weights, CPU)
    loss = CausalLoss(runs, micro_batch_sequences=2)
    means: list[float] = []
    grads = model.gradient(lambda: means.append(loss.backward(batch)))
    gradient = [g.clone() for g in grads]
    delta = [g / batch.loss_mask.sum() for g in gradient]
    slope = -sum(float((g.double() * d).sum()) for g, d in zip(gradient, delta, strict=True))
    slope /= int(batch.loss_mask.sum())
    optimizer = AdamW(clip_grad_norm=0.5, weight_decay=0.1)
    moments = CheckpointMoments(source, model.shards, label="here")
    adamw, adamw_slope = UpdateRule(model, optimizer, moments).direction(grads)
    losses, searches = along(model, loss, batch, delta, slope)
    names = [s.name for s in model.shards]
    truth = {
        "names": names,
        "base": {s.name: s.base for s in model.shards},
        "buffers": dict(runs.named_buffers()),
        "losses": losses,
        "searches": searches,
        "backward_mean": means[0],
        "gradient": dict(zip(names, gradient, strict=True)),
        "delta": dict(zip(names, adamw, strict=True)),
        "slope": adamw_slope,
    }
    case: dict[str, Any] = {
        "delta": dict(zip(names, delta, strict=True)),
        "slope": slope,
        "ids": batch.input_ids,
        "mask": batch.loss_mask,
        "micro_batch_sequences": 2,
        "etas": ETAS,
        "searches": SEARCHES,
    }
    truth["measured"] = measured(model, loss, case, delta)
    return {"truth": truth, "case": case}


def measured(model, loss, case, delta):
    """What the engine's own search records, wall clock left out."""
    batch = make_batch(case["ids"], case["mask"], [""] * len(case["ids"]))
    options = MeasurementOptions(loss_batch="update")
    result = RaySearch(model, loss, options, Meter(None), "update", None).run(
        repeat=0, delta=delta, slope=case["slope"], update_batch=batch, loss_batch=batch
    )
    return result.model_dump(mode="json", exclude={"duration_s"})


def along(model, loss, batch, delta, slope):
    """Per-sequence losses at every eta, and both searches."""
    ray = Ray([s.live for s in model.shards], [s.base for s in model.shards], delta, exact=True)
    losses = []
    for eta in ETAS:
        ray.move(eta)
        losses.append(list(loss.sums(batch).nll))

    def loss_at(eta: float) -> float:
        ray.move(eta)
        return loss.mean(batch)

    searches = {}
    for algorithm in SEARCHES:
        found = find_critical_learning_rate(
            loss_at, eta_init=1e-4, rel_tol=1 / 16, slope=slope, search=algorithm
        )
        assert found.outcome == "converged"
        searches[algorithm] = [found.outcome.value, found.eta_lower, found.eta_upper, *found.trials]
    return losses, searches


def run_ranks(root: Path, world_size: int) -> list[Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    children = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(root), str(rank), str(world_size)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        errors = [child.communicate(timeout=TIMEOUT_S)[1] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert [child.returncode for child in children] == [0] * world_size, "\n".join(errors)
    files = [root / f"found-{world_size}-{rank}.pt" for rank in range(world_size)]
    return [torch.load(file, weights_only=True) for file in files]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("fsdp2")
    generator = torch.Generator().manual_seed(1)
    # 9 sequences by 2: 5 micro-batches, the last half filled; uneven over 2 and over 3 ranks.
    ids = torch.randint(97, (9, 16), generator=generator)
    mask = torch.ones(9, 16, dtype=torch.bool)
    mask[:, 0] = False
    for row in range(9):
        mask[row, 16 - row :] = False
    batch = SimpleNamespace(input_ids=ids, loss_mask=mask)
    truths, cases = {}, {}
    for name in CASES:
        model, dtype = name.split("-")
        if not (root / model).exists():
            write_model(root / model, tied=model == "tied")
        found = measure(root / model, getattr(torch, dtype), batch)
        truths[name] = found["truth"]
        cases[name] = {**found["case"], "model": model, "dtype": dtype}
    write_model(root / "wrong", tied=False)
    config = root / "wrong" / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 97', '"vocab_size": 96'))
    torch.save(cases, root / "cases.pt")
    return SimpleNamespace(root=root, truths=truths)


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def gang(request: pytest.FixtureRequest, prepared: SimpleNamespace) -> SimpleNamespace:
    ranks = run_ranks(prepared.root, request.param)
    return SimpleNamespace(ranks=ranks, truths=prepared.truths)


def joined(ranks: list[Any], name: str, values: str) -> dict[str, torch.Tensor]:
    """Flat parameters put together from what each rank holds; ranges must meet exactly."""
    whole: dict[str, list[torch.Tensor]] = {}
    for rank in ranks:
        for (fqn, lo, hi, _), value in zip(rank[name]["shards"], rank[name][values], strict=True):
            parts = whole.setdefault(fqn, [])
            assert lo == sum(p.numel() for p in parts)
            assert hi - lo == (value[3] if values == "shards" else value).numel()
            parts.append(value[3] if values == "shards" else value)
    return {fqn: torch.cat(parts) for fqn, parts in whole.items()}


@pytest.mark.parametrize("name", CASES)
def test_losses_along_the_ray_are_identical(gang, name):
    for rank in gang.ranks:
        assert rank[name]["losses"] == gang.truths[name]["losses"]
        assert rank[name]["losses_again"] == gang.truths[name]["losses"][:2]
        assert rank[name]["losses_after_backward"] == gang.truths[name]["losses"][:2]
        assert rank[name]["head_path"] == "chunked"
        assert rank[name]["unseen"] == []


@pytest.mark.parametrize("name", CASES)
def test_brackets_and_trials_are_identical(gang, name):
    for rank in gang.ranks:
        assert rank[name]["searches"] == gang.truths[name]["searches"]


@pytest.mark.parametrize("name", CASES)
def test_the_engines_search_records_the_same(gang, name):
    # The loss resolution is bf16's too, though FSDP2's live shards are fp32.
    assert gang.truths[name]["measured"]["outcome"] == "converged"
    for rank in gang.ranks:
        assert rank[name]["measured"] == gang.truths[name]["measured"]


@pytest.mark.parametrize("name", CASES)
def test_the_base_is_the_checkpoint_in_fp32_and_is_restored(gang, name):
    truth = gang.truths[name]
    base = joined(gang.ranks, name, "shards")
    assert base.keys() == truth["base"].keys()
    for fqn, value in truth["base"].items():
        assert base[fqn].dtype == torch.float32
        assert torch.equal(base[fqn], value), fqn
    for rank in gang.ranks:
        assert rank[name]["restored"]
        assert rank[name]["buffers"].keys() == truth["buffers"].keys()
        for fqn, buffer in truth["buffers"].items():
            assert torch.equal(rank[name]["buffers"][fqn], buffer), fqn


@pytest.mark.parametrize("name", CASES)
def test_no_rank_reads_more_than_its_rows(gang, name):
    for rank in gang.ranks:
        own = {fqn: hi - lo for fqn, lo, hi, _ in rank[name]["shards"]}
        assert rank[name]["num_read"] == own
    total = sum(v.numel() for v in gang.truths[name]["base"].values())
    assert sum(sum(rank[name]["num_read"].values()) for rank in gang.ranks) == total
    assert {rank[name]["num_parameters"] for rank in gang.ranks} == {total}


@pytest.mark.parametrize("name", CASES)
def test_gradients_agree_to_rounding(gang, name):
    # Both add the same 5 fp32 micro-batch gradients, in another order: at most 4 roundings
    # of partial sums, which are no larger than a few times the largest element.
    truth = gang.truths[name]
    found = joined(gang.ranks, name, "gradient")
    for fqn, gradient in truth["gradient"].items():
        assert found[fqn].dtype == torch.float32
        torch.testing.assert_close(
            found[fqn], gradient, rtol=0, atol=16 * 2**-24 * gradient.abs().max().item()
        )
    for rank in gang.ranks:
        assert rank[name]["backward_mean"] == truth["backward_mean"]


@pytest.mark.parametrize("name", CASES)
def test_clip_direction_and_slope_are_of_the_whole_gradient(gang, name):
    truth = gang.truths[name]
    assert len({rank[name]["slope"] for rank in gang.ranks}) == 1
    # First order in the gradient's relative error of about 1e-6.
    assert gang.ranks[0][name]["slope"] == pytest.approx(truth["slope"], rel=1e-5)
    found = joined(gang.ranks, name, "delta")
    for fqn, delta in truth["delta"].items():
        torch.testing.assert_close(
            found[fqn], delta, rtol=1e-4, atol=1e-5 * delta.abs().max().item()
        )


def test_every_rank_runs_as_many_passes(gang):
    num_ranks = len(gang.ranks)
    rounds = -(-5 // num_ranks)
    for rank in gang.ranks:
        assert rank["plain-float32"]["num_passes"] == rounds * len(ETAS)


def test_a_group_left_gathered_answers_with_old_weights_unless_pushed(gang):
    truth = gang.truths["plain-float32"]["losses"]
    for rank in gang.ranks:
        assert rank["traps"]["kept_gathered_but_pushed"] == truth
        assert rank["traps"]["kept_gathered_not_pushed"] != truth


def test_shards_taken_before_the_lazy_set_up_are_not_what_is_run(gang):
    truth = gang.truths["plain-float32"]["losses"]
    for rank in gang.ranks:
        assert rank["traps"]["captured_late"] == truth  # after the warm-up pass, as the code does
        assert rank["traps"]["captured_early"] != truth


def test_shards_that_are_not_fsdps_own_are_noticed(gang):
    for rank in gang.ranks:
        assert rank["traps"]["not_fsdps_own"] == "parallelism_error"


def test_cast_forward_inputs_would_change_bf16_losses(gang):
    for rank in gang.ranks:
        assert rank["traps"]["inputs_cast"] != gang.truths["plain-bfloat16"]["losses"]


def test_buffers_outside_the_checkpoint_must_be_filled(gang):
    for rank in gang.ranks:
        assert rank["traps"]["buffers_not_filled"] != gang.truths["plain-float32"]["losses"]


def test_a_failure_on_one_rank_is_raised_on_all(gang):
    for index, rank in enumerate(gang.ranks):
        code, message = rank["refusals"]["one_rank_cannot_read"]
        assert code == ("checkpoint_error" if index == 1 else "parallelism_error")
        assert ("cannot read model.norm.weight" if index == 1 else "rank 1") in message


def test_a_weight_of_another_size_is_refused(gang):
    for rank in gang.ranks:
        code, message = rank["refusals"]["wrong_size"]
        assert code == "checkpoint_error"
        assert "'model.embed_tokens.weight' has shape [97, 20], expected [96, 20]" in message


def skeleton_of(directory):
    ref = CheckpointRef(source="local", location=str(directory))
    return open_checkpoint(ref).skeleton("sdpa")


def test_without_a_process_group_the_error_says_what_to_start():
    with pytest.raises(ParallelismError, match="torchrun"):
        Fsdp2Model(None, None, CPU, dtype=torch.float32)


def test_a_buffer_nobody_can_recompute_is_refused(prepared):
    model = skeleton_of(prepared.root / "plain").to_empty(device="cpu")
    model.model.register_buffer("mask", torch.ones(3), persistent=False)
    with pytest.raises(CheckpointError, match=r"model\.mask is in no checkpoint"):
        fill_buffers(model)


def test_weights_kept_in_fp32_are_refused_under_half_precision(prepared):
    model = skeleton_of(prepared.root / "plain")
    model._keep_in_fp32_modules = ["norm"]
    refuse_fp32_islands(model, torch.float32)
    with pytest.raises(ConfigError, match="keeps norm in float32"):
        refuse_fp32_islands(model, torch.bfloat16)


def test_an_architecture_nobody_knows_is_a_checkpoint_error(tmp_path):
    write_model(tmp_path / "model", tied=False)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(CheckpointError, match=r"config\.json: not usable"):
        skeleton_of(tmp_path / "model")
