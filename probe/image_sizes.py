"""How many images a data set holds and how large they are, without reading them (torch-free)."""

import gzip
import math
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, NamedTuple, cast

from probe.errors import BatchError
from probe.spec_continual import IdxImages, ImageData, NpzImages, PackagedImages

_GZIP_MAGIC = b"\x1f\x8b"
_NOT_READ = (OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile, struct.error)


class ImageSizes(NamedTuple):
    """What a header or a name tells; `num_classes` only where the labels need not be read."""

    num_images: int
    num_features: int
    num_classes: int | None = None


_PACKAGED = {"digits": ImageSizes(1797, 64, 10), "mnist1d": ImageSizes(4000, 40, 10)}


def image_sizes(source: ImageData) -> ImageSizes | None:
    """Images and numbers per image of a source; None where only fetching it would tell.

    Raises:
        BatchError: A file is there but its header says nothing of the kind.

    Cost: a few bytes of one file; nothing is fetched.
    """
    if isinstance(source, PackagedImages):
        return _PACKAGED[source.name]
    if not isinstance(source, IdxImages | NpzImages):
        return None
    path = Path(os.path.expanduser(source.images if isinstance(source, IdxImages) else source.path))
    if not path.is_file():
        return None
    try:
        shape = _npz_shape(path, source.images) if isinstance(source, NpzImages) else _idx(path)
    except _NOT_READ as error:
        raise BatchError(f"{path} cannot be read: {error}") from error
    if len(shape) < 2:
        raise BatchError(f"{path} holds an array of shape {shape}; images need (N, ...)")
    return ImageSizes(shape[0], math.prod(shape[1:]))


def _idx(path: Path) -> tuple[int, ...]:
    """Sizes in the header of MNIST's format: 0, 0, type, count of sizes, then big-endian sizes."""
    with path.open("rb") as raw:
        is_packed = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if is_packed else raw
        magic = stream.read(4)
        if len(magic) < 4 or magic[:2] != b"\0\0":
            raise ValueError(f"it begins with {magic.hex(' ')}; images in IDX with 00 00 08 03")
        return struct.unpack(f">{magic[3]}I", stream.read(4 * magic[3]))


def _npz_shape(path: Path, name: str) -> tuple[int, ...]:
    # here, because most plans need no numpy
    from numpy.lib import format as npy

    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, _ = read(stream)
    return tuple(int(size) for size in shape)
