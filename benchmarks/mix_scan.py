"""What all mix ratios cost together: one set of gradients against batches drawn at every ratio.

Trains a small OLMo-2 for a few seconds on Python's own language reference with a little arithmetic
beside it (the one comes with Python, the other is made here), then scans 11 ratios of the two
against four tasks: shared gradients in one unit, exact ones in a unit per ratio, same checkpoint,
same tasks. Shared scans stand before, between and after the exact units, so other load meets both
alike. The direction phase is what a unit reports as `direction_s`: the warm-up, the gradients of
the measured steps and the directions made of them; the tasks' gradients and all searches are not
in it. Passes per search count only searches that ran: one that is decided by its slope, because
the direction does not descend, needs none and would flatter the mean. Run on a CPU:

    python benchmarks/mix_scan.py [--quick]

Ends with RESULT lines; exits 1 when one is short of its target.
"""

import argparse
import json
import math
import pydoc_data.topics
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

from probe.checkpoints import save_checkpoint
from probe.mix_engine import MixSession
from probe.mix_summary import summarise_scans
from probe.result import Unit
from probe.result_mix import MixMeasurement, MixUnitResult
from probe.series import list_checkpoints
from probe.spec_mix import MixScanSpec, ratios_of

END = "<|end|>"
SEQUENCE_LENGTH, VOCABULARY = 128, 1024
BATCH_SEQUENCES = 20  # a ratio of 0.1 is a whole number of them
TARGET_DIRECTION, TARGET_PASSES = 2.3, 3.2


def write_texts(directory: Path) -> dict[str, Path]:
    """The language reference, sums as text, and the same kind of sums as questions."""
    generator = random.Random(0)
    reference = [
        {"text": part}
        for topic in pydoc_data.topics.topics.values()
        for part in topic.split("\n\n")
        if len(part) > 80
    ]
    generator.shuffle(reference)
    kinds = {
        "reference": reference,
        "sums": [{"text": " ".join(_sum(generator) for _ in range(12))} for _ in range(4000)],
        "questions": [_question(generator, "+-") for _ in range(400)],
        "products": [_question(generator, "*") for _ in range(400)],
    }
    files = {}
    for name, rows in kinds.items():
        files[name] = directory / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def _sum(generator: random.Random, signs: str = "+-") -> str:
    left, right = generator.randrange(10, 1000), generator.randrange(2, 100)
    sign = generator.choice(signs)
    value = {"+": left + right, "-": left - right, "*": left * right}[sign]
    return f"{left} {sign} {right} = {value}."


def _question(generator: random.Random, signs: str) -> dict[str, str]:
    question, answer = _sum(generator, signs).split(" = ")
    return {"question": question, "answer": answer}


def train(files: dict[str, Path], directory: Path, num_steps: int) -> int:
    """A model of the reference with one sequence of sums in eight; returns its size."""
    rows = {
        name: [json.loads(line)["text"] for line in files[name].read_text().splitlines()]
        for name in ("reference", "sums")
    }
    tokenizer = _tokenizer(rows["reference"] + rows["sums"][:400])
    streams = {name: _stream(texts, tokenizer) for name, texts in rows.items()}
    torch.manual_seed(0)
    model = Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=SEQUENCE_LENGTH,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            use_cache=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(num_steps):
        left = (num_steps - step) / (0.3 * num_steps)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 20, left)
        ids = torch.cat(
            [_rows(streams["reference"], 7, generator), _rows(streams["sums"], 1, generator)]
        )
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters / 1e6:.2f}M parameters, {num_steps} steps, last loss {loss.item():.2f}")
    save_checkpoint(model, directory, tokenizer=tokenizer)
    return num_parameters


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def _stream(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], 0]]
    return torch.tensor(ids)


def _rows(stream: Tensor, count: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(stream) - SEQUENCE_LENGTH, (count,), generator=generator)
    return stream[starts[:, None] + torch.arange(SEQUENCE_LENGTH)]


def make_spec(
    files: dict[str, Path], checkpoint: Path, quick: bool, *, gradients: str, search: str
) -> MixScanSpec:
    question = {"type": "question_answer", "template": "{question} = "}

    def data(name: str, **more: Any) -> dict[str, Any]:
        return {"type": "files", "name": name, "paths": [str(files[name])], **more}

    tasks = [
        data("reference"),
        data("sums"),
        data("questions", format=question),
        data("products", format=question),
    ]
    return MixScanSpec.model_validate(
        {
            "kind": "mix_scan",
            "name": "benchmark",
            "checkpoints": {"source": "local", "path": str(checkpoint)},
            "model": {"device": "cpu"},
            "optimizer": {"warmup_steps": 4 if quick else 10, "moments": "warmup"},
            "mixture": {"sources": [data("reference"), data("sums")], "gradients": gradients},
            "eval_tasks": [{"data": task, "sequences": BATCH_SEQUENCES} for task in tasks],
            "batches": {
                "sequence_length": SEQUENCE_LENGTH,
                "batch_sequences": BATCH_SEQUENCES,
                "micro_batch_sequences": BATCH_SEQUENCES,
            },
            "measurement": {"repeats": 1 if quick else 3, "search": search},
        }
    )


