"""Where a number came from: versions, commit, device."""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import probe

_PACKAGES = (
    *("torch", "numpy", "transformers", "tokenizers", "safetensors", "datasets"),
    *("flash-attn", "deepspeed"),
)


@cache
def package_versions() -> dict[str, str]:
    """Versions of Python, this package and what the numbers depend on; absent ones left out."""
    found = {"python": platform.python_version(), "probe": probe.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with `-dirty` for changed files; else None."""
    root = Path(probe.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "probe")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}-dirty" if changed else head


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu (N threads)`: in half precision the thread count moves results."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
