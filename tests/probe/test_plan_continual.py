"""What continual learning would do, counted by hand; and the kind's way through shared parts."""

import gzip
import json
import struct

import numpy as np
import pytest

from probe.errors import BatchError, ConfigError
from probe.image_sizes import image_sizes
from probe.kinds import image_files
from probe.plan import expand_units, make_plan
from probe.spec_continual import IdxImages, NpzImages, PackagedImages
from probe.spec_load import SpecError, parse_spec


@pytest.fixture
def stream(continual_spec):
    """Changes to the spec by dotted path."""

    def build(**changes):
        raw = json.loads(json.dumps(continual_spec))
        for path, value in changes.items():
            target, _, key = path.partition("__")
            raw[target] = raw.get(target, {}) | {key: value} if key else value
        return parse_spec(raw)

    return build


def idx(path, *sizes, packed=False):
    """An IDX file of unsigned bytes, as MNIST's."""
    content = bytes([0, 0, 8, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes)
    content += bytes(int(np.prod(sizes)))
    path.write_bytes(gzip.compress(content) if packed else content)
    return str(path)


def test_a_unit_is_a_group_of_runs_and_a_stretch_of_tasks(stream):
    units = expand_units(stream())
    assert [unit.unit_id for unit in units] == [
        "0000-group-0-tasks-0-1", "0001-group-0-tasks-2-3", "0002-group-0-tasks-4-4",
    ]  # fmt: skip
    assert all(len(unit.runs) == 8 and unit.checkpoint is None for unit in units)


def test_steps_and_passes_are_counted_by_hand(stream):
    plan = make_plan(stream())
    assert (plan.kind, plan.backend, plan.num_ranks) == ("continual_learning", "single", 1)
    # 8 runs, 5 tasks, 3 epochs of ceil(100 / 32) = 4 batches; then one batch of at most 1,024.
    assert plan.num_backward_passes == 8 * 5 * 3 * 4
    assert plan.num_forward_passes == plan.max_forward_passes == 8 * 5
    assert plan.num_tokens_per_pass == 0
    longer = stream(controls=[{"name": "a"}, {"name": "b", "epochs": 7}])
    assert make_plan(longer).num_backward_passes == 4 * 5 * 4 * (3 + 7)
    whole = make_plan(stream(stream__num_images=None))
    assert whole.num_backward_passes == 8 * 5 * 3 * 57  # 1,797 images
    assert whole.num_forward_passes == 8 * 5 * 2


def test_a_last_batch_of_one_image_is_refused_under_batch_normalisation(stream):
    normalised = [{"name": "m", "normalization": "batch"}]
    with pytest.raises(SpecError, match="97 images in batches of 32 leave a last batch of one"):
        stream(methods=normalised, stream__num_images=97)
    stream(methods=normalised, stream__num_images=98)
    stream(methods=[{"name": "m", "normalization": "layer"}], stream__num_images=97)
    # The data's 1,797 images are known to the plan only.
    spec = stream(methods=normalised, stream__num_images=None, stream__batch_size=449)
    assert any("last batch of one image" in note for note in make_plan(spec).notes)


def test_memory_is_what_the_largest_group_keeps(stream):
    # 64 -> 8 -> 4 -> 10; seven lasting numbers per parameter with Adam, five with SGD, while the
    # sharpness is measured 8 iterates and 6 more; and the images.
    parameters = 65 * 8 + 9 * 4 + 5 * 10
    plan = make_plan(stream())
    assert plan.num_parameters == parameters
    assert plan.memory_bytes_per_rank == plan.memory_bytes == 4 * (8 * parameters * 21 + 100 * 64)
    sgd = make_plan(stream(optimizer={"name": "sgd"}))
    assert sgd.memory_bytes == 4 * (8 * parameters * 19 + 100 * 64)
    one = {"name": "W", "activation": "crelu", "normalization": "layer"}
    one["regularizers"] = [{"type": "wasserstein", "strength": 1.0}]
    widened = 65 * 8 + 17 * 4 + 9 * 10 + 2 * (8 + 4)  # CReLU doubles what the next layer sees
    plan = make_plan(stream(methods=[one], runs_per_unit=3))
    assert plan.num_parameters == widened
    assert plan.memory_bytes == 4 * (3 * widened * 22 + 100 * 64)
    few = make_plan(stream(signals={"power_iterations": 1, "first_power_iterations": 2}))
    assert few.memory_bytes == 4 * (8 * parameters * (7 + 3 + 4) + 100 * 64)


def test_the_plan_counts_as_the_network_does(stream):
    from probe.continual.networks import NetworkShape

    for activation in ("crelu", "tanh"):
        for normalization in ("none", "batch"):
            method = {"name": "m", "activation": activation, "normalization": normalization}
            shape = NetworkShape(64, (8, 4), 10, activation, normalization)
            planned = make_plan(stream(methods=[method])).num_parameters
            assert planned == shape.layers()[-1].stop


def test_groups_and_steps_are_told(stream):
    groups, steps = make_plan(stream(runs_per_unit=5)).notes
    assert groups.startswith("8 runs (methods x controls x seeds: 2 x 2 x 2) in 2 groups")
    assert groups.endswith("of 5, 3 runs")
    assert steps.startswith("12 gradient steps per run and task, 4 an epoch")


def test_idx_headers_tell_the_number_of_images(stream, tmp_path):
    data = {
        "type": "idx",
        "images": idx(tmp_path / "images.gz", 70, 5, 4, packed=True),
        "labels": str(tmp_path / "labels"),
    }
    spec = stream(stream__data=data, stream__num_images=None)
    plan = make_plan(spec)
    assert plan.num_backward_passes == 8 * 5 * 3 * 3
    assert plan.num_parameters == 21 * 8 + 9 * 4 + 5 * 10  # counted with 10 classes
    assert any("counted with 10 classes" in note for note in plan.notes)
    (missing,) = [note for note in plan.notes if "not on this machine" in note]
    assert "labels" in missing
    assert image_files(spec) == {
        "stream.data.images": data["images"], "stream.data.labels": data["labels"],
    }  # fmt: skip
    too_many = make_plan(stream(stream__data=data, stream__num_images=71))
    assert any("num_images is 71, the data holds 70" in note for note in too_many.notes)


def test_sizes_are_read_from_headers(tmp_path):
    plain = IdxImages(type="idx", images=idx(tmp_path / "plain", 9, 3, 2), labels="none")
    assert image_sizes(plain) == (9, 6, None)
    np.savez(tmp_path / "a.npz", pixels=np.zeros((11, 2, 3), np.float32), labels=np.zeros(11))
    archive = NpzImages(type="npz", path=str(tmp_path / "a.npz"), images="pixels")
    assert image_sizes(archive) == (11, 6, None)
    assert image_sizes(NpzImages(type="npz", path=str(tmp_path / "b.npz"))) is None


@pytest.mark.parametrize(("name", "shape"), [("digits", (1797, 64)), ("mnist1d", (4000, 40))])
def test_sizes_of_packaged_data_are_those_of_the_data(name, shape):
    from probe.continual.datasets import load_images

    source = PackagedImages(type="packaged", name=name)
    images = load_images(source)
    assert images.inputs.shape == shape
    assert image_sizes(source) == (*shape, images.num_classes)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PK\x03\x04", "it begins with 50 4b 03 04"),
        (b"\0\0", "it begins with 00 00"),
        (b"\0\0\x08\x03\0\0\0\x09", "cannot be read"),
        (b"\x1f\x8bnot gzip", "cannot be read"),
        (b"\0\0\x08\x01\0\0\0\x09", "images need"),
    ],
)
def test_a_header_of_something_else_is_named(tmp_path, stream, content, says):
    path = tmp_path / "images"
    path.write_bytes(content)
    data = {"type": "idx", "images": str(path), "labels": str(path)}
    with pytest.raises(BatchError, match=says):
        image_sizes(IdxImages(**data))
    (note,) = [n for n in make_plan(stream(stream__data=data)).notes if "units will fail" in n]
    assert says in note


