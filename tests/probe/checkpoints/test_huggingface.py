"""The truth here is the model and optimizer the directory was written from."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from probe.checkpoints import open_checkpoint, save_checkpoint
from probe.checkpoints.huggingface import load_tokenizer
from probe.errors import CheckpointError
from probe.result import CheckpointRef

MLP = "model.layers.1.mlp.up_proj.weight"


def open_directory(directory: Path):
    return open_checkpoint(CheckpointRef(source="local", location=str(directory)))


def load(directory: Path, dtype=torch.float32):
    return open_directory(directory).load_model(dtype, "sdpa")


def edit(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def shard(directory: Path, name: str, num_shards: int) -> None:
    """Split `name`.safetensors into shards with an index, as the hub's large models are."""
    tensors = load_file(directory / f"{name}.safetensors")
    weight_map = {}
    for i in range(num_shards):
        part = {key: tensors[key] for key in sorted(tensors)[i::num_shards]}
        file = f"{name}-{i + 1:05}-of-{num_shards:05}.safetensors"
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    (directory / f"{name}.safetensors").unlink()


def assert_holds(directory: Path, trained) -> None:
    source = open_directory(directory)
    assert source.has_moments
    loaded = dict(source.load_model(torch.float32, "sdpa").named_parameters())
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(loaded[name], parameter)
        assert torch.equal(source.read(name, "weight"), parameter.flatten())
        state = trained.optimizer.state[parameter]
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(source.read(name, kind), state[kind].flatten())
        assert source.hyper(name) == {"step": 2}


def test_gives_back_weights_and_moments_bit_for_bit(saved, trained):
    assert_holds(saved, trained)


def test_gives_them_back_from_shards_too(saved, trained):
    shard(saved, "model", 3)
    shard(saved, "optimizer", 2)
    assert_holds(saved, trained)
    assert open_directory(saved).ref.format == "safetensors-index"


def test_moments_may_lie_in_the_weights_file(saved, trained):
    edit(
        saved / "model.safetensors", lambda t: t.update(load_file(saved / "optimizer.safetensors"))
    )
    (saved / "optimizer.safetensors").unlink()
    assert_holds(saved, trained)


def test_the_model_comes_ready_to_measure(saved):
    model = load(saved)
    assert not model.training
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "sdpa"
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


def test_converts_dtype_on_load_but_reads_what_is_stored(saved, trained):
    source = open_directory(saved)
    for name, parameter in source.load_model(torch.bfloat16, "eager").named_parameters():
        assert torch.equal(parameter, trained.model.get_parameter(name).to(torch.bfloat16))
        assert source.read(name, "weight").dtype == torch.float32


def test_reads_flat_ranges(saved, trained):
    source = open_directory(saved)
    flat = trained.model.get_parameter(MLP).detach().flatten()
    for lo, hi in [(0, 1), (5, 17), (100, len(flat)), (7, 7)]:
        assert torch.equal(source.read(MLP, "weight", lo, hi), flat[lo:hi])
    with pytest.raises(CheckpointError, match=rf"{len(flat)} elements, asked for 0\.\.999999"):
        source.read(MLP, "weight", 0, 999999)
    assert source.read(MLP, "weight", 3, 5).add_(1).sum().isfinite()  # writable, and its own


