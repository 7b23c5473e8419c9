"""Which files an OLMo `stepN-unsharded/` has, and what their keys say (torch-free).

`model` and `optim` are each a `.safetensors` or, from older runs, a `.pt`. A key of OLMo's
safetensors is base64 of a pickled (path of keys, whether the value is pickled too): it is opened by
an unpickler that knows no class at all, so nothing but text, numbers, lists and dicts comes out.
`train.pt` (random states, data order) is never opened.
"""

import base64
import binascii
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probe.checkpoints.header import StoredTensor, read_header
from probe.checkpoints.layout import check_archive, looks_like_huggingface
from probe.errors import CheckpointError

CONFIG = "config.yaml"
Path_of_keys = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OlmoFiles:
    """What lies in one directory; None: not there."""

    directory: Path
    model: Path | None
    optimizer: Path | None

    @property
    def size_bytes(self) -> int:
        """Bytes of the two files."""
        found = (path for path in (self.model, self.optimizer) if path is not None)
        return sum(path.stat().st_size for path in found)


def find_olmo_files(directory: Path) -> OlmoFiles:
    """OLMo's model and optimizer files of a directory; safetensors where both kinds are there."""
    return OlmoFiles(
        directory=directory,
        model=_either(directory, "model"),
        optimizer=_either(directory, "optim"),
    )


def is_olmo_unsharded(directory: Path) -> bool:
    """Whether a directory holds OLMo's own files, or its optimizer state beside other weights."""
    files = find_olmo_files(directory)
    if files.model is not None:
        return files.model.suffix == ".safetensors" or (directory / CONFIG).is_file()
    if files.optimizer is None:
        return False
    named = files.optimizer.suffix == ".safetensors"  # any trainer may write an optim.pt
    return (directory / CONFIG).is_file() or (named and looks_like_huggingface(directory))


def has_moments(path: Path) -> bool:
    """Whether an optimizer file holds Adam's moments, as far as can be told without torch.

    Raises:
        CheckpointError: It is truncated, or a key of it is not OLMo's.
    """
    if path.suffix == ".pt":
        check_archive(path)
        return True
    tensors, _ = read_olmo_header(path)
    return any(keys[-1] == "exp_avg_sq" for keys in tensors)


def read_olmo_header(
    path: Path,
) -> tuple[dict[Path_of_keys, StoredTensor], dict[Path_of_keys, StoredTensor]]:
    """Places of the tensors of one of OLMo's safetensors files, and of its pickled values.

    Raises:
        CheckpointError: It is truncated, or a key of it is not OLMo's.
    """
    tensors: dict[Path_of_keys, StoredTensor] = {}
    pickled: dict[Path_of_keys, StoredTensor] = {}
    for key, stored in read_header(path).items():
        keys, is_pickled = _decoded(path, key)
        if keys in tensors or keys in pickled:
            raise CheckpointError(f"{path}: key {keys} is there twice")
        (pickled if is_pickled else tensors)[keys] = stored
    return tensors, pickled


def plain_value(data: bytes, where: str) -> Any:
    """A pickled value of text, numbers, lists, tuples and dicts.

    Raises:
        CheckpointError: It is anything else.
    """
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a broken pickle can raise nearly anything, MemoryError too
        raise CheckpointError(
            f"{where}: not usable: {str(error) or type(error).__name__}. It is corrupt or hostile; "
            "nothing in it was run"
        ) from error


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, expected plain values")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it refers to outside storage {pid!r}")


def _decoded(path: Path, key: str) -> tuple[Path_of_keys, bool]:
    where = f"{path}: key {key[:60]!r}"
    try:
        data = base64.b64decode(key, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise CheckpointError(
            f"{where} is not one of OLMo's, expected base64 as scripts/unshard.py of OLMo writes it"
        ) from error
    content = plain_value(data, where)
    if isinstance(content, tuple) and len(content) == 2:
        keys, is_pickled = content
        plain = isinstance(keys, tuple) and all(type(part) in (str, int) for part in keys)
        if plain and keys and type(is_pickled) is bool:
            return keys, is_pickled
    raise CheckpointError(f"{where} means {content!r:.80}, expected (names, whether pickled)")


def _either(directory: Path, stem: str) -> Path | None:
    tensors, pickled = directory / f"{stem}.safetensors", directory / f"{stem}.pt"
    if tensors.is_file() and _encoded(tensors, sure=(directory / CONFIG).is_file()):
        return tensors
    return pickled if pickled.is_file() else None


def _encoded(path: Path, *, sure: bool) -> bool:
    """Whether the keys are OLMo's; for a broken file, whether it should have been."""
    try:
        header = read_header(path)
        return bool(header) and bool(_decoded(path, next(iter(header))))
    except CheckpointError:
        return sure and not (path.parent / "config.json").is_file()
