"""What a torch distributed checkpoint (DCP) holds, from its `.metadata` alone (torch-free).

`.metadata` is a pickle. It is opened with an unpickler that knows a fixed list of names and makes
every object a plain record, so nothing in it can run, and neither torch nor the library that
wrote it is imported. Tensor data (`__R_K.distcp`) is not touched here.
"""

import io
import math
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probe.errors import CheckpointError

METADATA = ".metadata"
MAX_METADATA_BYTES = 2_000_000_000  # 100,000 tensors of 1,000 chunks
_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"),
    *("complex64", "complex128"),
)
_RECORDS = {  # module -> names that become records; where torch and OLMo-core have kept them
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    ),
    "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties", "MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "olmo_core.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """A range of bytes of one file."""

    file: Path
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, stored as one `torch.save` stream."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class DcpTensor:
    """One tensor: chunks that cover it exactly once."""

    key: str
    dtype: str  # torch's name: float32, bfloat16, ...
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def num_elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class DcpIndex:
    """Every tensor and every other object of a checkpoint."""

    directory: Path
    tensors: Mapping[str, DcpTensor]
    objects: Mapping[str, Place]  # what is no tensor, pickled by torch.save
    files: frozenset[Path]

    @property
    def size_bytes(self) -> int:
        """Bytes of every file that holds a part."""
        return sum(file.stat().st_size for file in self.files)


def dcp_parts(directory: Path) -> list[Path]:
    """The directories under a checkpoint that hold a `.metadata`: itself, or its children."""
    if (directory / METADATA).is_file():
        return [directory]
    return sorted(path.parent for path in directory.glob(f"*/{METADATA}") if path.is_file())


def read_dcp_index(directory: Path, parts: Iterable[Path]) -> DcpIndex:
    """Every tensor of a checkpoint saved in one or several DCP directories, checked.

    Args:
        directory: The checkpoint, for messages.
        parts: Directories with a `.metadata`; accelerate saves weights and optimizer apart.

    Raises:
        CheckpointError: A `.metadata` is no DCP metadata or names anything beyond it, a file is
            missing or too short, chunks leave gaps or overlap, or two parts hold the same key.

    Cost: reads the `.metadata` files, and a stat per data file.
    """
    tensors: dict[str, DcpTensor] = {}
    objects: dict[str, Place] = {}
    files: set[Path] = set()
    parts = list(parts)
    if not parts:
        raise CheckpointError(
            f"{directory}: data files (*.distcp) but no {METADATA}, which is written last: the "
            "save was cut off, or the file was not copied"
        )
    for part in parts:
        found = _Part(part)
        for key in found.tensors.keys() | found.objects.keys():
            if key in tensors or key in objects:
                raise CheckpointError(
                    f"{part / METADATA}: key {key!r} is also in another part of {directory}; "
                    "which one is meant?"
                )
        tensors |= found.tensors
        objects |= found.objects
        files |= {part / METADATA, *found.file_sizes}
    return DcpIndex(directory=directory, tensors=tensors, objects=objects, files=frozenset(files))


class _Record:
    """Stands in for every class a `.metadata` may name; keeps what was pickled, does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __new__(cls, *_args: Any) -> "_Record":
        record = super().__new__(cls)
        record.args, record.state = (), None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """A dataclass field of the pickled object; None where it was not pickled."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class _Unpickler(pickle.Unpickler):
    """Knows the names above and nothing else; makes new classes for each file it reads.

    New, because a pickle may set attributes of a class it names: that must not outlive it.
    """

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self._known: dict[tuple[str, str], Any] = {
            (module, name): type(name, (_Record,), {})
            for module, names in _RECORDS.items()
            for name in names
        }
        self._known |= {("torch", name): name for name in _DTYPES}
        self._known[("torch", "Size")] = tuple
        self._known[("collections", "OrderedDict")] = dict

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no DCP metadata needs")
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it refers to outside storage {pid!r}")


