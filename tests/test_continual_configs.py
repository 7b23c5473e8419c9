"""Job files of the figures of arXiv:2509.19698: they mean the paper's runs, and expand offline."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from probe.plan_continual import expand_continual_units, run_groups
from probe.result_continual import LAYER_SIGNALS, RUN_SIGNALS
from probe.spec_continual import Adam, ContinualLearningSpec, NpzImages
from probe.spec_load import load_spec

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "continual"
PANELS = ["1a", "1b", "1c", "1d", "1e", "1f"]
FIGURES = [*PANELS, *map(str, range(2, 12))]
# Steps of one run: ceil(21,000 / 256) = 83 batches x 250 epochs x 40 tasks; two show fewer tasks.
FULL_STEPS = 830_000
STEPS = {"5": [FULL_STEPS // 10], "6": [332_000, FULL_STEPS, 2 * FULL_STEPS], "8": [207_500]}
# Runs of every group (equal activation family, normalisation and epochs) for 3 seeds.
GROUPS = {
    "1a": [6],
    "1b": [3, 3],  # with batch norm, without
    "1c": [6],  # slopes differ: one group
    "1d": [6],
    "1e": [3, 3],
    "1f": [6],
    "2": [3],
    "3": [3],
    "4": [9, 18],  # CReLU; L2 and Wasserstein
    "5": [3, 6],
    "6": [3, 3, 3, 6, 6, 6],  # three lengths each
    "7": [12, 24],
    "8": [6, 12],
    "9": [9, 3],
    "10": [9, 18],
    "11": [6, 12],
}
# Table 2, and table 1 for the rest: methods of every figure, with what tells them apart.
LEARNING_RATES = {"1a": 1e-4, "1e": 1e-5}
L2_STRENGTHS = {"1b": 1e-5}
LEAKS = {"1b": {0.3}, "1c": {0.3, 0.7}, "1d": {0.3, 0.7}, "1f": {0.01}}


def job(figure: str, preset: str | None = None) -> ContinualLearningSpec:
    spec = load_spec(CONFIGS / f"fig{figure}.yaml", preset=preset)
    assert isinstance(spec, ContinualLearningSpec)
    return spec


def steps_of_runs(spec: ContinualLearningSpec) -> list[int]:
    """Steps of a run under each control, without repetitions."""
    assert spec.stream.num_images is not None
    batches = -(-spec.stream.num_images // spec.stream.batch_size)
    epochs = {spec.epochs_of(control) for control in spec.controls}
    return sorted(batches * e * spec.stream.num_tasks for e in epochs)


def test_there_is_a_file_for_every_figure_and_no_other() -> None:
    assert sorted(p.name for p in CONFIGS.iterdir()) == sorted(f"fig{f}.yaml" for f in FIGURES)


@pytest.mark.parametrize("figure", FIGURES)
def test_the_files_mean_the_papers_size(figure: str) -> None:
    spec = job(figure)
    assert steps_of_runs(spec) == STEPS.get(figure, [FULL_STEPS])
    assert spec.seeds == [0, 1, 2]
    assert spec.model.hidden == [256, 256]
    assert spec.optimizer == Adam(learning_rate=LEARNING_RATES.get(figure, 1e-3))
    assert (spec.signals.log_every, spec.signals.control_every) == (40, 40)
    assert spec.stream.data.type == "idx"
    regularizers = [r for method in spec.methods for r in method.regularizers]
    assert {r.strength for r in regularizers if r.type == "wasserstein"} <= {1e-3}
    assert {r.strength for r in regularizers if r.type == "l2"} <= {L2_STRENGTHS.get(figure, 1e-3)}
    assert {m.leak for m in spec.methods if m.leak is not None} == LEAKS.get(figure, set())


@pytest.mark.parametrize("preset", [None, "quick"])
@pytest.mark.parametrize("figure", FIGURES)
def test_they_expand_offline_into_groups_and_stretches(figure: str, preset: str | None) -> None:
    """No data is at hand here: units follow from the file alone."""
    spec = job(figure, preset)
    assert [len(group) for group in run_groups(spec)] == GROUPS[figure]
    units = expand_continual_units(spec)
    num_stretches = -(-spec.stream.num_tasks // spec.tasks_per_unit)
    assert len(units) == num_stretches * len(GROUPS[figure])
    done: dict[Any, list[int]] = {}
    for unit in units:
        assert unit.first_task is not None
        assert unit.num_tasks is not None
        tasks = range(unit.first_task, unit.first_task + unit.num_tasks)
        for run in unit.runs:
            done.setdefault((run.method, run.control, run.seed), []).extend(tasks)
    # every run once, over all tasks, in their order
    expected = [
        (m.name, c.name, s) for m in spec.methods for c in spec.controls for s in spec.seeds
    ]
    assert sorted(done) == sorted(expected)
    assert all(tasks == list(range(spec.stream.num_tasks)) for tasks in done.values())


@pytest.mark.parametrize("figure", FIGURES)
def test_the_quick_preset_is_the_same_experiment_in_minutes(figure: str) -> None:
    """A step of one run of this network takes about 4 ms on two cores: 80,000 are 5 minutes."""
    full, quick = job(figure), job(figure, "quick")
    assert quick.methods == full.methods
    assert quick.seeds == full.seeds
    assert [c.reset for c in quick.controls] == [c.reset for c in full.controls]
    signals = [(c.scheduler.scope, c.scheduler.signal) for c in quick.controls if c.scheduler]
    assert signals == [
        (c.scheduler.scope, c.scheduler.signal) for c in full.controls if c.scheduler
    ]
    assert quick.model.hidden == full.model.hidden
    assert quick.model.device == "cpu"
    assert isinstance(quick.stream.data, NpzImages)
    assert quick.stream.data.images == "images"  # the other type's fields are not left over
    assert quick.stream.num_images is not None
    assert quick.stream.num_images <= 5000
    batches = quick.stream.num_images // quick.stream.batch_size
    epochs = sum(quick.epochs_of(control) for control in quick.controls)
    runs = len(quick.methods) * len(quick.seeds)
    assert 20_000 < batches * epochs * quick.stream.num_tasks * runs <= 80_000


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("preset", [None, "quick"])
def test_every_row_kept_has_a_measurement(figure: str, preset: str | None) -> None:
    spec = job(figure, preset)
    assert spec.stream.num_images is not None
    batches = -(-spec.stream.num_images // spec.stream.batch_size)
    shortest = batches * min(spec.epochs_of(control) for control in spec.controls)
    assert shortest // spec.signals.windows_per_task >= spec.signals.log_every


@pytest.mark.parametrize(("part", "num_tasks"), [("5", 4), ("8", 10)])
def test_views_of_the_first_tasks_are_the_same_runs(part: str, num_tasks: int) -> None:
    """Their schedulers may warm throughout: 0.3 of figure 4's 40 tasks are 12."""
    whole, first = job("4"), job(part)
    assert first.stream.num_tasks == num_tasks
    assert num_tasks <= 0.3 * whole.stream.num_tasks
    assert first.stream == whole.stream.model_copy(update={"num_tasks": num_tasks})
    assert first.methods == whole.methods
    ours, theirs = first.control("scheduler").scheduler, whole.control("scheduler").scheduler
    assert ours is not None
    assert theirs is not None
    assert ours == theirs.model_copy(update={"warm_until": 1.0})


@pytest.mark.parametrize("figure", FIGURES)
def test_headers_say_what_is_shown_and_claimed(figure: str) -> None:
    text = (CONFIGS / f"fig{figure}.yaml").read_text()
    assert text.startswith(f"# Figure {figure}: ")
    assert "\n# Claim" in text
    raw = yaml.safe_load(text)
    assert raw["labels"]["figure"] == figure


PAGE = Path(__file__).resolve().parents[1] / "docs" / "continual-learning.md"


def test_the_page_defines_every_signal_and_no_other() -> None:
    """First cells of the two tables of signals, the names that results carry."""
    text = PAGE.read_text()
    section = text[text.index("## The signals") : text.index("## The scheduler")]
    cells = re.findall(r"^\| (`[^|]*`) \|", section, re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(names) == sorted([*LAYER_SIGNALS, *RUN_SIGNALS])


def test_the_pages_job_is_what_it_says(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    file = tmp_path / "job.yaml"
    file.write_text(block)
    spec = load_spec(file)
    assert isinstance(spec, ContinualLearningSpec)
    assert [len(group) for group in run_groups(spec)] == [18]
