"""`make demo`: train a small model, probe its checkpoints and mixtures over HTTP, draw the charts.

Everything after the training goes through the commands a user would type; they are printed as
they run. Writes only below `demo-out/` and the asset cache.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from demo.prepare import Texts, prepare
from demo.train import Run, build_model, train, train_tokenizer
from probe.batches import BatchSet
from probe.result import UnitResult
from probe.spec import Batches, CheckpointSeriesSpec, FileData
from probe.spec_load import load_spec

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "demo-out"
SERIES_JOB = ROOT / "configs" / "demo-series.yaml"
SCAN_JOB = ROOT / "configs" / "demo-mix-scan.yaml"
PROBE = [str(Path(sys.executable).with_name("probe"))]
console = Console(highlight=False)


def main() -> int:
    """Run the whole demo; 0 when series and scan were measured."""
    started = time.monotonic()
    os.chdir(ROOT)
    run = Run()
    series = load_spec(SERIES_JOB)
    if not isinstance(series, CheckpointSeriesSpec) or series.schedule != run.schedule:
        raise SystemExit(
            f"{SERIES_JOB} and demo/train.py state different schedules: make them agree"
        )
    console.rule("1/5  real text: C4, Wikipedia, GSM8K, MMLU")
    texts = prepare(OUT / "data")
    console.rule("2/5  train a small OLMo-2-architecture model")
    _train(run, texts)
    console.rule("3/5  start the service and probe every checkpoint")
    with _service() as address:
        environment = os.environ | {"PROBE_SERVER": address}
        series_id = _submit_and_watch(SERIES_JOB, environment)
        console.rule("4/5  how much web text must be mixed into GSM8K")
        scan_id = _submit_and_watch(SCAN_JOB, environment)
        console.rule("5/5  what it shows")
        _write_files(series_id, "series", environment)
        _write_files(scan_id, "mix-scan", environment)
        answer = _probe(["results", series_id, "--format", "json"], environment)
        results = [UnitResult.model_validate(row) for row in json.loads(answer)["data"]]
        _show_phases(results, run)
        console.print(f"\nDone in {time.monotonic() - started:.0f} s.")
        console.print("Charts: demo-out/series.png, demo-out/mix-scan.png")
        console.print(
            f"Dashboard: [bold]{address}[/bold]  (the scan: {address}/jobs/{scan_id})",
            soft_wrap=True,
        )
        if sys.stdin.isatty() and sys.stdout.isatty():
            console.print("Press Ctrl-C to stop the service.")
            _wait_for_interrupt()
        else:
            console.print(f"To open it again: probe up --data-dir {OUT / 'service'}")
    return 0


def _train(run: Run, texts: Texts) -> None:
    shutil.rmtree(OUT / "checkpoints", ignore_errors=True)
    rows = [
        json.loads(line)["text"]
        for file in (texts.web_train, texts.math_train)
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    tokenizer = train_tokenizer(rows, run.vocab_size)
    model = build_model(run, tokenizer)
    web = FileData(name="web", paths=[str(texts.web_train)], share=1 - run.math_share)
    math = FileData(name="math", paths=[str(texts.math_train)], share=run.math_share)
    batches = BatchSet(
        Batches(
            sources=[web, math],
            sequence_length=run.sequence_length,
            batch_sequences=run.batch_sequences,
            seed=run.seed,
        ),
        tokenizer,
    )
    num_parameters = sum(p.numel() for p in model.parameters())
    tokens = run.batch_sequences * run.sequence_length
    console.print(
        f"{num_parameters / 1e6:.2f}M parameters, {run.schedule.total_steps} steps of {tokens} "
        f"tokens, AdamW, peak learning rate {run.schedule.peak:g}"
    )
    columns = (BarColumn(), TextColumn("step {task.completed}/{task.total}"))
    loss_text = TextColumn("loss {task.fields[loss]:.2f}")
    with Progress(*columns, loss_text, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("train", total=run.schedule.total_steps, loss=float("nan"))
        train(
            run,
            model,
            tokenizer,
            batches,
            OUT / "checkpoints",
            on_step=lambda step, loss: progress.update(task, completed=step + 1, loss=loss),
        )
    console.print(f"{len(run.save_at)} checkpoints with optimizer state in demo-out/checkpoints")


@contextmanager
def _service() -> Iterator[str]:
    """Server and worker with a database of their own; yields the address, stops both at the end."""
    command = [*PROBE, "up", "--port", "0", "--data-dir", str(OUT / "service"), "--json"]
    _say_command(["probe", *command[len(PROBE) :]])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the service did not start; its messages stand above")
        yield json.loads(line)["address"]
    finally:
        process.terminate()  # not SIGINT: what a shell starts in the background ignores that one
        process.wait(timeout=60)


def _submit_and_watch(job: Path, environment: dict[str, str]) -> str:
    """Submit a job over HTTP, show its progress, print its table; returns its id."""
    submitted = _probe(["submit", str(job.relative_to(ROOT)), "--json"], environment)
    job_id: str = json.loads(submitted)["id"]
    command = ["watch", job_id]
    _say_command(["probe", *command])
    watched = subprocess.run([*PROBE, *command], env=environment, check=False)
    if watched.returncode not in (0, 3):  # 3: measured, and some point has no eta_c
        raise SystemExit(f"the job did not succeed (exit {watched.returncode})")
    return job_id


def _write_files(job_id: str, name: str, environment: dict[str, str]) -> None:
    for suffix in ("png", "svg"):
        _probe(["plot", job_id, "--out", f"demo-out/{name}.{suffix}"], environment)
    _probe(["results", job_id, "--format", "csv", "--out", f"demo-out/{name}.csv"], environment)


def _show_phases(results: list[UnitResult], run: Run) -> None:
    """Held-out lambda_c in each phase of the schedule, and whether the paper's picture is there."""
    points = [
        (r.unit.checkpoint_ref.step or 0, m.lambda_c, r.stability_threshold or 0.0)
        for r in results
        for m in r.measurements
        if m.loss_batch == "held_out" and m.lambda_c is not None
    ]
    end_of_warmup, decay = run.schedule.warmup_steps, run.schedule.decay_start or 0
    phases = {
        "warm-up": [p for p in points if p[0] <= end_of_warmup],
        "stable": [p for p in points if end_of_warmup <= p[0] <= decay],
        "decay": [p for p in points if p[0] > decay],
    }
    if not all(phases.values()):
        console.print("Too few measurements converged to compare the phases.")
        return
    console.print("\nOn the held-out batch, median over each phase:")
    for name, found in phases.items():
        lambdas, thresholds = [p[1] for p in found], [p[2] for p in found]
        console.print(
            f"  {name:<8} lambda_c {median(lambdas):6.0f}   2/eta {median(thresholds):6.0f}   "
            f"({len(found)} measurements)"
        )
    top_step, top, _ = max(phases["warm-up"], key=lambda p: p[1])
    last = median(p[1] for p in phases["warm-up"] if p[0] == phases["warm-up"][-1][0])
    below = sum(value <= threshold for _, value, threshold in phases["stable"])
    risen = median(p[1] for p in phases["decay"]) / median(p[1] for p in phases["stable"])
    console.print(
        f"warm-up: from its highest, {top:.0f} at step {top_step}, to {last:.0f} at its end\n"
        f"stable:  {below} of {len(phases['stable'])} measurements at or below 2/eta\n"
        f"decay:   {risen:.2f} times the stable phase's median"
    )


def _probe(arguments: list[str], environment: dict[str, str]) -> str:
    _say_command(["probe", *arguments])
    done = subprocess.run(
        [*PROBE, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in (0, 3):
        raise SystemExit(f"probe {arguments[0]} failed (exit {done.returncode})")
    return done.stdout


def _say_command(words: list[str]) -> None:
    console.print(f"[dim]$ {' '.join(words)}[/dim]", soft_wrap=True)


def _wait_for_interrupt() -> None:
    try:
        signal.pause()
    except KeyboardInterrupt:
        console.print("\nStopping.")


if __name__ == "__main__":
    sys.exit(main())