class _Part:
    """One DCP directory, read and checked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / METADATA
        self.file_sizes: dict[Path, int] = {}
        metadata = self._unpickled()
        entries, stored = metadata.field("state_dict_metadata"), metadata.field("storage_data")
        if not isinstance(entries, dict) or not isinstance(stored, dict):
            raise CheckpointError(f"{self.path}: expected torch DCP metadata, found another pickle")
        try:
            places = {self._position(index): info for index, info in stored.items()}
            self.tensors: dict[str, DcpTensor] = {}
            self.objects: dict[str, Place] = {}
            for key, entry in entries.items():
                if type(entry).__name__ == "TensorStorageMetadata":
                    self.tensors[key] = self._tensor(key, entry, places)
                else:
                    self.objects[key] = self._place(key, places.get((key, None)))
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{self.path}: malformed DCP metadata: {error}") from error

    def _unpickled(self) -> _Record:
        try:
            size = self.path.stat().st_size
            if size > MAX_METADATA_BYTES:
                raise CheckpointError(
                    f"{self.path}: found {size} bytes, expected at most {MAX_METADATA_BYTES}"
                )
            content: Any = _Unpickler(io.BytesIO(self.path.read_bytes())).load()
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error
        except CheckpointError:
            raise
        except Exception as error:  # a broken pickle can raise nearly anything, MemoryError too
            raise CheckpointError(
                f"{self.path}: not usable as torch DCP metadata: "
                f"{str(error) or type(error).__name__}. It is truncated, corrupt or hostile; "
                "nothing in it was run"
            ) from error
        if not isinstance(content, _Record) or type(content).__name__ != "Metadata":
            raise CheckpointError(
                f"{self.path}: expected torch DCP metadata, found a pickled "
                f"{type(content).__name__}"
            )
        return content

    @staticmethod
    def _position(index: _Record) -> tuple[str, tuple[int, ...] | None]:
        offset = index.field("offset")
        return str(index.field("fqn")), None if offset is None else _extents(offset)

    def _tensor(self, key: str, entry: _Record, places: dict[Any, _Record]) -> DcpTensor:
        shape = _extents(entry.field("size"))
        properties = entry.field("properties")
        state = properties.state
        dtype = state[0] if isinstance(state, tuple) else properties.field("dtype")
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: key {key!r} has dtype {dtype!r}, expected one torch knows"
            )
        chunks = []
        for box in entry.field("chunks"):
            offsets, sizes = _extents(box.field("offsets")), _extents(box.field("sizes"))
            if math.prod(sizes) == 0:  # a rank that holds nothing of this tensor
                continue
            chunks.append(Chunk(offsets, sizes, self._place(key, places.get((key, offsets)))))
        tensor = DcpTensor(key=key, dtype=dtype, shape=shape, chunks=tuple(chunks))
        if not _covered_once(tensor):
            raise CheckpointError(
                f"{self.path}: key {key!r} of shape {list(shape)}: its {len(chunks)} chunks of "
                f"{sum(math.prod(c.sizes) for c in chunks)} elements leave gaps or overlap, "
                f"expected {tensor.num_elements} elements once each"
            )
        return tensor

    def _place(self, key: str, stored: _Record | None) -> Place:
        if stored is None:
            raise CheckpointError(f"{self.path}: key {key!r} has a chunk without a place on disk")
        name, start, num_bytes = (
            stored.field(part) for part in ("relative_path", "offset", "length")
        )
        if stored.field("transform_descriptors"):
            raise CheckpointError(
                f"{self.path}: key {key!r} is stored through "
                f"{stored.field('transform_descriptors')}, expected plain torch.save streams"
            )
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise CheckpointError(
                f"{self.path}: key {key!r} points to {name!r}; expected a file name in the same "
                "directory"
            )
        if type(start) is not int or type(num_bytes) is not int or start < 0 or num_bytes < 0:
            raise CheckpointError(
                f"{self.path}: key {key!r} lies at {start!r} + {num_bytes!r} in {name}"
            )
        file = self.directory / name
        size = self._size(file, key)
        if start + num_bytes > size:
            raise CheckpointError(
                f"{file}: key {key!r} ends at byte {start + num_bytes}, found {size} bytes. It "
                "is truncated: copy or save it again"
            )
        return Place(file, start, num_bytes)

    def _size(self, file: Path, key: str) -> int:
        if file not in self.file_sizes:
            if not file.is_file():
                raise CheckpointError(f"{file}: missing; {METADATA} expects key {key!r} in it")
            self.file_sizes[file] = file.stat().st_size
        return self.file_sizes[file]


def _extents(value: Any) -> tuple[int, ...]:
    extents = tuple(value)
    if any(type(extent) is not int or extent < 0 for extent in extents):
        raise ValueError(f"extents {extents!r}, expected whole numbers >= 0")
    return extents


def _covered_once(tensor: DcpTensor) -> bool:
    """Whether the chunks fill the tensor without gap or overlap."""
    shape, chunks = tensor.shape, tensor.chunks
    for chunk in chunks:
        if len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape):
            return False
        ends = (o + s for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        if any(end > extent for end, extent in zip(ends, shape, strict=True)):
            return False
    if sum(math.prod(chunk.sizes) for chunk in chunks) != tensor.num_elements:
        return False
    if all(chunk.sizes[1:] == shape[1:] for chunk in chunks):  # split along dim 0, or not at all
        starts = {chunk.offsets[0] if shape else 0: chunk for chunk in chunks}
        at = 0
        while at in starts and shape and at < shape[0]:
            at += starts[at].sizes[0]
        return len(starts) == len(chunks) and (at == shape[0] if shape else len(chunks) == 1)
    return not any(_overlap(a, b) for i, a in enumerate(chunks) for b in chunks[:i])


def _overlap(one: Chunk, other: Chunk) -> bool:
    return all(
        max(a, b) < min(a + m, b + n)
        for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )
