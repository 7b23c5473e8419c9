"""GPUs and their memory, from an nvidia-smi of our own making."""

import pytest

from probe.gpus import gpu_memory_bytes

MIB = 2**20
THREE = """\
GPU-1a2b, 143771
GPU-1a9c, 81559
GPU-77aa, 24576
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    def install(output, status=0):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{output}END\nexit {status}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [143771, 81559, 24576]),
        ("2,0", [24576, 143771]),
        ("GPU-77aa,1", [24576, 81559]),
        ("GPU-77", [24576]),
        ("GPU-1a", []),  # two of them begin so
        ("0,7,1", [143771]),  # as CUDA: none after one that is not there
        ("0,-1,1", [143771]),
        ("", []),
        ("MIG-3f,0", []),
    ],
)
def test_the_visible_ones_in_torchs_order(nvidia_smi, monkeypatch, visible, expected):
    nvidia_smi(THREE)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_memory_bytes() == [mib * MIB for mib in expected]


def test_none_without_a_driver(nvidia_smi, monkeypatch, tmp_path):
    nvidia_smi("NVIDIA-SMI has failed\n", status=9)
    assert gpu_memory_bytes() == []
    nvidia_smi("GPU-1, [N/A]\n")
    assert gpu_memory_bytes() == []
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert gpu_memory_bytes() == []
