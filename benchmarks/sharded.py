"""What sharding costs: memory per rank and seconds, single process against FSDP2 and ZeRO-3.

An OLMo-2 of 400 million random fp32 weights is loaded, given a gradient and an AdamW direction, and
moved along it. A perturbation is one point of the ray: theta - eta delta written into this rank's
shards, and every gathered copy dropped. Passes and perturbations alternate; medians. Memory is
anonymous resident memory (what a rank holds itself, mapped checkpoint pages left out), measured
above what the process held before the load. On a CPU with gloo, one thread per rank:

    python benchmarks/sharded.py [--quick] [--ranks 2]

Ends with RESULT lines: the perturbation as a share of a pass, and each back-end's losses against
the single process. Exits 1 when one is short of its target.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Olmo2Config, Olmo2ForCausalLM

from probe.batches.batch import make_batch
from probe.checkpoints import open_checkpoint, save_checkpoint
from probe.moments import WarmupMoments
from probe.parallel.resident import ResidentModel
from probe.perturb import Ray
from probe.result import CheckpointRef
from probe.spec import AdamW
from probe.update import UpdateRule

BACKENDS = ("single", "fsdp2", "deepspeed")
PERTURBATION_TARGET = 0.05
ETAS = (0.0, 1e-4, 1e-2)
MIB = 2**20
TIMEOUT_S = 1800


def write_checkpoint(directory: Path, quick: bool) -> None:
    width, num_layers, vocabulary = (256, 4, 8_003) if quick else (1024, 16, 65_003)
    torch.manual_seed(0)
    config = Olmo2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=1024,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    save_checkpoint(Olmo2ForCausalLM(config), directory)


def held_bytes() -> int:
    """Anonymous resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def timed(work: Callable[[], object]) -> float:
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(directory: Path, backend: str, args: argparse.Namespace) -> dict[str, Any]:
    """One rank's numbers; every rank calls it."""
    source = open_checkpoint(CheckpointRef(source="local", location=str(directory)))
    models = ResidentModel(
        device=torch.device("cpu"),
        dtype=torch.float32,
        attention="sdpa",
        micro_batch_sequences=1,
        backend=backend,
    )
    before = held_bytes()
    found: dict[str, Any] = {"load_s": timed(lambda: models.load(source))}
    model, loss = models.load(source)
    found |= {"num_parameters": model.num_parameters, "held_after_load": held_bytes() - before}
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.model.config.vocab_size
    ids = torch.randint(vocabulary, (args.sequences, args.length), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    batch = make_batch(ids, mask, [""] * args.sequences)
    optimizer = AdamW()
    rule = UpdateRule(
        model, optimizer, WarmupMoments(model.shards, optimizer.betas, why="asked for")
    )
    grads: list[Tensor | None] = []
    found["gradient_s"] = timed(lambda: grads.extend(model.gradient(lambda: loss.backward(batch))))
    for grad in grads:
        if grad is not None:
            grad.div_(batch.num_targets)
    delta: list[Tensor] = []
    found["direction_s"] = timed(lambda: delta.extend(rule.direction(grads)[0]))
    found["held_with_direction"] = held_bytes() - before
    ray = Ray([s.live for s in model.shards], [s.base for s in model.shards], delta, exact=True)

    def point(eta: float) -> None:
        ray.move(eta)
        model.push()

    point(1e-6), loss.mean(batch)
    perturbations, passes = [], []
    for _ in range(args.repeats):
        perturbations.append(timed(lambda: point(1e-6)))
        passes.append(timed(lambda: loss.mean(batch)))
    found |= {
        "perturbation_s": statistics.median(perturbations),
        "pass_s": statistics.median(passes),
    }
    # A direction that does not depend on the order gradients are added in.
    signs = [s.base.sign() for s in model.shards]
    exact = Ray([s.live for s in model.shards], [s.base for s in model.shards], signs, exact=True)
    losses = []
    for eta in ETAS:
        exact.move(eta)
        model.push()
        losses.append(list(loss.sums(batch).nll))
    return found | {"losses": losses}


def run_rank(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    root = Path(args.directory)
    if args.world_size > 1:
        store = f"file://{root}/store-{args.backend}"
        limit = timedelta(seconds=TIMEOUT_S)
        world = {"rank": args.rank, "world_size": args.world_size}
        if args.backend == "deepspeed":
            os.environ |= {"RANK": str(args.rank), "LOCAL_RANK": str(args.rank)}
        dist.init_process_group("gloo", init_method=store, timeout=limit, **world)
    found = measure(root / "checkpoint", args.backend, args)
    (root / f"{args.backend}-{args.rank}.json").write_text(json.dumps(found))
    if args.world_size > 1:
        dist.barrier()
        os._exit(0)  # gloo's threads can abort the process while Python shuts down


def run_backend(root: Path, backend: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Start its ranks, wait, and collect what they found."""
    world_size = 1 if backend == "single" else args.ranks
    children = []
    for rank in range(world_size):
        command = [sys.executable, __file__, "--directory", str(root), "--backend", backend]
        command += ["--rank", str(rank), "--world-size", str(world_size)]
        command += ["--sequences", str(args.sequences), "--length", str(args.length)]
        command += ["--repeats", str(args.repeats)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        children.append(subprocess.Popen(command, env=environment, stdout=sys.stderr))
    try:
        codes = [child.wait(timeout=TIMEOUT_S) for child in children]
    finally:
        for child in children:
            child.kill()
    if any(codes):
        raise SystemExit(f"{backend}: ranks ended with {codes}")
    return [json.loads((root / f"{backend}-{r}.json").read_text()) for r in range(world_size)]


def show(backend: str, ranks: list[dict[str, Any]]) -> None:
    """One line of memory and one of seconds; the slowest, largest rank."""
    worst = {key: max(rank[key] for rank in ranks) for key in ranks[0] if key != "losses"}
    per_parameter = worst["held_with_direction"] * len(ranks) / worst["num_parameters"]
    print(
        f"{backend:<10} {len(ranks)} rank(s)  held per rank: {worst['held_after_load'] / MIB:7.0f} "
        f"MiB loaded, {worst['held_with_direction'] / MIB:7.0f} MiB with moments and direction "
        f"({per_parameter:.1f} bytes x parameters / ranks)"
    )
    print(
        f"{'':<10} load {worst['load_s']:.2f} s, gradient {worst['gradient_s']:.2f} s, direction "
        f"{worst['direction_s']:.2f} s, perturbation {worst['perturbation_s']:.3f} s, pass "
        f"{worst['pass_s']:.2f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8M parameters, short sequences")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--repeats", type=int, default=5)
    for internal in ("--directory", "--backend"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    for internal in ("--rank", "--world-size"):
        parser.add_argument(internal, type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.backend:
        run_rank(args)
        return 0
    sys.stdout.reconfigure(line_buffering=True)
    short = False
    rows = []
    with tempfile.TemporaryDirectory() as root:
        write_checkpoint(Path(root) / "checkpoint", args.quick)
        found = {backend: run_backend(Path(root), backend, args) for backend in BACKENDS}
    size = found["single"][0]["num_parameters"] / 1e6
    print(f"{size:.1f}M parameters, fp32, {args.sequences} x {args.length} tokens")
    for backend, ranks in found.items():
        show(backend, ranks)
        slowest = max(ranks, key=lambda rank: rank["perturbation_s"] / rank["pass_s"])
        row = (slowest["perturbation_s"], slowest["pass_s"], PERTURBATION_TARGET)
        rows.append((f"{backend}_perturbation", *row))
        if backend != "single":
            rows.append((f"{backend}_loss_difference", gap(ranks, found["single"][0]), 1.0, 0.0))
    for name, value, baseline, target in rows:
        ratio = value / baseline
        short = short or ratio > target
        print(
            f"RESULT {name} value={value:.4g} baseline={baseline:.4g} ratio={ratio:.4g} "
            f"target={target} {'ok' if ratio <= target else 'short'}"
        )
    return 1 if short else 0


def gap(ranks: list[dict[str, Any]], single: dict[str, Any]) -> float:
    """Largest difference of a per-sequence loss from the single process, in nats."""
    pairs = (
        (a, b)
        for rank in ranks
        for mine, theirs in zip(rank["losses"], single["losses"], strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )
    return max(abs(a - b) for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main())
