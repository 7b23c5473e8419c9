"""What a continual-learning job would do: runs of one shape together, in stretches of tasks.

Torch-free.
"""

from collections.abc import Iterable, Iterator
from itertools import islice, pairwise, product

from probe.errors import BatchError, ConfigError
from probe.gpus import gpu_memory_bytes
from probe.image_sizes import ImageSizes, image_sizes
from probe.kinds import image_files
from probe.plan_parts import missing_file_notes, unit_id
from probe.result import Plan, RunRef, Unit
from probe.result_continual import LAYER_SIGNALS, RUN_SIGNALS
from probe.spec_continual import Adam, ContinualLearningSpec, Control, Method
from probe.spec_load import resolved, spec_sha256

# What may differ between the runs of one batch; all else must be equal. Slopes of activations
# differ freely: ReLU, leaky ReLU and linear are the same computation.
Shape = tuple[str, str, int]

_FP32_BYTES = 4
_GIB = 2**30
EVALUATION_IMAGES = 1024  # of one forward pass after a task
KEPT_ITERATES = 8  # of a power iteration in memory; then it begins anew from the best vector
_USUAL_CLASSES = 10  # for the size of the last layer, where only the labels would tell
# Runs of all units together: a plan lists them, and is stored and sent as a whole.
_MAX_LISTED_RUNS = 100_000
_BYTES_PER_NUMBER = 20  # of a result as JSON, measured
_MAX_RESULT_BYTES = 200 * 2**20  # a worker hears no longer message than 256 MiB


def activation_family(method: Method) -> str:
    """`sloped` for ReLU, leaky ReLU and linear, which differ in a number only."""
    sloped = ("relu", "leaky_relu", "linear")
    return "sloped" if method.activation in sloped else method.activation


def shape_of(spec: ContinualLearningSpec, method: Method, control: Control) -> Shape:
    """Runs of equal shape can be trained as one batched model."""
    return activation_family(method), method.normalization, spec.epochs_of(control)


def run_groups(spec: ContinualLearningSpec) -> list[list[RunRef]]:
    """All runs of a job, those of equal shape together, at most `runs_per_unit` in a group."""
    by_shape: dict[Shape, list[RunRef]] = {}
    for method, control, seed in product(spec.methods, spec.controls, spec.seeds):
        run = RunRef(method=method.name, control=control.name, seed=seed)
        by_shape.setdefault(shape_of(spec, method, control), []).append(run)
    return [group for runs in by_shape.values() for group in _in_parts(runs, spec.runs_per_unit)]


def expand_continual_units(spec: ContinualLearningSpec) -> list[Unit]:
    """One group of runs and one stretch of tasks each; a group's stretches follow each other.

    Raises:
        ConfigError: There would be too many, or one's result would be too large to be sent.
    """
    _check_number(spec)
    groups = run_groups(spec)
    _check_result_size(spec, max(map(len, groups)))
    units: list[Unit] = []
    for number, runs in enumerate(groups):
        for first in range(0, spec.stream.num_tasks, spec.tasks_per_unit):
            num_tasks = min(spec.tasks_per_unit, spec.stream.num_tasks - first)
            index = len(units)
            label = f"group-{number}-tasks-{first}-{first + num_tasks - 1}"
            units.append(
                Unit(
                    index=index,
                    unit_id=unit_id(index, label),
                    runs=runs,
                    first_task=first,
                    num_tasks=num_tasks,
                )
            )
    return units


def unit_costs(spec: ContinualLearningSpec, units: Iterable[Unit]) -> list[int]:
    """What each unit costs beside the others: runs x tasks x epochs, in proportion to its steps."""
    return [
        len(unit.runs) * (unit.num_tasks or 0) * _epochs(spec, unit.runs[0]) if unit.runs else 0
        for unit in units
    ]


