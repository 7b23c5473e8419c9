"""Every source of images gives the same arrays for the same content; bad content is named."""

import builtins
import random
import struct
import zipfile

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from probe.continual.datasets import load_images
from probe.errors import BatchError, BatchUnavailableError, ConfigError
from probe.spec_continual import HubImages, IdxImages, NpzImages, PackagedImages

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 5), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 1, 0, 2])
HUB = HubImages(type="hub", repo="someone/small")


def write_npz(path, images=PIXELS, labels=LABELS, **more) -> NpzImages:
    np.savez(path, images=images, labels=labels, **more)
    return NpzImages(type="npz", path=str(path))


def write_idx(folder, labels=LABELS) -> IdxImages:
    header = bytes([0, 0, 8, 3]) + struct.pack(">3I", *PIXELS.shape)
    (folder / "images").write_bytes(header + PIXELS.tobytes())
    header = bytes([0, 0, 8, 1]) + struct.pack(">I", len(labels))
    (folder / "labels").write_bytes(header + labels.astype(np.uint8).tobytes())
    return IdxImages(type="idx", images=str(folder / "images"), labels=str(folder / "labels"))


def hub_rows() -> Dataset:
    """Encoded images, as hub data sets hold them, in columns beside one that is not wanted."""
    features = Features({"image": Image(), "label": ClassLabel(3), "note": Value("string")})
    columns = {"image": list(PIXELS), "label": LABELS.tolist(), "note": ["x"] * len(LABELS)}
    return Dataset.from_dict(columns, features=features)


@pytest.fixture
def hub(monkeypatch):
    """`datasets.load_dataset` replaced by one that gives rows, or raises."""
    answer = {"rows": hub_rows(), "asked": None}

    def load_dataset(path, **options):
        answer["asked"] = (path, options)
        if isinstance(answer["rows"], Exception):
            raise answer["rows"]
        return answer["rows"]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return answer


def test_files_archives_and_the_hub_give_the_same(tmp_path, hub):
    sources = [write_npz(tmp_path / "a.npz"), write_idx(tmp_path), HUB]
    loaded = [load_images(source) for source in sources]
    for images in loaded:
        assert images.inputs.dtype == np.float32
        assert images.labels.dtype == np.int64
        expected = (PIXELS.astype(np.float64) / 255).reshape(6, 20)
        # one rounding to fp32 here, one there
        np.testing.assert_allclose(images.inputs, expected, rtol=2**-23, atol=0)
        assert images.labels.tolist() == LABELS.tolist()
        assert images.num_classes == 3
    assert len({images.sha256 for images in loaded}) == 1
    assert [images.name for images in loaded] == [
        "a.npz (images, labels)",
        "images",
        "someone/small, split train",
    ]


def test_the_checksum_knows_every_number_and_label(tmp_path):
    pixel, label = PIXELS.copy(), LABELS.copy()
    pixel[5, 3, 4] ^= 1
    label[5] = 1
    sources = [
        write_npz(tmp_path / "same.npz"),
        write_npz(tmp_path / "pixel.npz", pixel),
        write_npz(tmp_path / "label.npz", labels=label),
        write_npz(tmp_path / "shape.npz", PIXELS.reshape(6, 20)),  # flattened in any case
    ]
    same, other_pixel, other_label, flat = (load_images(source).sha256 for source in sources)
    assert len({same, other_pixel, other_label}) == 3
    assert flat == same


@pytest.mark.parametrize(
    ("images", "factor"),
    [
        (np.array([[0, 255], [1, 2]], dtype=np.int32), 1 / 255),
        (np.array([[0, 256], [1, 2]], dtype=np.int32), 1.0),
        (np.array([[-1, 255], [1, 2]], dtype=np.int64), 1.0),
        (np.array([[0.0, 255.0], [1.0, 2.0]]), 1.0),
        (np.array([[False, True], [True, True]]), 1.0),
    ],
    ids=["bytes", "above", "below", "floats", "yes and no"],
)
def test_only_integers_of_one_byte_are_scaled(tmp_path, images, factor):
    loaded = load_images(write_npz(tmp_path / "a.npz", images, np.array([0, 1])))
    np.testing.assert_allclose(loaded.inputs, images * factor, rtol=2**-23, atol=0)


