"""A run directory in OLMo-core's layout and names; the truth is the model it was written from."""

import json
import pickle
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from probe.checkpoints import open_checkpoint
from probe.errors import CheckpointError
from probe.moments import CheckpointMoments
from probe.result import CheckpointRef
from probe.series import list_checkpoints
from probe.spec import LocalCheckpoints

BLOCK = {  # written out a second time on purpose: one block, Hugging Face -> OLMo-core
    "self_attn.q_proj.weight": "attention.w_q.weight",
    "self_attn.k_proj.weight": "attention.w_k.weight",
    "self_attn.v_proj.weight": "attention.w_v.weight",
    "self_attn.o_proj.weight": "attention.w_out.weight",
    "self_attn.q_norm.weight": "attention.q_norm.weight",
    "self_attn.k_norm.weight": "attention.k_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "post_attention_layernorm.weight": "attention_norm.weight",
    "post_feedforward_layernorm.weight": "feed_forward_norm.weight",
}
NAMES = {
    "model.embed_tokens.weight": "embeddings.weight",
    "model.norm.weight": "lm_head.norm.weight",
    "lm_head.weight": "lm_head.w_out.weight",
} | {
    f"model.layers.{layer}.{ours}": f"blocks.{layer}.{theirs}"
    for layer in range(2)
    for ours, theirs in BLOCK.items()
}


def run_config(config, *, eps: float = 1e-6, mixer: str = "sequence_mixer") -> dict:
    norm = {
        "name": "rms",
        "eps": eps,
        "bias": False,
        "dtype": "float32",
        "_CLASS_": "olmo_core.nn.layer_norm.LayerNormConfig",
    }
    attention = {
        "name": "default",
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "bias": False,
        "rope": {"name": "default", "theta": 500000, "full_precision": True},
        "qk_norm": norm,
        "dtype": "float32",
    }
    block = {
        mixer: attention,
        "layer_norm": norm,
        "feed_forward": {"hidden_size": config.intermediate_size, "bias": False, "name": "default"},
        "name": "reordered_norm",
    }
    model = {
        "d_model": config.hidden_size,
        "vocab_size": config.vocab_size,
        "n_layers": config.num_hidden_layers,
        "block": block,
        "lm_head": {"layer_norm": norm, "bias": False, "name": "default"},
        "name": "default",
        "dtype": "float32",
        "init_method": "normal",
    }
    tokenizer = {"identifier": "allenai/dolma2-tokenizer", "vocab_size": 100278}
    dataset = {"sequence_length": 32, "tokenizer": tokenizer}
    return {"run_name": "small", "model": model, "dataset": dataset, "optim": {"lr": 1e-2}}


def write_run(
    directory: Path, weights: dict, state: dict, config: dict, *, names=NAMES, storage=True
) -> Path:
    """As OLMo-core lays it out; `storage`: with its own class in the pickled metadata."""
    tensors = {f"model.{names[name]}": value for name, value in weights.items()}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        tensors[f"optim.state.{names[name]}.{kind}"] = value
    part = directory / "model_and_optim"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process, on purpose
        groups = {f"optim.param_groups.{n}.weight_decay": 0.1 for n in names.values()}
        dcp.save(tensors | groups, checkpoint_id=part, no_dist=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / ".metadata.json").write_text('{"version": "2.0.0"}')
    (directory / "train").mkdir()
    (directory / "train" / "rank0.pt").write_bytes(b"never opened")
    if storage:
        as_olmo_core_pickles(part / ".metadata")
    return directory


def as_olmo_core_pickles(path: Path) -> None:
    name = "olmo_core.distributed.checkpoint.filesystem"
    parents = [".".join(name.split(".")[:n]) for n in range(1, 5)]
    metadata = pickle.loads(path.read_bytes())
    place = type("_StorageInfo", (), {"__module__": name})
    for parent in parents:
        assert parent not in sys.modules
        sys.modules[parent] = types.ModuleType(parent)
    sys.modules[name]._StorageInfo = place
    try:
        for index, stored in metadata.storage_data.items():
            metadata.storage_data[index] = place()
            vars(metadata.storage_data[index]).update(vars(stored))
        path.write_bytes(pickle.dumps(metadata))
    finally:
        for parent in parents:
            del sys.modules[parent]


def state_of(trained) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{kind}": trained.optimizer.state[parameter][kind]
        for name, parameter in trained.model.named_parameters()
        for kind in ("exp_avg", "exp_avg_sq", "step")
    }


def weights_of(trained) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in trained.model.named_parameters()}


@pytest.fixture
def run(trained, tmp_path) -> Path:
    config = run_config(trained.model.config)
    return write_run(tmp_path / "step2", weights_of(trained), state_of(trained), config)


def open_run(directory: Path, **fields):
    return open_checkpoint(CheckpointRef(source="local", location=str(directory), **fields))


