"""Nothing in a checkpoint directory may run: not a pickle, not its Python files."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from probe.checkpoints import open_checkpoint
from probe.errors import CheckpointError
from probe.result import CheckpointRef
from probe.series import list_checkpoints
from probe.spec import LocalCheckpoints


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.fixture
def sprung(tmp_path) -> Path:
    return tmp_path / "sprung"


def set_trap(path: Path, sprung: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(sprung)))


def open_directory(directory: Path):
    return open_checkpoint(CheckpointRef(source="local", location=str(directory)))


def test_the_trap_works(tmp_path, sprung):
    set_trap(tmp_path / "x.pkl", sprung)
    pickle.loads((tmp_path / "x.pkl").read_bytes())
    assert sprung.exists()


def test_pickled_weights_are_refused_unopened(saved, sprung):
    (saved / "model.safetensors").unlink()
    set_trap(saved / "pytorch_model.bin", sprung)
    for call in (
        lambda: open_directory(saved),
        lambda: list_checkpoints(LocalCheckpoints(path=str(saved))),
    ):
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*save_checkpoint"):
            call()
    assert not sprung.exists()


def test_pickles_beside_safetensors_are_left_unopened(saved, sprung):
    (saved / "optimizer.safetensors").unlink()
    for name in ("optimizer.pt", "scheduler.pt", "pytorch_model.bin", "training_args.bin", "x.pkl"):
        set_trap(saved / name, sprung)
    source = open_directory(saved)
    assert not source.has_moments
    source.load_model(torch.float32, "sdpa")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is a pickle.*save_checkpoint"):
        source.read("lm_head.weight", "exp_avg")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        source.load_tokenizer(None)
    assert not sprung.exists()


def plant_code(directory: Path, sprung: Path) -> None:
    code = f"from pathlib import Path\nPath({str(sprung)!r}).touch()\nclass Planted: pass\n"
    (directory / "planted.py").write_text(code)


@pytest.mark.parametrize("model_type", ["olmo2", "planted"])
def test_code_beside_the_weights_never_runs(saved, sprung, model_type):
    plant_code(saved, sprung)
    config = json.loads((saved / "config.json").read_text())
    config["model_type"] = model_type
    config["auto_map"] = {
        "AutoConfig": "planted.Planted",
        "AutoModelForCausalLM": "planted.Planted",
    }
    (saved / "config.json").write_text(json.dumps(config))
    source = open_directory(saved)
    if model_type == "olmo2":  # transformers knows it, so its own class is used
        assert type(source.load_model(torch.float32, "sdpa")).__module__.startswith("transformers.")
    else:
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            source.load_model(torch.float32, "sdpa")
    assert not sprung.exists()


def test_code_beside_the_tokenizer_never_runs(saved, sprung):
    plant_code(saved, sprung)
    (saved / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Planted",
                "auto_map": {"AutoTokenizer": ["planted.Planted", "planted.Planted"]},
            }
        )
    )
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        open_directory(saved).load_tokenizer(None)
    assert not sprung.exists()


def test_an_adapter_is_refused(saved):
    (saved / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(CheckpointError, match="merge it"):
        open_directory(saved)