def test_distinct_labels_become_classes_in_ascending_order(tmp_path):
    labels = np.array([26, 3, 3, -1, 26, 7])
    loaded = load_images(write_npz(tmp_path / "a.npz", labels=labels))
    assert loaded.labels.tolist() == [3, 1, 1, 0, 3, 2]
    assert loaded.num_classes == 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": LABELS[:5]}, r"shape \(6, 4, 5\) and labels \(5,\); expected \(N, ...\)"),
        ({"labels": LABELS[:, None]}, r"labels \(6, 1\); expected"),
        ({"images": np.arange(6)}, r"images have shape \(6,\)"),
        ({"labels": LABELS / 2}, "labels are float64; expected integers"),
        ({"labels": np.zeros(6, dtype=int)}, "the labels of 6 images have 1 distinct values"),
        ({"images": PIXELS.astype("U3")}, "images are <U3 .*expected real numbers"),
        ({"images": PIXELS * 1j}, "images are complex128"),
        ({"images": PIXELS[:, :0]}, r"shape \(6, 0, 5\)"),
        ({"images": np.where(np.arange(6) == 4, np.nan, 1.0)[:, None]}, "image 4 .*not finite"),
        ({"images": np.where(np.arange(6) == 3, 1e39, 1.0)[:, None]}, "image 3 .*not finite"),
    ],
)
def test_arrays_that_are_not_images_with_classes_are_refused(tmp_path, arrays, message):
    with pytest.raises(BatchError, match=rf"a.npz \(images, labels\): .*{message}"):
        load_images(write_npz(tmp_path / "a.npz", **arrays))


def test_an_archive_without_the_array_says_what_it_holds(tmp_path):
    write_npz(tmp_path / "a.npz")
    source = NpzImages(type="npz", path=str(tmp_path / "a.npz"), labels="classes")
    with pytest.raises(BatchError, match="no array 'classes'; it holds: images, labels"):
        load_images(source)