def test_an_archive_without_the_array_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)))
    with pytest.raises(BatchError, match=r"images\.npy"):
        image_sizes(NpzImages(type="npz", path=str(tmp_path / "a.npz")))


def test_what_only_the_hub_knows_is_said(stream):
    hub = {"type": "hub", "repo": "ylecun/mnist"}
    plan = make_plan(stream(stream__data=hub, stream__num_images=None))
    assert plan.num_backward_passes == 8 * 5 * 3  # at least
    assert plan.memory_bytes is None
    assert any("which is the least" in n and "num_images tells" in n for n in plan.notes)
    known = make_plan(stream(stream__data=hub))
    assert known.num_backward_passes == 8 * 5 * 3 * 4
    assert not any("the least" in note for note in known.notes)


def test_a_job_of_too_many_results_is_refused_before_they_are_listed(stream):
    with pytest.raises(ConfigError, match="800,000 results; at most 100,000"):
        expand_units(stream(stream__num_tasks=100_000, tasks_per_unit=1))


def test_a_unit_whose_result_could_not_be_sent_is_refused(stream):
    # 4 x 256 runs of one shape in a unit, 5 tasks, 100 windows, 14 signals of 4 layers and 5.
    wide = {"seeds": list(range(256)), "runs_per_unit": 4096, "tasks_per_unit": 5}
    with pytest.raises(ConfigError, match=r"1024 runs, 5 tasks and 100 windows.* 596 MiB"):
        expand_units(stream(**wide, signals={"windows_per_task": 100}))
    assert pytest.approx(596, abs=0.5) == 1024 * 5 * 100 * 61 * 20 / 2**20
    assert len(expand_units(stream(**wide, signals={"windows_per_task": 10}))) == 1


def test_wrong_fields_are_named_without_the_tags(stream):
    with pytest.raises(
        SpecError, match=r"^stream\.data\.image: unknown key; did you mean 'images'"
    ):
        stream(stream__data={"type": "npz", "path": "a", "image": "x"})
    with pytest.raises(SpecError, match=r"^stream\.data\.labels: is required"):
        stream(stream__data={"type": "idx", "images": "a"})
    with pytest.raises(SpecError, match=r"^optimizer\.betas\.0: .*greater than or equal to 0"):
        stream(optimizer={"name": "adam", "betas": [-1, 0.9]})
    with pytest.raises(SpecError, match=r"^methods\.0\.regularizers\.0\.strength: is required"):
        stream(methods=[{"name": "a", "regularizers": [{"type": "l2"}]}])
    with pytest.raises(SpecError, match=r"stream\.data: needs 'type'; choose from: hub, idx, npz"):
        stream(stream__data={"path": "a"})
