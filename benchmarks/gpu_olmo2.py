"""OLMo-2 1B and 7B on one GPU: seconds, peak memory, and how busy the card is.

The architectures are OLMo-2's, the weights are random: speed and memory do not depend on them,
losses do, so none is reported. Each model is written as a bf16 checkpoint and then goes the way of
a job: load, AdamW moments at learning rate 0, direction, line search. Passes are interleaved with
bare bf16 forward passes of the same model (whole logits, no loss), medians of both; the card's
matmul rate is measured by 8192 x 8192 x 8192 products in bf16. Model FLOPs of a pass are two per
weight and token, embeddings left out, and causal attention's 2 length hidden per layer and token.

    python benchmarks/gpu_olmo2.py [--quick] [--sizes 1b 7b]

Without CUDA only --quick runs: it tries the script itself on toy sizes and makes no statement of
speed. Ends with RESULT lines; exits 1 when one is short of its target.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from transformers import Olmo2Config

from probe.attention import choose_attention
from probe.batches.batch import make_batch
from probe.checkpoints import open_checkpoint
from probe.checkpoints.source import Source
from probe.loss import CausalLoss
from probe.memory import PeakMemory
from probe.moments import WarmupMoments
from probe.parallel import ShardedModel
from probe.parallel.distributed_loss import DistributedLoss
from probe.parallel.fsdp2 import Fsdp2Model
from probe.parallel.resident import ResidentModel
from probe.perturb import Ray
from probe.progress import Meter
from probe.ray_search import RaySearch
from probe.result import CheckpointRef
from probe.spec import AdamW, MeasurementOptions
from probe.update import UpdateRule

# width, layers, heads, inner width, vocabulary: allenai/OLMo-2-0425-1B and -1124-7B
SIZES = {
    "1b": (2048, 16, 16, 8192, 100_352),
    "7b": (4096, 32, 32, 11_008, 100_352),
    "toy": (64, 2, 4, 172, 1_003),
}
PASS_TARGET, UTILISATION_TARGET, LOSS_TOLERANCE = 1.03, 0.60, 1e-5
GIB = 2**30


def write_checkpoint(directory: Path, size: str, length: int, device: torch.device) -> Olmo2Config:
    """A bf16 checkpoint of random weights, one file per layer; norms are one."""
    from transformers import Olmo2ForCausalLM

    width, num_layers, num_heads, inner, vocabulary = SIZES[size]
    config = Olmo2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=length,
        rope_theta=500_000,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        architectures=["Olmo2ForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Olmo2ForCausalLM(config).named_parameters()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", []).append(name)
    for file, names in files.items():
        tensors = {n: random_weight(n, shapes[n], device).cpu() for n in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, names in files.items() for n in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return config


def random_weight(name: str, shape: torch.Size, device: torch.device) -> Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    return torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02


class Clock:
    """Seconds on the wall, after the device has finished what it was given."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.rows: list[str] = []

    def time(self, work: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Prints seconds and peak memory of its body."""
        memory = PeakMemory(self._device)
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        seconds = time.perf_counter() - start
        print(f"  {name:<42} {seconds:9.3f} s   peak {memory.peak_bytes() / GIB:7.2f} GiB")

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def matmul_rate(device: torch.device, clock: Clock, n: int) -> float:
    """Measured FLOP/s of bf16 products of n x n matrices, median of 20 runs of 10."""
    left, right = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(left)

    def ten() -> None:
        for _ in range(10):
            torch.mm(left, right, out=out)

    ten()
    return 10 * 2 * n**3 / statistics.median(clock.time(ten) for _ in range(20))


def forward_flops(size: str, length: int, num_tokens: int) -> float:
    width, num_layers, _, inner, vocabulary = SIZES[size]
    per_layer = 4 * width * width + 3 * width * inner
    weights = num_layers * per_layer + vocabulary * width
    attention = num_layers * 2 * length * width
    return float(num_tokens) * (2 * weights + attention)


def bare_forward(loss: CausalLoss, ids: Tensor) -> None:
    with torch.no_grad():
        for row in ids.to(loss.device):
            loss.model(input_ids=row[None], use_cache=False)


def measure(
    size: str, source: Source, args: argparse.Namespace, device: torch.device, rate: float
) -> list[tuple[str, float, float, float]]:
    """RESULT rows: (name, value, baseline, target)."""
    clock = Clock(device)
    attention = choose_attention("auto", device=device, dtype=torch.bfloat16)
    models = ResidentModel(
        device=device,
        dtype=torch.bfloat16,
        attention=attention,
        micro_batch_sequences=1,
        activation_checkpointing=args.activation_checkpointing,
    )
    with clock.phase("load (bf16 weights, fp32 base)"):
        model, loss = models.load(source)
    print(
        f"  {model.num_parameters / 1e9:.3f}e9 parameters, attention {attention}, head "
        f"{loss.head_path}, activation checkpointing {args.activation_checkpointing}"
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        SIZES[size][4], (args.sequences, args.length), generator=generator, dtype=torch.int64
    )
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    batch = make_batch(ids, mask, [""] * args.sequences)
    optimizer = AdamW(clip_grad_norm=1.0)
    moments = WarmupMoments(model.shards, optimizer.betas, why="asked for")
    rule = UpdateRule(model, optimizer, moments)

    def gradient() -> list[Tensor | None]:
        grads = model.gradient(lambda: loss.backward(batch))
        for grad in grads:
            if grad is not None:
                grad.div_(batch.num_targets)
        return grads

    for step in range(2):
        with clock.phase(f"moment step {step} (forward, backward, absorb)"):
            rule.absorb(gradient())
    with clock.phase("gradient and direction"):
        delta, slope = rule.direction(gradient())
    ray = Ray([s.live for s in model.shards], [s.base for s in model.shards], delta, exact=True)
    moves = [clock.time(lambda: (ray.move(1e-6), model.push())) for _ in range(args.repeats)]
    ray.move(0.0)
    options = MeasurementOptions(loss_batch="update", eta_init=1e-4)
    meter = Meter(None)
    with clock.phase("line search"):
        found = RaySearch(model, loss, options, meter, "update", None).run(
            repeat=0, delta=delta, slope=slope, update_batch=batch, loss_batch=batch
        )
    print(f"  line search: {found.outcome.value} after {meter.num_forward_passes} passes")
    ours, bare = [], []
    loss.mean(batch), bare_forward(loss, ids)
    for _ in range(args.repeats):
        ours.append(clock.time(lambda: loss.mean(batch)))
        bare.append(clock.time(lambda: bare_forward(loss, ids)))
    seconds, baseline = statistics.median(ours), statistics.median(bare)
    achieved = forward_flops(size, args.length, ids.numel()) / seconds
    print(
        f"  pass {seconds:.4f} s for {args.sequences} x {args.length} tokens, bare forward "
        f"{baseline:.4f} s; perturbation {statistics.median(moves):.4f} s "
        f"({statistics.median(moves) / seconds:.1%} of a pass); {achieved / 1e12:.1f} TFLOP/s"
    )
    return [
        (f"{size}_pass_over_bare_forward", seconds, baseline, PASS_TARGET),
        (f"{size}_forward_utilisation", achieved, rate, UTILISATION_TARGET),
    ]


def fsdp2_difference(source: Source, args: argparse.Namespace, device: torch.device) -> float:
    """Largest relative difference of per-sequence losses, FSDP2 of one rank against single."""
    attention = choose_attention("auto", device=device, dtype=torch.bfloat16)
    single = ResidentModel(
        device=device, dtype=torch.bfloat16, attention=attention, micro_batch_sequences=1
    )
    model, loss = single.load(source)
    sharded = Fsdp2Model(source.skeleton(attention), source, device, dtype=torch.bfloat16)
    sharded_loss = DistributedLoss(sharded, micro_batch_sequences=1)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.model.config.vocab_size, (2, args.length), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    batch = make_batch(ids, mask, ["", ""])
    worst = 0.0
    for eta in (0.0, 1e-4, 1e-2):
        here = along(model, loss, batch, eta)
        there = along(sharded, sharded_loss, batch, eta)
        worst = max(worst, *(abs(a - b) / abs(a) for a, b in zip(here, there, strict=True)))
    return worst


def along(model: ShardedModel, loss: CausalLoss, batch: object, eta: float) -> tuple[float, ...]:
    """Per-sequence losses at theta - eta sign(theta)."""
    base = [s.base for s in model.shards]
    Ray([s.live for s in model.shards], base, [b.sign() for b in base], exact=True).move(eta)
    model.push()
    return loss.sums(batch).nll


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="toy sizes: tries the script")
    parser.add_argument("--sizes", nargs="+", choices=["1b", "7b"], default=["1b", "7b"])
    parser.add_argument("--sequences", type=int, default=8, help="sequences of a batch")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--activation-checkpointing", action="store_true")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.quick:
        print("no CUDA device: nothing to measure. --quick tries the script on toy sizes.")
        return 1
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if args.quick:
        args.sizes, args.sequences, args.length, args.repeats = ["toy"], 3, 64, 3
    print(f"{torch.cuda.get_device_name(0) if on_gpu else 'CPU'}, torch {torch.__version__}")
    rate = matmul_rate(device, Clock(device), 8192 if on_gpu else 256)
    print(f"measured matmul rate, bf16: {rate / 1e12:.3f} TFLOP/s")
    rows: list[tuple[str, float, float, float]] = []
    with tempfile.TemporaryDirectory() as root:
        store = dist.FileStore(f"{root}/store", 1)
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=0, world_size=1)
        for size in args.sizes:
            directory = Path(root) / size
            print(f"OLMo-2 {size}, random weights")
            write_checkpoint(directory, size, args.length, device)
            source = open_checkpoint(CheckpointRef(source="local", location=str(directory)))
            rows += measure(size, source, args, device, rate)
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
            if size != "7b":  # two models at once
                gap = fsdp2_difference(source, args, device)
                rows.append((f"{size}_fsdp2_loss_difference", gap, 1.0, LOSS_TOLERANCE))
            for file in directory.iterdir():
                file.unlink()
        dist.destroy_process_group()
    return report(rows, judged=not args.quick)


def report(rows: list[tuple[str, float, float, float]], *, judged: bool) -> int:
    """RESULT lines. Toy sizes say nothing of speed: only their losses are judged."""
    short = False
    for name, value, baseline, target in rows:
        ratio = value / baseline
        good = ratio >= target if name.endswith("utilisation") else ratio <= target
        if not judged and not name.endswith("difference"):
            print(f"toy size, not judged: {name} value={value:.4g} baseline={baseline:.4g}")
            continue
        short = short or not good
        verdict = "ok" if good else "short"
        print(
            f"RESULT {name} value={value:.4g} baseline={baseline:.4g} ratio={ratio:.4g} "
            f"target={target} {verdict}"
        )
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