def make_continual_plan(spec: ContinualLearningSpec) -> Plan:
    """Units, steps and memory the job would take; queues nothing, reads a header at most.

    Raises:
        ConfigError: As `expand_continual_units`.
    """
    sizes, notes = _sizes(spec)
    num_images = spec.stream.num_images or (sizes.num_images if sizes else 0)
    # Without a number of images, an epoch counts as one batch: the least it can be.
    num_batches = max(1, -(-num_images // spec.stream.batch_size))
    groups = run_groups(spec)
    num_steps = sum(num_batches * _epochs(spec, run) for group in groups for run in group)
    num_runs = sum(map(len, groups))
    num_passes = max(1, -(-num_images // EVALUATION_IMAGES))
    forward_passes = num_runs * spec.stream.num_tasks * num_passes
    num_parameters = None if sizes is None else max(_network_sizes(spec, sizes))
    memory = None if sizes is None else _memory_bytes(spec, sizes, num_images, groups)
    return Plan(
        kind=spec.kind,
        spec=resolved(spec),
        spec_sha256=spec_sha256(spec),
        units=expand_continual_units(spec),
        num_forward_passes=forward_passes,
        max_forward_passes=forward_passes,
        num_backward_passes=num_steps * spec.stream.num_tasks,
        num_tokens_per_pass=0,
        num_parameters=num_parameters,
        memory_bytes_per_rank=memory,
        memory_bytes=memory,
        notes=[
            *_group_notes(spec, groups, num_batches),
            *notes,
            *_gpu_notes(spec, memory),
            *missing_file_notes(image_files(spec).values()),
        ],
    )


def _check_number(spec: ContinualLearningSpec) -> None:
    num_runs = len(spec.methods) * len(spec.controls) * len(spec.seeds)
    num_stretches = -(-spec.stream.num_tasks // spec.tasks_per_unit)
    if num_runs * num_stretches > _MAX_LISTED_RUNS:
        raise ConfigError(
            f"{num_runs} runs (methods x controls x seeds) over {num_stretches} stretches of "
            f"tasks_per_unit {spec.tasks_per_unit} are {num_runs * num_stretches:,} results; at "
            f"most {_MAX_LISTED_RUNS:,} fit one job. Raise tasks_per_unit, or make several jobs."
        )


def _check_result_size(spec: ContinualLearningSpec, num_runs: int) -> None:
    num_tasks = min(spec.tasks_per_unit, spec.stream.num_tasks)
    num_windows = spec.signals.windows_per_task
    num_layers = len(spec.model.hidden) + 2  # and the last one, and the whole network
    of_window = len(LAYER_SIGNALS) * num_layers + len(RUN_SIGNALS)
    num_bytes = num_runs * num_tasks * num_windows * of_window * _BYTES_PER_NUMBER
    if num_bytes > _MAX_RESULT_BYTES:
        raise ConfigError(
            f"a unit of {num_runs} runs, {num_tasks} tasks and {num_windows} windows each would "
            f"give a result of about {num_bytes / 2**20:,.0f} MiB; at most "
            f"{_MAX_RESULT_BYTES / 2**20:,.0f} can be sent. Lower runs_per_unit, tasks_per_unit or "
            "signals.windows_per_task."
        )


def _sizes(spec: ContinualLearningSpec) -> tuple[ImageSizes | None, list[str]]:
    """What is known of the data, and what has to be said about it."""
    try:
        sizes = image_sizes(spec.stream.data)
    except BatchError as error:
        return None, [f"{error}: units will fail"]
    wanted = spec.stream.num_images
    if sizes is None:
        note = "the images are not at hand: memory is not known beforehand"
        if wanted is None:
            note += ", and passes are counted as if an epoch were one batch, which is the least"
        return None, [note + "; stream.num_images tells their number" * (wanted is None)]
    notes = []
    if wanted is not None and wanted > sizes.num_images:
        notes.append(
            f"stream.num_images is {wanted}, the data holds {sizes.num_images}: units will fail"
        )
    elif wanted is None and (fault := spec.fault_of_last_batch(sizes.num_images)) is not None:
        notes.append(f"{fault} As it is, units will fail")
    if sizes.num_classes is None:
        notes.append(f"parameters and memory are counted with {_USUAL_CLASSES} classes")
    return sizes, notes


def _epochs(spec: ContinualLearningSpec, run: RunRef) -> int:
    return spec.epochs_of(spec.control(run.control))


def _group_notes(
    spec: ContinualLearningSpec, groups: list[list[RunRef]], num_batches: int
) -> list[str]:
    num_runs = sum(map(len, groups))
    parts = f"{len(spec.methods)} x {len(spec.controls)} x {len(spec.seeds)}"
    sizes = ", ".join(str(len(group)) for group in groups[:8]) + ", ..." * (len(groups) > 8)
    steps = sorted({num_batches * spec.epochs_of(control) for control in spec.controls})
    return [
        f"{num_runs} runs (methods x controls x seeds: {parts}) in {len(groups)} groups that are "
        f"each trained as one batched model, of {sizes} runs",
        f"{' or '.join(f'{number:,}' for number in steps)} gradient steps per run and task, "
        f"{num_batches:,} an epoch; memory is that of the largest group, activations left out",
    ]


def _gpu_notes(spec: ContinualLearningSpec, memory: int | None) -> list[str]:
    gpus = gpu_memory_bytes() if spec.model.device != "cpu" else []
    if memory is None or not gpus or memory <= min(gpus):
        return []
    return [
        f"parameters and images need {memory / _GIB:.1f} GiB, the smallest GPU here has "
        f"{min(gpus) / _GIB:.1f}: units will fail here; lower runs_per_unit"
    ]


def _network_sizes(spec: ContinualLearningSpec, sizes: ImageSizes) -> list[int]:
    """Parameters of one network, per method: weights, biases, and scales and shifts."""
    widths = [sizes.num_features, *spec.model.hidden, sizes.num_classes or _USUAL_CLASSES]
    found = []
    for method in spec.methods:
        # CReLU hands on twice as many features as a layer has units.
        inputs = [w * (2 if method.activation == "crelu" else 1) for w in widths]
        inputs[0] = widths[0]
        maps = sum((i + 1) * o for i, (_, o) in zip(inputs, pairwise(widths), strict=False))
        norms = 0 if method.normalization == "none" else 2 * sum(spec.model.hidden)
        found.append(maps + norms)
    return found


def _memory_bytes(
    spec: ContinualLearningSpec, sizes: ImageSizes, num_images: int, groups: list[list[RunRef]]
) -> int:
    """Of the largest group, in fp32, and the images.

    Per parameter lasting: itself, its initial value, its gradient, Adam's two moments, the vectors
    of the layers' and of the whole Hessian, and for Wasserstein the sorted initial value. While the
    sharpness is measured: its iterates and four more, or six where they are begun anew.
    """
    signals = spec.signals
    iterations = max(signals.power_iterations, signals.first_power_iterations)
    lasting = 7 if isinstance(spec.optimizer, Adam) else 5
    passing = iterations + 5 if iterations < KEPT_ITERATES else KEPT_ITERATES + 6
    copies = lasting + passing
    by_method = dict(zip((m.name for m in spec.methods), _network_sizes(spec, sizes), strict=True))
    distant = {m.name for m in spec.methods if any(r.type == "wasserstein" for r in m.regularizers)}

    def of_group(group: list[RunRef]) -> int:
        extra = any(run.method in distant for run in group)
        return sum(by_method[run.method] * (copies + extra) for run in group)

    numbers = max(map(of_group, groups)) + num_images * sizes.num_features
    return numbers * _FP32_BYTES


def _in_parts(runs: list[RunRef], size: int) -> Iterator[list[RunRef]]:
    rest = iter(runs)
    while part := list(islice(rest, size)):
        yield part