def test_weights_and_moments_bit_for_bit_without_olmo_core(trained, run):
    reader = dcp.FileSystemReader(run / "model_and_optim")
    with pytest.raises(ModuleNotFoundError, match="olmo_core"):
        reader.read_metadata()  # torch's own reader cannot
    (ref,) = list_checkpoints(LocalCheckpoints(path=str(run.parent / "step*")))
    assert (ref.step, ref.format, ref.has_moments) == (2, "olmo-core", True)
    source = open_checkpoint(ref)
    loaded = dict(source.load_model(torch.float32, "sdpa").named_parameters())
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(loaded[name], parameter)
        assert torch.equal(source.read(name, "weight"), parameter.detach().flatten())
        for kind in ("exp_avg", "exp_avg_sq"):
            truth = trained.optimizer.state[parameter][kind].flatten()
            assert torch.equal(source.read(name, kind, 1, 9), truth[1:9])
        assert source.hyper(name) == {"step": 2}


@pytest.mark.parametrize("mixer", ["sequence_mixer", "attention"])
def test_the_epsilon_is_the_run_s_and_logits_agree(trained, run, make_model, mixer):
    config = run_config(trained.model.config, mixer=mixer)
    (run / "config.json").write_text(json.dumps(config))
    loaded = open_run(run).load_model(torch.float32, "sdpa")
    assert loaded.config.rms_norm_eps == 1e-6 != trained.model.config.rms_norm_eps
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    ids = torch.arange(16)[None]
    found = loaded(ids, use_cache=False).logits
    for eps in (1e-6, 1e-5):
        model = make_model(rms_norm_eps=eps, rope_parameters=rope).eval()
        model.load_state_dict(trained.model.state_dict())
        same = torch.equal(found, model(ids, use_cache=False).logits)
        assert same is (eps == 1e-6)
    assert loaded.model.embed_tokens.padding_idx is None


def test_a_step_that_was_never_counted_is_exponent_one(trained, tmp_path):
    state = state_of(trained)
    state |= {key: torch.zeros(()) for key in state if key.endswith(".step")}
    config = run_config(trained.model.config)
    run = write_run(tmp_path / "step900", weights_of(trained), state, config)
    source = open_run(run)
    name = "model.layers.0.mlp.up_proj.weight"
    shard = types.SimpleNamespace(name=name, lo=0, hi=384, base=weights_of(trained)[name].flatten())
    moments = CheckpointMoments(source, [shard], label="step 900")
    assert source.hyper(name) == {"step": 0}
    assert moments.step_after(0) == 1  # 1 - beta ** 0 would be 0 / 0


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.block.name", "default", "block.name is 'default', expected reordered_norm"),
        ("model.block.layer_norm.eps", 1e-5, "norms of different eps"),
        ("model.block.layer_norm.eps", None, "layer_norm.eps is None"),
        ("model.block.layer_norm.name", "default", "expected rms"),
        ("model.block.sequence_mixer.name", "fused", "expected default"),
        ("model.block.sequence_mixer.clip_qkv", 8.0, "clip_qkv is 8.0, expected nothing"),
        ("model.block.sequence_mixer.sliding_window", {"pattern": [4096]}, "sliding_window"),
        ("model.block.sequence_mixer.rope.scaling", {"factor": 8}, "rope.scaling"),
        ("model.block.sequence_mixer.head_dim", 4, "head_dim is 4"),
        ("model.block.feed_forward.activation", "relu2", "activation is 'relu2'"),
        ("model.block.attention_residual_alpha", 0.5, "attention_residual_alpha"),
        ("model.embed_scale", 2.0, "embed_scale is 2.0"),
        ("model.block_overrides", {"1": {}}, "block_overrides"),
        ("model.d_model", None, "d_model is None, expected a number"),
        ("model.lm_head", None, "lm_head is None, expected an object"),
        ("dataset.sequence_length", None, "sequence length"),
    ],
)
def test_what_is_no_olmo2_is_refused_by_name(run, path, value, message):
    config = json.loads((run / "config.json").read_text())
    *owners, key = path.split(".")
    section = config
    for owner in owners:
        section = section[owner]
    section[key] = value
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_run(run).load_model(torch.float32, "sdpa")


def test_stored_biases_are_found_out(trained, tmp_path):
    weights = weights_of(trained) | {"bias": torch.zeros(16)}
    names = NAMES | {"bias": "blocks.0.attention.w_q.bias"}
    config = run_config(trained.model.config)
    run = write_run(tmp_path / "step2", weights, state_of(trained), config, names=names)
    with pytest.raises(CheckpointError, match=r"no place in the model.*w_q\.bias"):
        open_run(run).load_model(torch.float32, "sdpa")


def test_what_is_missing_is_said(trained, run, tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.tokenizer.*allenai/dolma2-tokenizer"):
        open_run(run).load_tokenizer()
    (run / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"no config\.json.*checkpoints\.config"):
        open_run(run).load_model(torch.float32, "sdpa")
    source = open_run(run, config=str(tmp_path / "config.json"))
    assert source.load_model(torch.float32, "sdpa").config.rms_norm_eps == 1e-6
    trained.model.config.save_pretrained(tmp_path / "hf")
    assert open_run(run, config=str(tmp_path / "hf")).load_model(torch.float32, "sdpa")
    (run / "model_and_optim" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"no \.metadata"):
        list_checkpoints(LocalCheckpoints(path=str(run)))