def test_tied_weights_have_no_lm_head(make_model, tmp_path):
    model = make_model(tie_word_embeddings=True)
    save_checkpoint(model, tmp_path / "tied")
    with safe_open(tmp_path / "tied" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    loaded = load(tmp_path / "tied")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_without_optimizer_state_says_what_to_do(make_model, tmp_path):
    save_checkpoint(make_model(), tmp_path / "bare")
    source = open_directory(tmp_path / "bare")
    assert not source.has_moments
    with pytest.raises(CheckpointError, match="moments: warmup"):
        source.read(MLP, "exp_avg")
    with pytest.raises(CheckpointError, match="no optimizer state"):
        source.hyper(MLP)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(MLP), f"1 weights the model needs are missing.*{MLP}"),
        (
            lambda t: t.update({MLP: t[MLP][:, :7].clone()}),
            rf"{MLP}.*\[24, 7\].*\[24, 16\]",
        ),
        (lambda t: t.update(stranger=torch.zeros(2)), "no place in the model.*'stranger'"),
    ],
    ids=["missing", "wrong shape", "superfluous"],
)
def test_a_weight_that_does_not_fit_is_an_error(saved, change, message):
    (saved / "optimizer.safetensors").unlink()
    edit(saved / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message) as error:
        load(saved)
    assert str(saved) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{MLP}.exp_avg_sq"), f"found .* but no {MLP}.exp_avg_sq"),
        (lambda t: t.pop(f"{MLP}.step"), f"no {MLP}.step"),
        (lambda t: t.pop(f"{MLP}.exp_avg"), f"no {MLP}.exp_avg"),
        (
            lambda t: t.update({f"{MLP}.exp_avg": torch.zeros(16, 24)}),
            rf"optimizer.safetensors.*{MLP}.exp_avg.*\[16, 24\], expected \[24, 16\]",
        ),
    ],
    ids=["no second moment", "no step", "no first moment", "wrong shape"],
)
def test_broken_moments_are_an_error(saved, change, message):
    edit(saved / "optimizer.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        open_directory(saved)


def test_a_parameter_without_moments_names_the_nearest(saved):
    def change(tensors):
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            tensors.pop(f"{MLP}.{kind}")

    edit(saved / "optimizer.safetensors", change)
    source = open_directory(saved)
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight\.exp_avg'.*layers\.0\.mlp\.up_proj"
    ):
        source.read(MLP, "exp_avg")


def test_a_moment_in_two_files_is_an_error(saved):
    shutil.copy(saved / "optimizer.safetensors", saved / "optimizer2.safetensors")
    with pytest.raises(CheckpointError, match="is also in"):
        open_directory(saved)


@pytest.mark.parametrize("value", [1.5, -1.0])
def test_a_step_that_is_no_count_is_an_error(saved, value):
    edit(
        saved / "optimizer.safetensors",
        lambda t: t.update({f"{MLP}.step": torch.tensor(value)}),
    )
    with pytest.raises(CheckpointError, match=f"is {value}, expected a whole number"):
        open_directory(saved).hyper(MLP)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_truncated_file_is_named_with_its_sizes(saved, file):
    path = saved / file
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(size - 10)
    with pytest.raises(CheckpointError, match=f"{file}: found {size - 10} bytes, expected {size}"):
        open_directory(saved)


@pytest.mark.parametrize("content", [b"", b"\x05\x00", b"\xff" * 40, b"\x04\0\0\0\0\0\0\0[12]"])
def test_a_file_that_is_no_safetensors_is_an_error(saved, content):
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        open_directory(saved)


def test_two_sets_of_weights_are_an_error(saved):
    shutil.copy(saved / "model.safetensors", saved / "kept")
    shard(saved, "model", 2)
    (saved / "kept").rename(saved / "model.safetensors")
    with pytest.raises(CheckpointError, match="two sets of weights"):
        open_directory(saved)


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_a_missing_shard_is_named(saved, name):
    shard(saved, name, 2)
    (saved / f"{name}-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"{name}-00002-of-00002.safetensors: missing"):
        open_directory(saved)


def test_a_shard_of_another_model_is_named(saved):
    shard(saved, "model", 2)
    save_file({"x": torch.zeros(1)}, saved / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"00001-of-00002.safetensors: key .* missing"):
        open_directory(saved)


def test_an_index_cannot_leave_the_directory(saved, tmp_path):
    shutil.copy(saved / "model.safetensors", tmp_path / "outside.safetensors")
    (saved / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected a file name in the same directory"):
        open_directory(saved)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"transformers_weights": "other.safetensors"}, "redirects the weights"),
        ({"model_type": "no-such-architecture"}, "cannot be loaded"),
        ({"hidden_size": "wide"}, "cannot be loaded"),
        ({"hidden_size": -3}, "cannot be loaded"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_an_error(saved, entry, message):
    config = json.loads((saved / "config.json").read_text()) | entry
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_config_is_required(saved):
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config.json; found .*model\.safetensors"):
        open_directory(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not readable as JSON"):
        open_directory(saved)


def test_no_tokenizer_says_what_to_do(saved):
    with pytest.raises(CheckpointError, match=r"Set model.tokenizer"):
        open_directory(saved).load_tokenizer(None)


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_a_tokenizer_of_ones_own_splits_as_its_file_says(tmp_path, model_type):
    """Beside the config of a Qwen2, AutoTokenizer would split as Qwen2's own does."""
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert load_tokenizer(str(tmp_path))("b a c").input_ids == [1, 0, 2]