class Announces:
    """Unpickled, it would call what it names."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


def test_an_archive_with_objects_is_refused_and_nothing_of_it_is_run(tmp_path):
    objects = np.array([Announces()] * 6, dtype=object)
    with pytest.raises(BatchError, match=r"a\.npz cannot be read .*allow_pickle=False"):
        load_images(write_npz(tmp_path / "a.npz", images=objects))


def test_files_that_are_no_archives(tmp_path):
    np.save(tmp_path / "single.npy", PIXELS)
    (tmp_path / "text.npz").write_text("no archive")
    write_npz(tmp_path / "whole.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:300])
    for name, message in [
        ("single.npy", "holds a single array; expected an archive"),
        ("text.npz", "cannot be read as an archive"),
        ("cut.npz", "cannot be read as an archive"),
        ("gone.npz", "No such file"),
    ]:
        with pytest.raises(BatchError, match=rf"{name} .*{message}"):
            load_images(NpzImages(type="npz", path=str(tmp_path / name)))


def test_an_array_of_absurd_announced_size_is_an_error(tmp_path):
    header = np.lib.format.magic(1, 0)
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d, 9), }\n" % 2**58
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header + struct.pack("<H", len(text)) + text + bytes(64))
        archive.writestr("labels.npy", b"")
    with pytest.raises(BatchError, match=r"a\.npz cannot be read as an archive"):
        load_images(NpzImages(type="npz", path=str(tmp_path / "a.npz")))


def test_the_hub_is_asked_for_the_revision_and_never_runs_its_code(hub):
    source = HubImages(type="hub", repo="ylecun/mnist", revision="v1", split="test")
    load_images(source)
    assert hub["asked"] == ("ylecun/mnist", {"split": "test", "revision": "v1"})


def test_a_parquet_file_read_by_the_real_library(tmp_path, monkeypatch):
    """A folder stands in for a repository: the library reads both in the same way."""
    (tmp_path / "someone" / "small").mkdir(parents=True)
    hub_rows().to_parquet(tmp_path / "someone" / "small" / "train.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    loaded = load_images(HUB)
    assert loaded.sha256 == load_images(write_npz(tmp_path / "a.npz")).sha256


def test_hub_rows_that_do_not_fit(hub):
    with pytest.raises(BatchError, match="no column 'digit'; it has: image, label, note"):
        load_images(HUB.model_copy(update={"label_column": "digit"}))
    hub["rows"] = hub_rows().select([])
    with pytest.raises(BatchError, match="'someone/small', split 'train' is empty"):
        load_images(HUB)
    hub["rows"] = Dataset.from_dict({"image": [[1, 2], [3, 4], [5]], "label": [0, 1, 2]})
    with pytest.raises(BatchError, match=r"image 2 has shape \(1,\), image 0 \(2,\)"):
        load_images(HUB)


def test_hub_failures_say_whether_to_try_again(hub):
    hub["rows"] = ValueError("Unknown split")
    with pytest.raises(BatchError, match=r"someone/small.*Unknown split") as caught:
        load_images(HUB)
    assert not caught.value.retryable
    hub["rows"] = ConnectionError("no route")
    with pytest.raises(BatchUnavailableError, match="no route") as caught:
        load_images(HUB)
    assert caught.value.retryable
    hub["rows"] = ImportError("To support decoding images, please install 'Pillow'.")
    with pytest.raises(ConfigError, match=r"Pillow.*pip install 'sharpness-probe\[continual\]'"):
        load_images(HUB)


def test_digits_are_those_of_scikit_learn():
    """The first image of the data set's description, printed by many tutorials: a zero."""
    loaded = load_images(PackagedImages(type="packaged", name="digits"))
    assert loaded.inputs.shape == (1797, 64)
    assert loaded.num_classes == 10
    assert loaded.labels[:10].tolist() == list(range(10))
    first = [0, 0, 5, 13, 9, 1, 0, 0, 0, 0, 13, 15, 10, 15, 5, 0]
    assert (loaded.inputs[0, :16] * 16).tolist() == first  # sixteenths are exact
    assert loaded.inputs.max() == 1


def test_mnist1d_is_made_here_and_leaves_random_numbers_alone():
    np.random.seed(3)
    random.seed(3)
    expected = np.random.rand(), random.random()
    np.random.seed(3)
    random.seed(3)
    loaded = load_images(PackagedImages(type="packaged", name="mnist1d"))
    assert (np.random.rand(), random.random()) == expected
    assert loaded.inputs.shape == (4000, 40)
    counts = np.bincount(loaded.labels, minlength=10)
    # 500 of each in 5,000; of these 4,000 are the training part, hypergeometric with sd 9.5
    assert counts.min() > 400 - 5 * 9.5
    assert counts.max() < 400 + 5 * 9.5
    # the package gives all 5,000 mean 0 and variance 1; 4,000 of them lie near
    assert abs(loaded.inputs.mean()) < 0.02
    assert abs(loaded.inputs.std() - 1) < 0.02


@pytest.mark.parametrize(("name", "package"), [("digits", "sklearn"), ("mnist1d", "mnist1d")])
def test_a_missing_package_says_what_to_install(monkeypatch, name, package):
    real = builtins.__import__

    def without(wanted, *rest):
        if wanted.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}")
        return real(wanted, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=rf"{package}.*'sharpness-probe\[continual\]'"):
        load_images(PackagedImages(type="packaged", name=name))
