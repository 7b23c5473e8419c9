"""A saved directory is complete or absent, and holds the optimizer's own numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file

from probe.checkpoints import open_checkpoint, save_checkpoint
from probe.errors import CheckpointError
from probe.result import CheckpointRef


def test_writes_safetensors_and_state_only(saved):
    names = {path.name for path in saved.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "training_state.json",
    }
    state = json.loads((saved / "training_state.json").read_text())
    assert state == {"step": 2, "tokens": 32, "learning_rate": 1e-2}
    assert [path.name for path in saved.parent.iterdir()] == ["step-2"]


def test_a_resumed_optimizer_would_take_the_same_step(saved, trained):
    """Moments read back and put into a fresh AdamW give the step of the original, exactly."""
    source = open_checkpoint(CheckpointRef(source="local", location=str(saved)))
    copy = source.load_model(torch.float32, "sdpa")
    optimizer = torch.optim.AdamW(copy.parameters(), lr=1e-2)
    for name, parameter in copy.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(source.hyper(name)["step"])),
            "exp_avg": source.read(name, "exp_avg").view_as(parameter),
            "exp_avg_sq": source.read(name, "exp_avg_sq").view_as(parameter),
        }
    ids = torch.arange(16).view(2, 8)
    for model, stepped in ((copy, optimizer), (trained.model.eval(), trained.optimizer)):
        stepped.zero_grad()
        model(ids, labels=ids).loss.backward()
        stepped.step()
    for name, parameter in copy.named_parameters():
        assert torch.equal(parameter, trained.model.get_parameter(name)), name


def test_before_the_first_step_the_moments_are_adams_start(make_model, tmp_path):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(model, tmp_path / "step-0", optimizer=optimizer)
    tensors = load_file(tmp_path / "step-0" / "optimizer.safetensors")
    assert len(tensors) == 3 * len(list(model.parameters()))
    assert all(not tensor.any() for tensor in tensors.values())


def test_frozen_parameters_outside_the_optimizer_have_no_moments(make_model, tmp_path):
    model = make_model()
    trainable = list(model.model.layers.parameters())
    save_checkpoint(model, tmp_path / "a", optimizer=torch.optim.AdamW(trainable))
    keys = load_file(tmp_path / "a" / "optimizer.safetensors")
    assert "lm_head.weight.exp_avg" not in keys
    assert len(keys) == 3 * len(trainable)


def test_never_overwrites(saved, trained):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(CheckpointError, match="never overwritten"):
        save_checkpoint(trained.model, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_failure_leaves_nothing_behind(trained, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("probe.checkpoints.save.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(trained.model, tmp_path / "runs" / "x", optimizer=trained.optimizer)
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, amsgrad=True),
    ],
    ids=["sgd", "amsgrad"],
)
def test_an_optimizer_whose_direction_would_be_lost_is_refused(make_model, tmp_path, make):
    model = make_model()
    with pytest.raises(CheckpointError, match="Adam and AdamW"):
        save_checkpoint(model, tmp_path / "x", optimizer=make(model.parameters()))
    assert list(tmp_path.iterdir()) == []


def test_an_optimizer_of_another_model_is_refused(make_model, tmp_path):
    other = torch.optim.AdamW(make_model(seed=1).parameters())
    with pytest.raises(CheckpointError, match="does not"):
        save_checkpoint(make_model(), tmp_path / "x", optimizer=other)
