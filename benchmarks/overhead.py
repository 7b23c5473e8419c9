"""What a measurement costs beside its forward passes.

Wall time of one `critical_sharpness` call (reading AdamW's state, forming the direction, copying
the parameters, moving and restoring them, the search) over as many bare forward passes of the
same model on the same batch. Each trial's pass is followed by a bare one, whose time is taken out
of the measurement and summed as the baseline, so other load on the machine meets both alike. The
model is an OLMo-2 with random weights, in fp32, with
optimizer state after one step; the batch has 4,096 tokens. What is not a forward pass does not
grow with the batch, so larger batches give smaller ratios. Beside each wall time stands the ratio
in CPU seconds, which other load disturbs less; the target is on wall time. Run on a CPU:

    python benchmarks/overhead.py [--quick]

Ends with RESULT lines; exits 1 when one is short of its target.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Olmo2Config, Olmo2ForCausalLM

from probe import critical_sharpness
from probe.directions import optimizer_direction

NUM_SEQUENCES, SEQUENCE_LENGTH = 8, 512
TARGET = 1.05


def build_model(quick: bool) -> Olmo2ForCausalLM:
    """About 100 million parameters, or 10 million."""
    width, num_layers, vocabulary = (256, 8, 8_000) if quick else (768, 12, 10_000)
    torch.manual_seed(0)
    return Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=num_layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            max_position_embeddings=SEQUENCE_LENGTH,
            pad_token_id=None,
            eos_token_id=None,
            bos_token_id=None,
            use_cache=False,
        )
    )


def make_loss_fn(model: Olmo2ForCausalLM) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (NUM_SEQUENCES, SEQUENCE_LENGTH)
    tokens = torch.randint(0, model.config.vocab_size, shape, generator=generator)

    def loss_fn() -> Tensor:
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        return loss

    return loss_fn


class BarePasses:
    """A loss_fn that follows each pass of the measurement by a bare one, timed apart."""

    def __init__(self, loss_fn: Callable[[], Tensor]) -> None:
        self._loss_fn = loss_fn
        self.seconds = self.cpu_seconds = 0.0

    def __call__(self) -> Tensor:
        loss = self._loss_fn()
        start, cpu_start = time.perf_counter(), time.process_time()
        with torch.no_grad():
            self._loss_fn()
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu_start
        return loss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10M parameters")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sys.stdout.reconfigure(line_buffering=True)
    model = build_model(arguments.quick)
    loss_fn = make_loss_fn(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_fn().backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_fn().backward()
    num_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{num_parameters / 1e6:.1f}M parameters, {NUM_SEQUENCES} x {SEQUENCE_LENGTH} tokens, "
        f"fp32, {torch.get_num_threads()} thread(s)"
    )
    eta_init = critical_sharpness(model, loss_fn, optimizer=optimizer).eta_c  # warms up, too
    rows: list[tuple[float, float]] = []
    for repeat in range(arguments.repeats):
        passes = BarePasses(loss_fn)
        start, cpu_start = time.perf_counter(), time.process_time()
        found = critical_sharpness(model, passes, optimizer=optimizer, eta_init=eta_init)
        measured = time.perf_counter() - start - passes.seconds
        cpu_ratio = (time.process_time() - cpu_start) / passes.cpu_seconds - 1
        rows.append((measured, passes.seconds))
        start = time.perf_counter()
        optimizer_direction(model, optimizer)
        direction = time.perf_counter() - start
        print(
            f"repeat {repeat}: measurement {measured:.2f} s for {found.num_forward_passes} passes, "
            f"bare passes {passes.seconds:.2f} s, ratio {measured / passes.seconds:.3f} "
            f"(CPU seconds {cpu_ratio:.3f}); direction alone {direction:.2f} s"
        )
    # The repeat with the median ratio, so that the line's three numbers belong together.
    value, baseline = sorted(rows, key=lambda row: row[0] / row[1])[len(rows) // 2]
    ratio = value / baseline
    verdict = "ok" if ratio <= TARGET else "short"
    print(
        f"RESULT overhead value={value:.3f} baseline={baseline:.3f} ratio={ratio:.3f} "
        f"target={TARGET} {verdict}"
    )
    return 0 if verdict == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
