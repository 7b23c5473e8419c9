"""Images and their classes as two arrays, from files, the hub or a package (torch-free).

What is done to them later (choice, normalisation, new labels) is the stream's:
`probe.continual.streams`.
"""

import hashlib
import os
import random
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probe.continual.idx import read_idx
from probe.errors import BatchError, BatchUnavailableError, ConfigError
from probe.spec_continual import HubImages, IdxImages, ImageData, NpzImages, PackagedImages
from probe.transport import is_transport_failure

Arrays = tuple[NDArray[Any], NDArray[Any]]  # images (N, ...) and labels (N,), as they were found
_INSTALL = "pip install 'sharpness-probe[continual]'"
_BROKEN_ARCHIVE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,  # encrypted, or packed in a way zipfile does not know
    MemoryError,  # a broken header may announce any size
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
)
_DIGITS_MAX = 16.0  # load_digits counts the dark pixels of a 4 x 4 block


@dataclass(frozen=True, eq=False)
class Images:
    """A whole data set in memory."""

    inputs: NDArray[np.float32]  # (N, F), as found; integers of 0 to 255 are divided by 255
    labels: NDArray[np.int64]  # (N,), 0 to num_classes - 1
    num_classes: int
    sha256: str  # of inputs and labels: equal where two sources gave the same numbers
    name: str  # for messages and results


def load_images(source: ImageData) -> Images:
    """All images of a source, each flattened to one row, and their classes.

    Integers between 0 and 255 are divided by 255; other numbers are kept. The distinct labels,
    in ascending order, become the classes 0 to C - 1.

    Args:
        source: Files, a hub data set, or the name of data that comes with a package.

    Returns:
        Inputs (N, F) in fp32 and labels (N,).

    Raises:
        BatchError: A file or data set is missing, broken, or not images with integer labels.
        BatchUnavailableError: The hub cannot be reached now.
        ConfigError: The package that holds the data is not installed.

    Cost: the data set in memory, about twice in fp32 while it is converted.
    """
    match source:
        case IdxImages():
            name = Path(source.images).name
            arrays = read_idx(_path(source.images)), read_idx(_path(source.labels))
        case NpzImages():
            name = f"{Path(source.path).name} ({source.images}, {source.labels})"
            arrays = _read_npz(source)
        case HubImages():
            name = f"{source.repo}, split {source.split}"
            arrays = _read_hub(source)
        case PackagedImages():
            name = source.name
            arrays = _digits() if source.name == "digits" else _mnist1d()
    return _checked(*arrays, name)


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _read_npz(source: NpzImages) -> Arrays:
    path = _path(source.path)
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise BatchError(f"{path} holds a single array; expected an archive (.npz) of two")
            for name in (source.images, source.labels):
                if name not in archive:
                    raise BatchError(
                        f"{path} has no array {name!r}; it holds: {', '.join(archive.files)}"
                    )
            return archive[source.images], archive[source.labels]
    except _BROKEN_ARCHIVE as error:
        reason = getattr(error, "strerror", None) or error
        raise BatchError(f"{path} cannot be read as an archive of arrays: {reason}") from error


def _read_hub(source: HubImages) -> Arrays:
    # here, because it takes seconds to import and most jobs read files
    from datasets import load_dataset  # type: ignore[import-untyped]

    what = f"hub data set {source.repo!r}, split {source.split!r}"
    try:
        rows = load_dataset(source.repo, split=source.split, revision=source.revision)
        return _columns(rows, source, what)
    except BatchError:
        raise
    except ImportError as error:  # pillow, when the first image is decoded
        raise ConfigError(f"{what}: {error}; {_INSTALL}") from error
    except Exception as error:  # datasets raises what each of its layers happens to raise
        if is_transport_failure(error):
            raise BatchUnavailableError(f"{what}: {error}") from error
        raise BatchError(f"{what}: {error}") from error


def _columns(rows: Any, source: HubImages, what: str) -> Arrays:
    wanted = [source.image_column, source.label_column]
    for column in wanted:
        if column not in rows.column_names:
            raise BatchError(
                f"{what} has no column {column!r}; it has: {', '.join(rows.column_names)}"
            )
    images: list[NDArray[Any]] = []
    labels: list[Any] = []
    for row in rows.select_columns(wanted):
        images.append(np.asarray(row[source.image_column]))
        labels.append(row[source.label_column])
        if images[-1].shape != images[0].shape:
            raise BatchError(
                f"{what}: image {len(images) - 1} has shape {images[-1].shape}, image 0 "
                f"{images[0].shape}; all must be of one shape"
            )
    if not images:
        raise BatchError(f"{what} is empty")
    return np.stack(images), np.asarray(labels)


def _digits() -> Arrays:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(f"digits come with scikit-learn: {error}; {_INSTALL}") from error
    pixels, labels = load_digits(return_X_y=True)
    return pixels / _DIGITS_MAX, labels


def _mnist1d() -> Arrays:
    """The published training part: made from seed 42, not downloaded; takes a second."""
    try:
        from mnist1d.data import make_dataset
    except ImportError as error:
        raise ConfigError(f"mnist1d is a package of its own: {error}; {_INSTALL}") from error
    with _random_state_kept():
        made = make_dataset()
    return made["x"], made["y"]


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """mnist1d seeds the generators of the whole process."""
    pythons, numpys = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(pythons)
        np.random.set_state(numpys)


def _checked(images: NDArray[Any], labels: NDArray[Any], name: str) -> Images:
    if images.ndim < 2 or labels.ndim != 1 or len(images) != len(labels):
        raise BatchError(
            f"{name}: images have shape {images.shape} and labels {labels.shape}; expected "
            "(N, ...) and (N,) with the same N"
        )
    if labels.dtype.kind not in "iu":
        raise BatchError(f"{name}: labels are {labels.dtype}; expected integers")
    inputs = _as_inputs(images, name)
    classes, places = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise BatchError(
            f"{name}: the labels of {len(labels)} images have {len(classes)} distinct values; "
            "expected two classes or more"
        )
    found = places.astype(np.int64)
    digest = hashlib.sha256(repr(inputs.shape).encode())
    digest.update(np.ascontiguousarray(inputs, "<f4").data)
    digest.update(np.ascontiguousarray(found, "<i8").data)
    return Images(inputs, found, len(classes), digest.hexdigest(), name)


def _as_inputs(images: NDArray[Any], name: str) -> NDArray[np.float32]:
    if images.dtype.kind not in "biuf" or images.size == 0:
        raise BatchError(
            f"{name}: images are {images.dtype} of shape {images.shape}; expected real numbers, "
            "at least one"
        )
    is_byte_like = images.dtype.kind in "iu" and images.min() >= 0 and images.max() <= 255
    with np.errstate(over="ignore"):  # beyond fp32: found below
        inputs = images.reshape(len(images), -1).astype(np.float32)
    if is_byte_like:
        inputs /= 255
    finite = np.isfinite(inputs).all(axis=1)
    if not finite.all():
        raise BatchError(
            f"{name}: image {int(finite.argmin())} holds a number that is not finite in fp32"
        )
    return inputs
