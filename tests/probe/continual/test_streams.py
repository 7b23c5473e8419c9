"""Streams of tasks: what is drawn depends on the seed alone, and is drawn as it should be."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from probe.continual.datasets import Images
from probe.continual.streams import TaskStream
from probe.errors import BatchError, ConfigError
from probe.spec_continual import Stream

CPU = torch.device("cpu")
NUM_IMAGES, NUM_FEATURES, NUM_CLASSES = 300, 12, 5


def make_images(num_images=NUM_IMAGES, num_classes=NUM_CLASSES) -> Images:
    random = np.random.default_rng(0)
    inputs = random.uniform(2, 7, (num_images, NUM_FEATURES)).astype(np.float32)
    labels = random.integers(num_classes, size=num_images)
    return Images(inputs, labels, num_classes, "0" * 64, "made")


def make_stream(seeds=(0, 1, 2), images=None, device=CPU, **fields) -> TaskStream:
    spec = {"type": "random_labels", "batch_size": 32} | fields
    stream = Stream.model_validate(
        {"data": {"type": "packaged", "name": "digits"}} | spec,
    )
    return TaskStream(stream, make_images() if images is None else images, seeds, device)


def test_images_are_chosen_once_by_the_stream_s_seed():
    images = make_images()
    one, same, other = (
        make_stream(seeds, images, num_images=40, seed=seed)
        for seeds, seed in [((0,), 5), ((7, 8), 5), ((0,), 6)]
    )
    assert one.chosen.tolist() == same.chosen.tolist()
    assert one.chosen.tolist() != other.chosen.tolist()
    assert len(set(one.chosen.tolist())) == 40
    assert torch.equal(one.inputs, same.inputs)
    everything = make_stream(images=images)
    assert everything.chosen.tolist() == list(range(NUM_IMAGES))
    assert make_stream(images=images, num_images=NUM_IMAGES, seed=9).chosen.tolist() == list(
        range(NUM_IMAGES)
    )


def test_a_seed_beyond_any_machine_word():
    big, small = make_stream(num_images=40, seed=2**80 + 3), make_stream(num_images=40, seed=3)
    assert big.chosen.tolist() != small.chosen.tolist()


def test_inputs_are_normalised_over_the_chosen_images_together():
    images = make_images()
    images.inputs[:] += 1e4  # fp32 keeps them to 1e-3; moments in fp32 would lose that
    stream = make_stream(images=images, num_images=40)
    exact = images.inputs[stream.chosen].astype(np.float64)
    expected = (exact - exact.mean()) / exact.std()
    # rounded to fp32 after the difference, and again after the quotient
    np.testing.assert_allclose(stream.inputs.numpy(), expected, rtol=2**-22, atol=1e-12)
    assert stream.inputs.dtype == torch.float32


def test_constant_images_are_refused():
    images = make_images()
    images.inputs[:] = np.float32(0.1)  # in fp32 its standard deviation comes out as 1.5e-8
    with pytest.raises(
        BatchError, match=r"made: all 3600 numbers of the 300 chosen images are 0\.1"
    ):
        make_stream(images=images)


def test_images_further_apart_than_fp32_reaches_are_refused():
    images = make_images()
    images.inputs[:] = np.float32(-3e38)
    images.inputs[:10] = np.float32(3e38)  # 5.8e38 above the mean
    with pytest.raises(BatchError, match=r"reach from -3e\+38 to 3e\+38, too far apart"):
        make_stream(images=images)


def test_more_than_there_is_names_both_numbers():
    with pytest.raises(ConfigError, match=r"num_images is 301, and made has 300 images"):
        make_stream(num_images=301)
    with pytest.raises(ConfigError, match=r"batch_size is 301, and 300 images of made"):
        make_stream(batch_size=301)


@pytest.mark.parametrize(("batch_size", "num_batches"), [(30, 10), (31, 10), (299, 2), (300, 1)])
def test_the_last_batch_takes_what_is_left(batch_size, num_batches):
    assert make_stream(batch_size=batch_size).num_batches == num_batches


@pytest.mark.parametrize("kind", ["random_labels", "permuted_inputs"])
def test_a_run_s_stream_does_not_depend_on_its_company_or_on_what_was_asked_before(kind):
    alone = make_stream((7,), type=kind)
    among = make_stream((9, 7, 2, 7), type=kind)
    for task, epoch in [(3, 5), (0, 0), (2**16, 2**16)]:  # in any order
        ours, theirs = alone.task(task), among.task(task)
        assert ours.number == task
        for row in (1, 3):
            assert torch.equal(ours.labels[0], theirs.labels[row])
            assert torch.equal(alone.order(task, epoch)[0], among.order(task, epoch)[row])
            if kind == "permuted_inputs":
                assert torch.equal(ours.permutation[0], theirs.permutation[row])


def draws(kind, stream, task, epoch) -> torch.Tensor:
    match kind:
        case "labels":
            return stream.task(task).labels[0]
        case "permutation":
            return stream.task(task).permutation[0]
    return stream.order(task, epoch)[0]


@pytest.mark.parametrize("kind", ["labels", "permutation", "order"])
def test_every_seed_task_and_epoch_has_draws_of_its_own(kind):
    spec = {"type": "random_labels" if kind == "labels" else "permuted_inputs"}
    epochs = (0, 1, 2) if kind == "order" else (0,)
    keys = [(seed, task, epoch) for seed in (0, 1, 2) for task in (0, 1, 2) for epoch in epochs]
    streams = {seed: make_stream((seed,), **spec) for seed in (0, 1, 2)}
    drawn = {tuple(draws(kind, streams[seed], task, epoch).tolist()) for seed, task, epoch in keys}
    assert len(drawn) == len(keys)  # by chance equal: below 1 in 12! = 5e8


def test_orders_and_permutations_hold_every_index_once():
    stream = make_stream(type="permuted_inputs")
    for task in range(3):
        order, permutation = stream.order(task, 4), stream.task(task).permutation
        assert order.dtype == permutation.dtype == torch.int64
        assert order.sort(dim=1).values.tolist() == [list(range(NUM_IMAGES))] * 3
        assert permutation.sort(dim=1).values.tolist() == [list(range(NUM_FEATURES))] * 3


def test_drawn_labels_are_uniform_and_independent_of_other_tasks_and_seeds():
    """Chi-square of pairs of labels of one image against C x C equal cells.

    Equal cells mean both: uniform labels, and independent ones. With a true null hypothesis a
    statistic is above its 1 - 1e-6 quantile once in a million seeds; the seeds here are fixed.
    """
    images = make_images(5000)
    labels = make_stream((0, 1), images).task(0).labels, make_stream((0, 1), images).task(1).labels
    truth = torch.from_numpy(images.labels)
    limit = chi2.ppf(1 - 1e-6, NUM_CLASSES**2 - 1)
    expected = 5000 / NUM_CLASSES**2
    pairs = {
        "next task": (labels[0][0], labels[1][0]),
        "other seed": (labels[0][0], labels[0][1]),
        "true class": (labels[0][0], truth),
    }
    for name, (first, second) in pairs.items():
        counts = torch.bincount(first * NUM_CLASSES + second, minlength=NUM_CLASSES**2)
        assert len(counts) == NUM_CLASSES**2, name
        assert ((counts - expected) ** 2 / expected).sum() < limit, name


def test_orders_put_every_image_at_every_place_alike():
    """Where image 0 stands in 2,000 orders, in ten parts of equal size: chi-square as above."""
    images = make_images(100)
    stream = make_stream((0,), images)
    places = [int((stream.order(0, epoch)[0] == 0).nonzero()) for epoch in range(2000)]
    counts = np.bincount(np.array(places) // 10, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < chi2.ppf(1 - 1e-6, 9)


@pytest.mark.parametrize("kind", ["random_labels", "permuted_inputs"])
def test_a_batch_holds_the_images_and_labels_of_its_indices(kind):
    """A loop over runs, images and features."""
    images = make_images()
    stream = make_stream(images=images, type=kind, num_images=50)
    task, index = stream.task(1), stream.order(1, 2)[:, 32:]  # the last batch: 18 left
    x, y = stream.batch(task, index)
    assert x.shape == (3, 18, NUM_FEATURES)
    assert y.shape == (3, 18)
    for run in range(3):
        for place in range(18):
            image = int(index[run, place])
            for feature in range(NUM_FEATURES):
                permuted = task.permutation is not None
                at = int(task.permutation[run, feature]) if permuted else feature
                assert x[run, place, feature] == stream.inputs[image, at]
            assert y[run, place] == task.labels[run, image]
            if kind == "permuted_inputs":
                assert y[run, place] == images.labels[stream.chosen[image]]


def test_the_draws_are_those_they_were():
    """A guard against drift only: a new NumPy may draw otherwise, and results must say so."""
    stream = make_stream((3,), num_images=10, batch_size=5, seed=1)
    permuted = make_stream((3,), type="permuted_inputs")
    assert stream.chosen.tolist() == CHOSEN
    assert stream.task(2).labels[0].tolist() == DRAWN_LABELS
    assert permuted.task(2).permutation[0].tolist() == PERMUTATION
    assert stream.order(2, 4)[0].tolist() == ORDER


CHOSEN = [15, 45, 51, 96, 112, 126, 135, 214, 258, 298]
DRAWN_LABELS = [4, 1, 1, 3, 4, 4, 2, 0, 0, 0]
PERMUTATION = [6, 1, 4, 2, 10, 9, 5, 8, 3, 7, 11, 0]
ORDER = [6, 2, 1, 0, 9, 4, 3, 5, 8, 7]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", ["random_labels", "permuted_inputs"])
def test_a_gpu_sees_the_same_stream(kind):
    here, there = make_stream(type=kind), make_stream(type=kind, device=torch.device("cuda"))
    for stream_task in range(3):
        index = here.order(stream_task, 1)
        assert torch.equal(index, there.order(stream_task, 1).cpu())
        ours = here.batch(here.task(stream_task), index[:, :32])
        theirs = there.batch(there.task(stream_task), index[:, :32].cuda())
        for tensor, other in zip(ours, theirs, strict=True):
            assert other.is_cuda
            assert torch.equal(tensor, other.cpu())