class Scans:
    """Shared and exact scans of one checkpoint, unit by unit."""

    def __init__(self, files: dict[str, Path], checkpoint: Path, quick: bool) -> None:
        shared = make_spec(files, checkpoint, quick, gradients="shared", search="interpolate")
        exact = make_spec(files, checkpoint, quick, gradients="exact", search="interpolate")
        bisect = make_spec(files, checkpoint, quick, gradients="shared", search="bisect")
        (self._checkpoint,) = list_checkpoints(shared.checkpoints)
        self._sessions = {
            "shared": MixSession(shared),
            "exact": MixSession(exact),
            "bisect": MixSession(bisect),
        }
        self.ratios = ratios_of(shared.mixture)
        self._exact_etas: dict[str, float] = {}

    def shared(self, kind: str = "shared") -> MixUnitResult:
        return self._measure(kind, None, {})

    def exact(self, ratio: float) -> MixUnitResult:
        """Starts from the eta_c of the ratio before, as the job's units do."""
        result = self._measure("exact", ratio, self._exact_etas)
        for m in result.measurements:
            if m.eta_c is not None:
                self._exact_etas[m.task] = m.eta_c
        return result

    def _measure(self, kind: str, ratio: float | None, etas: dict[str, float]) -> MixUnitResult:
        unit = Unit(index=0, unit_id="0000", checkpoint=self._checkpoint, ratio=ratio)
        result = self._sessions[kind].measure(unit, eta_init=dict(etas))
        where = "11 ratios" if ratio is None else f"ratio {ratio:g}"
        print(
            f"  {kind:<7} {where:<9} {result.duration_s:6.2f} s, of which direction "
            f"{result.direction_s:6.2f} s; {result.num_backward_passes} backward passes"
        )
        return result


def searches(results: list[MixUnitResult]) -> list[MixMeasurement]:
    """Those that ran: the others were decided by the slope alone."""
    return [m for r in results for m in r.measurements if m.slope is not None and m.slope < 0]


def mean_passes(results: list[MixUnitResult]) -> float:
    return statistics.mean(m.num_forward_passes for m in searches(results))


def show_passes(name: str, results: list[MixUnitResult]) -> None:
    ran, all_of_them = searches(results), sum(len(r.measurements) for r in results)
    converged = sum(m.eta_c is not None for m in ran)
    print(
        f"{name}: {all_of_them} searches, {all_of_them - len(ran)} decided by the slope; "
        f"{len(ran)} ran, {converged} converged, {mean_passes(results):.2f} passes each"
    )


def show_agreement(shared: MixUnitResult, exact: list[MixUnitResult]) -> None:
    """lambda_c of both kinds at every ratio and task; they see different batches."""
    (one,), (other,) = summarise_scans([shared]), summarise_scans(exact)
    theirs = {(p.ratio, p.task): p for p in other.points}
    gaps = []
    for ours in one.points:
        found = theirs[ours.ratio, ours.task]
        if ours.lambda_c_mean is not None and found.lambda_c_mean is not None:
            gaps.append(abs(math.log(ours.lambda_c_mean / found.lambda_c_mean)))
    factor = math.exp(statistics.median(gaps))
    print(
        f"shared against exact lambda_c at {len(gaps)} of {len(one.points)} points with an answer "
        f"from both: median factor {factor:.2f}, largest {math.exp(max(gaps)):.2f}"
    )


def result_line(name: str, value: float, baseline: float, target: float, *, ok: bool) -> bool:
    print(
        f"RESULT {name} value={value:.3f} baseline={baseline:.3f} ratio={value / baseline:.3f} "
        f"target={target:g} {'ok' if ok else 'short'}"
    )
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer warm-up steps, one repeat")
    parser.add_argument("--steps", type=int, default=150, help="training steps of the model")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sys.stdout.reconfigure(line_buffering=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        files = write_texts(Path(scratch))
        train(files, Path(scratch) / "step-1", arguments.steps)
        print(f"trained in {time.perf_counter() - started:.0f} s; {arguments.threads} thread(s)")
        scans = Scans(files, Path(scratch) / "step-1", arguments.quick)
        half = len(scans.ratios) // 2
        shared = [scans.shared()]
        exact = [scans.exact(ratio) for ratio in scans.ratios[:half]]
        shared.append(scans.shared())
        exact += [scans.exact(ratio) for ratio in scans.ratios[half:]]
        shared.append(scans.shared())
        bisect = scans.shared("bisect")
    print()
    show_passes("shared, interpolate", shared[:1])
    show_passes("exact, interpolate", exact)
    show_passes("shared, bisect", [bisect])
    show_agreement(shared[0], exact)
    print()
    ours = statistics.median(r.direction_s for r in shared)
    single = statistics.median(r.direction_s for r in exact)
    whole, drawn = statistics.median(r.duration_s for r in shared), sum(r.duration_s for r in exact)
    passes, paper = mean_passes(shared[:1]), mean_passes([bisect])
    rows = [
        result_line(
            "direction_phase_of_11_ratios_over_one",
            ours,
            single,
            TARGET_DIRECTION,
            ok=ours <= TARGET_DIRECTION * single,
        ),
        result_line("total_time_over_exact", whole, drawn, 1.0, ok=whole <= drawn),
        result_line("passes_per_search", passes, paper, TARGET_PASSES, ok=passes <= TARGET_PASSES),
    ]
    return 0 if all(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
