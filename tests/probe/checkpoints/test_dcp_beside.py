"""Hugging Face weights with a torch DCP of the optimizer's state beside them."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from probe.checkpoints import open_checkpoint
from probe.errors import CheckpointError
from probe.result import CheckpointRef
from probe.series import list_checkpoints
from probe.spec import LocalCheckpoints

UP = "model.layers.1.mlp.up_proj.weight"


def state_of(trained) -> dict:
    return {name: trained.optimizer.state[p] for name, p in trained.model.named_parameters()}


def save(directory: Path, content: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process, on purpose
        dcp.save(content, checkpoint_id=directory, no_dist=True)


@pytest.fixture
def directory(trained, tmp_path) -> Path:
    trained.model.save_pretrained(tmp_path / "checkpoint-2")
    content = {"state": state_of(trained), "param_groups": [{"betas": (0.9, 0.98)}]}
    save(tmp_path / "checkpoint-2" / "optimizer_0", {"optimizer": content})
    return tmp_path / "checkpoint-2"


def listed(directory: Path) -> CheckpointRef:
    (ref,) = list_checkpoints(LocalCheckpoints(path=str(directory)))
    return ref


def test_weights_of_one_and_moments_of_the_other(trained, directory):
    ref = listed(directory)
    assert (ref.step, ref.format, ref.has_moments) == (2, "safetensors+dcp", True)
    source = open_checkpoint(ref)
    assert (source.ref, source.has_moments) == (ref, True)
    assert source.stored_betas == (0.9, 0.98)
    loaded = dict(source.load_model(torch.float32, "sdpa").named_parameters())
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(loaded[name], parameter)
        assert source.weight_shapes()[name] == tuple(parameter.shape)
        assert torch.equal(source.read(name, "weight"), parameter.detach().flatten())
        for kind in ("exp_avg", "exp_avg_sq"):
            truth = trained.optimizer.state[parameter][kind].flatten()
            assert torch.equal(source.read(name, kind), truth)
            assert torch.equal(source.read(name, kind, 2, 7), truth[2:7])
        assert source.hyper(name) == {"step": 2}
    assert [name for name, _ in source.skeleton("sdpa").named_parameters()] == list(loaded)


def test_a_copy_of_the_weights_in_dcp_does_no_harm(trained, directory):
    save(directory / "pytorch_model_fsdp_0", {"model": trained.model.state_dict()})
    source = open_checkpoint(listed(directory))
    assert source.read(UP, "exp_avg").any()


def test_another_model_s_state_and_a_cut_off_save_are_named(trained, make_model, directory):
    states = state_of(trained)
    states[UP] = states[UP] | {"exp_avg": torch.zeros(25, 16), "exp_avg_sq": torch.zeros(25, 16)}
    for path in (directory / "optimizer_0").iterdir():
        path.unlink()
    save(directory / "optimizer_0", {"optimizer": {"state": states}})
    with pytest.raises(CheckpointError, match=r"shape \[25, 16\], expected \[24, 16\]"):
        open_checkpoint(listed(directory)).read(UP, "exp_avg")
    (data,) = (directory / "optimizer_0").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"distcp: key .*truncated"):
        listed(directory)


def test_weights_alone_have_no_moments(trained, directory):
    for path in (directory / "optimizer_0").iterdir():
        path.unlink()
    save(directory / "optimizer_0", {"model": trained.model.state_dict()})
    assert listed(directory).has_moments is False
    assert open_checkpoint(listed(directory)).has_moments is False
