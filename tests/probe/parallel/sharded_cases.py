"""Models, batches and the single process's numbers that every sharded back-end is held to."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from probe.batches.batch import make_batch
from probe.checkpoints import open_checkpoint, save_checkpoint
from probe.line_search import find_critical_learning_rate
from probe.loss import CausalLoss
from probe.moments import CheckpointMoments, WarmupMoments
from probe.parallel.single import SingleModel
from probe.perturb import Ray
from probe.progress import Meter
from probe.ray_search import RaySearch
from probe.result import CheckpointRef
from probe.spec import AdamW, MeasurementOptions
from probe.update import UpdateRule

ROOT = Path(__file__).resolve().parents[3]
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
    warm, warm_slope = warmed_up(model, optimizer, gradient)
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
        "warm_delta": dict(zip(names, warm, strict=True)),
        "warm_slope": warm_slope,
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


def warmed_up(model, optimizer, gradient):
    """The direction after moments that have seen the same gradient once before."""
    rule = UpdateRule(model, optimizer, WarmupMoments(model.shards, optimizer.betas, why="test"))
    rule.absorb([g.clone() for g in gradient])
    return rule.direction([g.clone() for g in gradient])


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


def run_ranks(script: Path, root: Path, world_size: int) -> list[Any]:
    """What each rank left behind; nothing of it may have gone to standard output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    children = [
        subprocess.Popen(
            [sys.executable, str(script), str(root), str(rank), str(world_size)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [child.communicate(timeout=TIMEOUT_S) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert [child.returncode for child in children] == [0] * world_size, outputs
    assert [printed for printed, _ in outputs] == [""] * world_size
    files = [root / f"found-{script.stem}-{world_size}-{rank}.pt" for rank in range(world_size)]
    return [torch.load(file, weights_only=True) for file in files]


def prepare(root: Path) -> SimpleNamespace:
    """Checkpoints and cases in a directory, and what one process finds for each case."""
    torch.set_num_threads(1)
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
