"""Forward passes per measurement: `interpolate` against the paper's `bisect`, while training.

Trains a small GPT on the text of Python's own language reference (it comes with Python, nothing
is fetched) with AdamW, and every 5th step measures critical sharpness on the training batch with
both searches, on the same ray. Each search starts from its own last eta_c, as in a training loop;
the training loss is handed in, so no pass is spent at eta = 0. Run on a CPU:

    python benchmarks/passes.py [--quick]

Ends with RESULT lines; exits 1 when one is short of its target.
"""

import argparse
import pydoc_data.topics
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (PyTorch's own name for it)

from probe import critical_sharpness
from probe.line_search import LineSearchResult, Search

SEARCHES: tuple[Search, ...] = ("interpolate", "bisect")
SEQUENCE_LENGTH, NUM_SEQUENCES = 64, 16
MEASURE_EVERY = 5
FIRST_SETTLED = 19  # the 20th measurement, counted from 0
TARGET_SETTLED, TARGET_OVERALL = 3.2, 3.6  # mean passes of `interpolate`


@dataclass(frozen=True)
class Setting:
    """One training run."""

    seed: int
    peak_learning_rate: float
    num_warmup_steps: int
    decays: bool  # linearly to 0 over the last 30 % of the steps, or not at all

    def __str__(self) -> str:
        shape = "warm-up, stable, decay" if self.decays else "warm-up, constant"
        return (
            f"seed {self.seed}, peak {self.peak_learning_rate:g} after {self.num_warmup_steps} "
            f"steps, {shape}"
        )

    def learning_rate(self, step: int, num_steps: int) -> float:
        warm_up = min(1.0, (step + 1) / self.num_warmup_steps)
        left = (num_steps - step) / (0.3 * num_steps)
        return self.peak_learning_rate * warm_up * (min(1.0, left) if self.decays else 1.0)


SETTINGS = [
    Setting(0, 3e-3, 50, decays=True),
    Setting(1, 1e-2, 50, decays=True),
    Setting(2, 3e-3, 100, decays=False),
    Setting(3, 1e-3, 1, decays=False),
    Setting(4, 1e-2, 100, decays=False),
    Setting(5, 1e-3, 50, decays=True),
]
QUICK_SETTINGS = SETTINGS[:2]


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (sequences, heads, tokens, width of a head)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class SmallGPT(nn.Module):
    def __init__(self, vocabulary: int, width: int = 64, num_layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(SEQUENCE_LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads=4) for _ in range(num_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


@dataclass
class Record:
    """Every measurement of one search over one run."""

    results: list[LineSearchResult] = field(default_factory=list)

    @property
    def eta_init(self) -> float:
        return next((r.eta_c for r in reversed(self.results) if r.eta_c is not None), 1e-3)

    def passes(self, first: int = 0) -> list[int]:
        return [r.num_forward_passes for r in self.results[first:]]


def characters() -> tuple[Tensor, int]:
    """The language reference as character ids, and how many distinct ones there are."""
    text = "\n".join(pydoc_data.topics.topics.values())
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    return torch.tensor([letters[letter] for letter in text]), len(letters)


def batches(text: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - SEQUENCE_LENGTH, (NUM_SEQUENCES,), generator=generator)
        windows = text[starts[:, None] + torch.arange(SEQUENCE_LENGTH + 1)]
        yield windows[:, :-1], windows[:, 1:]


def train(setting: Setting, num_steps: int) -> dict[Search, Record]:
    torch.manual_seed(setting.seed)
    text, vocabulary = characters()
    model = SmallGPT(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    records: dict[Search, Record] = {search: Record() for search in SEARCHES}
    for step, (inputs, targets) in zip(range(num_steps), batches(text, setting.seed), strict=False):
        optimizer.param_groups[0]["lr"] = setting.learning_rate(step, num_steps)

        def loss_fn(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

        loss = loss_fn()
        optimizer.zero_grad()
        loss.backward()
        if step % MEASURE_EVERY == 0:
            measure(model, loss_fn, optimizer, loss.item(), records)
        optimizer.step()
    return records


def measure(
    model: nn.Module,
    loss_fn: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    training_loss: float,
    records: dict[Search, Record],
) -> None:
    """Both searches on the ray of the step about to be taken, in turn who goes first."""
    order = SEARCHES if len(records["bisect"].results) % 2 else SEARCHES[::-1]
    for search in order:
        record = records[search]
        record.results.append(
            critical_sharpness(
                model,
                loss_fn,
                optimizer=optimizer,
                eta_init=record.eta_init,
                search=search,
                loss_at_zero=training_loss,
            )
        )


def distribution(passes: list[int]) -> str:
    counts = Counter(passes)
    return "  ".join(f"{n}:{counts[n]}" for n in sorted(counts))


def overlap(ours: LineSearchResult, paper: LineSearchResult) -> bool:
    return ours.eta_lower < paper.eta_upper and paper.eta_lower < ours.eta_upper


def show_run(setting: Setting, records: dict[Search, Record], seconds: float) -> None:
    print(f"\n{setting} ({seconds:.0f} s)")
    for search in SEARCHES:
        overall, settled = records[search].passes(), records[search].passes(FIRST_SETTLED)
        print(
            f"  {search:<12} mean {statistics.mean(overall):.2f} over all, "
            f"{statistics.mean(settled):.2f} from the 20th on; passes:times "
            f"{distribution(overall)}"
        )


def result_line(name: str, value: float, baseline: float, target: float, *, ok: bool) -> bool:
    print(
        f"RESULT {name} value={value:.3f} baseline={baseline:.3f} ratio={value / baseline:.3f} "
        f"target={target:g} {'ok' if ok else 'short'}"
    )
    return ok


def show_results(runs: list[dict[Search, Record]]) -> bool:
    pairs = [
        pair
        for run in runs
        for pair in zip(run["interpolate"].results, run["bisect"].results, strict=True)
    ]
    both = [(a.eta_c, b.eta_c) for a, b in pairs if a.eta_c is not None and b.eta_c is not None]
    gaps = [abs(ours / paper - 1.0) for ours, paper in both]
    num_overlapping = sum(overlap(*pair) for pair in pairs)
    print(
        f"\n{len(pairs)} measurements, {len(both)} with an answer from both searches; "
        f"{num_overlapping} pairs of brackets overlap; eta_c differs by "
        f"{statistics.mean(gaps):.2%} on average, {max(gaps):.2%} at most\n"
    )
    means = {
        (search, first): statistics.mean(n for run in runs for n in run[search].passes(first))
        for search in SEARCHES
        for first in (0, FIRST_SETTLED)
    }
    rows = []
    for name, first, target in [
        ("passes_from_20th", FIRST_SETTLED, TARGET_SETTLED),
        ("passes_overall", 0, TARGET_OVERALL),
    ]:
        value = means["interpolate", first]
        baseline = means["bisect", first]
        rows.append(result_line(name, value, baseline, target, ok=value <= target))
    share = num_overlapping / len(pairs)
    complete = len(both) == len(pairs) and num_overlapping == len(pairs)
    rows.append(result_line("overlapping_brackets", share, 1.0, 1.0, ok=complete))
    return all(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two runs instead of six")
    parser.add_argument("--steps", type=int, default=500, help="training steps of each run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # faster than 2 at this size
    sys.stdout.reconfigure(line_buffering=True)
    runs = []
    for setting in QUICK_SETTINGS if arguments.quick else SETTINGS:
        started = time.perf_counter()
        runs.append(train(setting, arguments.steps))
        show_run(setting, runs[-1], time.perf_counter() - started)
    return 0 if show_results(runs) else 1


if __name__ == "__main__":
    sys.exit(main())
