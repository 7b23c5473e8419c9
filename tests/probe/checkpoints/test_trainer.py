"""A directory written by the stock Trainer; the truth is its model and its optimizer."""

import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from probe.checkpoints import open_checkpoint
from probe.errors import CheckpointError, ConfigError
from probe.moments import choose_moments
from probe.parallel import Shard
from probe.result import CheckpointRef
from probe.series import list_checkpoints
from probe.spec import AdamW, LocalCheckpoints

MLP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def trainer(make_model, tmp_path) -> Trainer:
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=3,
        save_steps=3,
        per_device_train_batch_size=2,
        weight_decay=0.1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 48, (6, 8), generator=generator)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    made = Trainer(make_model(), arguments, train_dataset=rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.train()
    return made


@pytest.fixture
def directory(trainer, tmp_path) -> Path:
    return tmp_path / "run" / "checkpoint-3"


def open_directory(directory: Path):
    return open_checkpoint(CheckpointRef(source="local", location=str(directory)))


def listed(directory: Path) -> CheckpointRef:
    (ref,) = list_checkpoints(LocalCheckpoints(path=str(directory)))
    return ref


def truth(trainer) -> dict:
    state = getattr(trainer.optimizer, "optimizer", trainer.optimizer).state
    return {name: state[p] for name, p in trainer.model.named_parameters()}


def test_numbers_are_given_back_their_names_bit_for_bit(trainer, directory):
    ref = listed(directory)
    assert (ref.step, ref.format, ref.has_moments) == (3, "trainer", True)
    source = open_checkpoint(ref)
    assert source.ref.size_bytes == ref.size_bytes
    states = truth(trainer)
    loaded = dict(source.load_model(torch.float32, "sdpa").named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(loaded[name], parameter)
        assert torch.equal(source.read(name, "weight"), parameter.detach().flatten())
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(source.read(name, kind), states[name][kind].flatten())
            assert torch.equal(source.read(name, kind, 2, 9), states[name][kind].flatten()[2:9])
        assert source.hyper(name) == {"step": 3}
    order = list(states)  # the numbers do not follow named_parameters
    saved = torch.load(directory / "optimizer.pt", weights_only=True)["state"]
    assert any(
        saved[i]["exp_avg"].shape != states[name]["exp_avg"].shape for i, name in enumerate(order)
    )


def test_moments_are_not_mixed_with_betas_they_were_not_made_with(trainer, directory):
    """Trainer's own are 0.9 and 0.999; a job's, where it says none, 0.9 and 0.95."""
    source = open_directory(directory)
    assert source.stored_betas == (0.9, 0.999)
    values = trainer.model.lm_head.weight.detach().flatten()
    shard = Shard(name="lm_head.weight", lo=0, hi=len(values), base=values, live=values)
    found = choose_moments(AdamW(betas=(0.9, 0.999)), source, [shard], label="step 3")
    assert found.source == "checkpoint"
    assert choose_moments(AdamW(moments="warmup"), source, [shard], label="x").source == "warmup"
    with pytest.raises(ConfigError, match=r"Set optimizer\.betas: \[0\.9, 0\.999\]"):
        choose_moments(AdamW(), source, [shard], label="step 3")
    edit(directory, lambda c: c["param_groups"][1].update(betas=(0.9, 0.95)))
    assert open_directory(directory).stored_betas is None  # which would it be?


def edit(directory: Path, change) -> None:
    path = directory / "optimizer.pt"
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["param_groups"][0]["params"].append(99), r"groups of \[\d+, \d+\] numbers"),
        (lambda c: c["param_groups"].pop(), r"groups of \[16\] numbers, expected \[16, 9\]"),
        (lambda c: c["param_groups"][0]["params"].reverse(), "cannot be told"),
        (lambda c: c["state"][1].update(exp_avg=torch.zeros(3)), r"state 1 has shape \[3\]"),
        (lambda c: c["state"][1].update(max_exp_avg_sq=c["state"][1]["exp_avg_sq"]), "AMSGrad"),
        (lambda c: c["state"][1].pop("exp_avg_sq"), "has no exp_avg_sq; found step, exp_avg"),
        (lambda c: c.pop("state"), "expected `state` and `param_groups`"),
        (lambda c: c["state"].pop(15), "no moments of 'lm_head.weight'"),
    ],
)
def test_what_does_not_fit_is_named(directory, change, message):
    edit(directory, change)
    with pytest.raises(CheckpointError, match=f"optimizer.pt: .*{message}"):
        open_directory(directory).read("lm_head.weight", "exp_avg")


def test_an_optimizer_with_another_order_is_found_out(trainer, directory):
    parameters = list(trainer.model.parameters())
    own = torch.optim.AdamW([{"params": parameters[:16]}, {"params": parameters[16:]}])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    own.step()
    torch.save(own.state_dict(), directory / "optimizer.pt")
    with pytest.raises(CheckpointError, match="parameters in another order"):
        open_directory(directory).read(MLP, "exp_avg")


def test_files_of_different_checkpoints_are_found_out(directory):
    state = json.loads((directory / "trainer_state.json").read_text())
    (directory / "trainer_state.json").write_text(json.dumps(state | {"global_step": 2}))
    with pytest.raises(CheckpointError, match=r"name says step 3, trainer_state\.json says 2"):
        listed(directory)
    with pytest.raises(CheckpointError, match=r"moments of step 3, trainer_state\.json says 2"):
        open_directory(directory).hyper(MLP)


@pytest.mark.parametrize("length", [0, 100, -200])
def test_a_truncated_file_is_named_when_listed(directory, length):
    path = directory / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: found \d+ bytes, .*truncated"):
        listed(directory)


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_a_hostile_optimizer_executes_nothing(directory, tmp_path):
    sprung = tmp_path / "sprung"
    torch.save({"state": {}, "param_groups": [Trap(sprung)]}, directory / "optimizer.pt")
    assert listed(directory).has_moments
    source = open_directory(directory)
    source.load_model(torch.float32, "sdpa")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: cannot be read"):
        source.read(MLP, "exp_avg")
    (directory / "optimizer.pt").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: found"):
        listed(directory)
    assert not sprung.exists()
