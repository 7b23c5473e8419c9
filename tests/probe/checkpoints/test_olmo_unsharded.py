"""Directories in the layout of OLMo's `unshard.py`; the truth is the model they were made from."""

import base64
import collections
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch.nn import functional
from transformers import OlmoConfig, OlmoForCausalLM

from probe.checkpoints import open_checkpoint
from probe.checkpoints.expected import ExpectedWeights
from probe.checkpoints.olmo_files import plain_value
from probe.checkpoints.olmo_unsharded import open_moments
from probe.errors import CheckpointError
from probe.result import CheckpointRef
from probe.series import list_checkpoints
from probe.spec import LocalCheckpoints

KINDS = ("exp_avg", "exp_avg_sq")
GATE = "model.layers.1.mlp.gate_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
STYLES = ["safetensors-numbers", "safetensors-names", "pt-numbers", "pt-names", "pt-default"]
PLAIN = {  # within a block: Hugging Face -> OLMo
    "self_attn.o_proj": "attn_out",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "mlp.down_proj": "ff_out",
    "post_attention_layernorm": "attn_norm",
    "post_feedforward_layernorm": "ff_norm",
}


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by Hugging Face names, as OLMo has them."""
    outer = {
        "transformer.wte.weight": "model.embed_tokens.weight",
        "transformer.ln_f.weight": "model.norm.weight",
        "transformer.ff_out.weight": "lm_head.weight",
    }
    found = {theirs: tensors[ours] for theirs, ours in outer.items() if ours in tensors}
    for layer in range(2):
        ours, theirs = f"model.layers.{layer}.", f"transformer.blocks.{layer}."
        found[f"{theirs}att_proj.weight"] = torch.cat(
            [tensors[f"{ours}self_attn.{part}_proj.weight"] for part in "qkv"]
        )
        found[f"{theirs}ff_proj.weight"] = torch.cat(
            [tensors[f"{ours}mlp.up_proj.weight"], tensors[f"{ours}mlp.gate_proj.weight"]]
        )
        for inner, name in PLAIN.items():
            if f"{ours}{inner}.weight" in tensors:
                found[f"{theirs}{name}.weight"] = tensors[f"{ours}{inner}.weight"]
    return found


def olmo_states(trained) -> dict[str, dict[str, torch.Tensor]]:
    parts: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in KINDS}
    for name, parameter in trained.model.named_parameters():
        for kind in KINDS:
            parts[kind][name] = trained.optimizer.state[parameter][kind]
    whole = {kind: fused(parts[kind]) for kind in KINDS}
    return {
        name: {kind: whole[kind][name] for kind in KINDS}
        | {"step": torch.tensor(2.0), "grad_norm_exp_avg": torch.tensor(0.5)}
        for name in whole["exp_avg"]
    }


def optimizer_content(states: dict, style: str) -> dict:
    """Two groups, sorted within each, as OLMo's get_param_groups makes them."""
    decayed = sorted(name for name in states if "wte" not in name)
    groups = [decayed, sorted(states.keys() - set(decayed))]
    numbers = {name: index for index, name in enumerate(groups[0] + groups[1])}
    wrapped = "_fsdp_wrapped_module." if "numbers" in style else ""
    named = {name: f"{wrapped}{name}" for name in numbers}
    keys = numbers if "numbers" in style else named
    kept: dict = collections.defaultdict(dict) if "default" in style else {}
    kept.update({keys[name]: state for name, state in states.items()})
    return {
        "state": kept,
        "param_groups": [
            {
                "params": [keys[name] for name in group],
                "param_names": [named[name] for name in group],
                "weight_decay": decay,
                "betas": (0.9, 0.95),
                "sharded": True,
            }
            for group, decay in zip(groups, (0.1, 0.0), strict=True)
        ],
    }


def encoded(content: dict, keys: tuple = ()) -> dict[str, torch.Tensor]:
    found = {}
    for key, value in content.items():
        path = (*keys, key)
        if isinstance(value, dict):
            found |= encoded(value, path)
            continue
        is_pickled = not isinstance(value, torch.Tensor)
        if is_pickled:
            value = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        found[encoded_key(path, is_pickled)] = value.contiguous().clone()
    return found


def encoded_key(path: tuple, is_pickled: bool = False) -> str:
    return base64.urlsafe_b64encode(pickle.dumps((path, is_pickled))).decode()


def run_config(config, **changes) -> dict:
    model = {
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "clip_qkv": None,
        "n_layers": config.num_hidden_layers,
        "mlp_ratio": 4,
        "mlp_hidden_size": 2 * config.intermediate_size,
        "activation_type": "swiglu",
        "block_type": "sequential",
        "block_group_size": 1,
        "alibi": False,
        "alibi_bias_max": 8.0,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000,
        "flash_attention": True,
        "attention_dropout": 0.0,
        "multi_query_attention": None,
        "attention_layer_norm": True,
        "embedding_layer_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "layer_norm_eps": 1e-6,
        "attention_layer_norm_with_affine": True,
        "max_sequence_length": 32,
        "include_bias": False,
        "bias_for_layer_norm": False,
        "scale_logits": False,
        "vocab_size": config.vocab_size - 3,
        "embedding_size": config.vocab_size,
        "weight_tying": config.tie_word_embeddings,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "init_fn": "normal",
        "norm_after": True,
    }
    tokenizer = {"identifier": "tokenizers/allenai_dolma2.json"}
    return {"run_name": "small", "model": model | changes, "tokenizer": tokenizer}


def write_optimizer(directory: Path, content: dict, style: str) -> None:
    if style.startswith("safetensors"):
        save_file(encoded(content), directory / "optim.safetensors")
    else:
        torch.save(content, directory / "optim.pt")


def write_run(directory: Path, trained, style: str = STYLES[0], **changes) -> Path:
    directory.mkdir(parents=True)
    weights = fused({name: p.detach() for name, p in trained.model.named_parameters()})
    if style.startswith("safetensors"):
        save_file(encoded(weights), directory / "model.safetensors")
    else:
        torch.save(weights, directory / "model.pt")
    write_optimizer(directory, optimizer_content(olmo_states(trained), style), style)
    config = run_config(trained.model.config, **changes)
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    (directory / "train.pt").write_bytes(b"never opened")
    return directory


class Trained(NamedTuple):
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer


def train(model: torch.nn.Module, num_steps: int = 2) -> Trained:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        ids = torch.randint(0, 45, (2, 8), generator=generator)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return Trained(model, optimizer)


@pytest.fixture
def grouped(make_model) -> Trained:
    """An OLMo-2 whose four heads share two keys and values."""
    return train(make_model(num_attention_heads=4, num_key_value_heads=2, intermediate_size=20))


@pytest.fixture
def first_generation() -> Trained:
    torch.manual_seed(0)
    return train(
        OlmoForCausalLM(
            OlmoConfig(
                vocab_size=48,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=32,
                tie_word_embeddings=True,
                clip_qkv=0.02,
                initializer_range=0.1,
                pad_token_id=None,
                eos_token_id=None,
            )
        )
    )


FIRST_GENERATION = {
    "norm_after": False,
    "attention_layer_norm": False,
    "layer_norm_type": "default",
    "layer_norm_with_affine": False,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000,
    "clip_qkv": 0.02,
}


def open_run(directory: Path, **fields):
    return open_checkpoint(CheckpointRef(source="local", location=str(directory), **fields))


def listed(directory: Path) -> CheckpointRef:
    (ref,) = list_checkpoints(LocalCheckpoints(path=str(directory)))
    return ref


def check_everything(source, trained) -> None:
    loaded = dict(source.load_model(torch.float32, "sdpa").named_parameters())
    names = [name for name, _ in trained.model.named_parameters()]
    assert list(loaded) == names
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(loaded[name], parameter)
        for kind in ("weight", *KINDS):
            whole = parameter if kind == "weight" else trained.optimizer.state[parameter][kind]
            flat = whole.detach().flatten()
            assert torch.equal(source.read(name, kind), flat)
            for lo, hi in ((0, 3), (5, 8), (len(flat) - 3, len(flat)), (4, 4)):
                assert torch.equal(source.read(name, kind, lo, hi), flat[lo:hi])
        assert source.hyper(name) == {"step": 2}
        with pytest.raises(CheckpointError, match=f"has {len(flat)} elements, asked for 0"):
            source.read(name, "exp_avg", 0, len(flat) + 1)
    expected = ExpectedWeights(source.skeleton("sdpa")).find_in(source)
    assert expected == {name: (name,) for name in names}


@pytest.mark.parametrize("style", STYLES)
def test_weights_and_moments_bit_for_bit(grouped, tmp_path, style):
    run = write_run(tmp_path / "step2-unsharded", grouped, style)
    ref = listed(run)
    assert (ref.step, ref.format, ref.has_moments) == (2, "olmo-unsharded", True)
    suffix = style.partition("-")[0]
    files = [run / f"model.{suffix}", run / f"optim.{suffix}"]
    assert ref.size_bytes == sum(path.stat().st_size for path in files)
    source = open_checkpoint(ref)
    assert (source.ref, source.has_moments) == (ref, True)
    check_everything(source, grouped)


def test_the_first_generation_too(first_generation, tmp_path):
    run = write_run(tmp_path / "step2-unsharded", first_generation, **FIRST_GENERATION)
    source = open_checkpoint(listed(run))
    check_everything(source, first_generation)
    config = source.load_model(torch.float32, "sdpa").config
    assert (config.model_type, config.clip_qkv) == ("olmo", 0.02)


def reference_logits(weights: dict, model: dict, ids: torch.Tensor) -> torch.Tensor:
    """OLMo's forward pass, from its definition, on its own fused tensors. ids (tokens,)."""
    after, heads, width = model["norm_after"], model["n_heads"], model["d_model"]
    size = width // heads

    def normed(x, name):
        if not after:
            return functional.layer_norm(x, x.shape[-1:], eps=1e-5)
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + model["layer_norm_eps"])
        return x * scale * weights[f"transformer.{name}.weight"]

    def turned(x):  # (tokens, heads, size)
        half = torch.arange(0, size, 2) / size
        angle = torch.arange(len(ids))[:, None] / model["rope_theta"] ** half
        angle = torch.cat([angle, angle], -1)[:, None]
        left, right = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-right, left], -1) * angle.sin()

    x = weights["transformer.wte.weight"][ids]
    future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    for layer in range(model["n_layers"]):
        block = f"blocks.{layer}"
        own = {n: weights[f"transformer.{block}.{n}.weight"] for n in ("att_proj", "attn_out")}
        own |= {n: weights[f"transformer.{block}.{n}.weight"] for n in ("ff_proj", "ff_out")}
        h = x if after else normed(x, "attn_norm")
        joint = h @ own["att_proj"].T
        if model["clip_qkv"] is not None:
            joint = joint.clamp(-model["clip_qkv"], model["clip_qkv"])
        others = (joint.shape[1] - width) // 2
        q, k, v = joint.split([width, others, others], -1)
        if after:
            q, k = normed(q, f"{block}.q_norm"), normed(k, f"{block}.k_norm")
        q, k, v = (part.view(len(ids), -1, size) for part in (q, k, v))
        k, v = (part.repeat_interleave(heads // part.shape[1], 1) for part in (turned(k), v))
        scores = torch.einsum("ihd,jhd->hij", turned(q), k) / size**0.5
        shares = scores.masked_fill(future, -torch.inf).softmax(-1)
        h = torch.einsum("hij,jhd->ihd", shares, v).reshape(len(ids), width) @ own["attn_out"].T
        x = x + (normed(h, f"{block}.attn_norm") if after else h)
        h = x if after else normed(x, "ff_norm")
        up, gate = (h @ own["ff_proj"].T).chunk(2, -1)
        h = (functional.silu(gate) * up) @ own["ff_out"].T
        x = x + (normed(h, f"{block}.ff_norm") if after else h)
    head = "wte" if model["weight_tying"] else "ff_out"
    return normed(x, "ln_f") @ weights[f"transformer.{head}.weight"].T


@pytest.mark.parametrize("generation", [1, 2])
def test_the_model_computes_what_olmo_s_definition_does(request, tmp_path, generation):
    trained = request.getfixturevalue("grouped" if generation == 2 else "first_generation")
    changes = FIRST_GENERATION if generation == 1 else {}
    run = write_run(tmp_path / "step2-unsharded", trained, **changes)
    weights = fused({name: p.detach() for name, p in trained.model.named_parameters()})
    model = run_config(trained.model.config, **changes)["model"]
    ids = torch.arange(12) * 7 % 45
    truth = reference_logits(weights, model, ids)
    loaded = open_run(run).load_model(torch.float32, "eager")
    found = loaded(ids[None], use_cache=False).logits[0].detach()
    # fp32 sums of 16 to 32 terms in another order
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=2e-6)
    for layer in range(2):  # the tolerance tells gate from up, and query from key
        ff = f"transformer.blocks.{layer}.ff_proj.weight"
        other = weights | {ff: torch.cat(weights[ff].chunk(2)[::-1])}
        assert not torch.allclose(reference_logits(other, model, ids), truth, 1e-3, 2e-5)
    assert loaded.model.embed_tokens.padding_idx is None


def test_numbers_as_yaml_reads_and_defaults_of_the_run(grouped, tmp_path):
    changes = {"layer_norm_eps": "1e-6", "embedding_size": None, "vocab_size": 48, "n_kv_heads": 2}
    run = write_run(tmp_path / "step2-unsharded", grouped, **changes)
    config = open_run(run).load_model(torch.float32, "sdpa").config
    assert (config.rms_norm_eps, config.vocab_size) == (1e-6, 48)
    assert (config.intermediate_size, config.rope_parameters["rope_theta"]) == (20, 500000.0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layer_norm_eps", None, "layer_norm_eps is None, expected a number above 0"),
        ("layer_norm_eps", "small", "layer_norm_eps is 'small', expected a number"),
        ("layer_norm_type", "default", "layer_norm_type is 'default', expected 'rms' of OLMo-2"),
        ("norm_after", False, "layer_norm_type is 'rms', expected 'default' or .* of OLMo-1"),
        ("block_type", "llama", "block_type is 'llama', expected 'sequential'"),
        ("activation_type", "gelu", "activation_type is 'gelu', expected 'swiglu'"),
        ("include_bias", True, "include_bias is True, expected False"),
        ("alibi", True, "alibi is True"),
        ("clip_qkv", 8.0, "clip_qkv is 8.0, expected None of OLMo-2"),
        ("scale_logits", True, "scale_logits is True"),
        ("block_group_size", 2, "block_group_size is 2, expected 1"),
        ("weight_tying", None, "weight_tying is None, expected true or false"),
        ("rope_theta", None, "rope_theta is None, expected a number"),
        ("n_heads", 3, "n_heads is 3, expected a divisor of d_model, 16"),
        ("n_kv_heads", 0, "n_kv_heads is 0, expected a number above 0"),
        ("n_kv_heads", 1.5, "n_kv_heads is 1.5, expected a whole number"),
        ("multi_query_attention", "yes", "multi_query_attention is 'yes', expected true or"),
        ("rope_scaling", 8, "rope_scaling is 8, expected nothing there"),
    ],
)
def test_what_transformers_does_not_compute_is_refused_by_name(
    trained, tmp_path, key, value, message
):
    run = write_run(tmp_path / "step2-unsharded", trained, **{key: value})
    assert open_run(run).read(GATE, "exp_avg").any()  # moments need no config
    with pytest.raises(CheckpointError, match=f"config.yaml: model.{message}"):
        open_run(run).load_model(torch.float32, "sdpa")


def test_hugging_face_weights_beside_the_optimizer_s_state(trained, tmp_path):
    run = tmp_path / "step2"
    trained.model.save_pretrained(run)
    write_optimizer(run, optimizer_content(olmo_states(trained), STYLES[0]), STYLES[0])
    ref = listed(run)
    assert (ref.step, ref.format, ref.has_moments) == (2, "olmo-unsharded", True)
    source = open_checkpoint(ref)
    assert source.ref == ref
    check_everything(source, trained)
    moments = open_moments(run)
    truth = trained.optimizer.state[dict(trained.model.named_parameters())[GATE]]
    assert torch.equal(moments.read(GATE, "exp_avg_sq"), truth["exp_avg_sq"].flatten())
    assert (moments.has_moments, moments.moment_shape(GATE)) == (True, (24, 16))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.7\.mlp\..*, stored as"):
        moments.read(GATE.replace("1", "7"), "exp_avg")
    with pytest.raises(CheckpointError, match="no parameter of an OLMo model"):
        moments.hyper("bias")


def test_the_state_of_another_model_is_found_out(trained, grouped, tmp_path):
    run = write_run(tmp_path / "step2-unsharded", trained)
    write_optimizer(run, optimizer_content(olmo_states(grouped), STYLES[0]), STYLES[0])
    source = open_run(run)
    with pytest.raises(CheckpointError, match=r"moments of .* shape \[20, 16\].*has \[24, 16\]"):
        source.read(GATE, "exp_avg")
    assert source.read(QUERY, "exp_avg").any()


def without(key: str):
    return lambda states, content: [state.pop(key) for state in list(states.values())[:1]]


def unnamed(states, content) -> None:
    content["param_groups"][0].pop("param_names")


def shortened(states, content) -> None:
    state = next(iter(states.values()))
    state["exp_avg"] = state["exp_avg"][:1].clone()


def fused_oddly(states, content) -> None:
    for kind in KINDS:
        whole = states["transformer.blocks.1.ff_proj.weight"][kind]
        states["transformer.blocks.1.ff_proj.weight"][kind] = whole[:-1].clone()


def counted_in_halves(states, content) -> None:
    states["transformer.blocks.1.ff_proj.weight"]["step"] = torch.tensor(1.5)


@pytest.mark.parametrize("style", [STYLES[0], STYLES[2]])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("exp_avg"), "the optimizer state is incomplete"),
        (shortened, "the optimizer state is incomplete"),
        (without("step"), "step of 'model.embed_tokens.weight' is None, expected a whole"),
        (counted_in_halves, "step of .* is 1.5, expected a whole number"),
        (unnamed, "param_groups has no param_names"),
        (lambda states, content: content.pop("param_groups"), "param_groups is missing"),
        (lambda states, content: content["param_groups"].pop(), "does not name state"),
        (fused_oddly, r"shape \[47, 16\], expected the rows of mlp.up_proj, mlp.gate_proj"),
    ],
)
def test_broken_states_are_named(trained, tmp_path, change, message, style):
    run = write_run(tmp_path / "step2-unsharded", trained, style)
    states = olmo_states(trained)
    content = optimizer_content(states, style)
    change(states, content)
    write_optimizer(run, content, style)
    with pytest.raises(CheckpointError, match=rf"optim\.{style.partition('-')[0]}: .*{message}"):
        read_all(run, [name for name, _ in trained.model.named_parameters()])


def read_all(run: Path, names: list[str]) -> None:
    source = open_run(run)
    for name in names:
        source.read(name, "exp_avg")
        source.hyper(name)


def test_a_lion_s_state_is_no_adam_s(trained, tmp_path):
    run = write_run(tmp_path / "step2-unsharded", trained)
    states = {name: {"exp_avg": state["exp_avg"]} for name, state in olmo_states(trained).items()}
    write_optimizer(run, optimizer_content(states, STYLES[0]), STYLES[0])
    assert listed(run).has_moments is False
    assert open_run(run).has_moments is False
    (run / "optim.safetensors").unlink()
    source = open_run(run)
    assert (source.has_moments, source.ref.has_moments) == (False, False)
    with pytest.raises(CheckpointError, match=r"no .*gate_proj.*expected optim\.safetensors"):
        source.read(GATE, "exp_avg")


def test_stored_biases_are_found_out(trained, tmp_path):
    run = write_run(tmp_path / "step2-unsharded", trained, STYLES[2])
    weights = torch.load(run / "model.pt", weights_only=True)
    weights["transformer.blocks.0.attn_norm.bias"] = torch.zeros(16)
    torch.save(weights, run / "model.pt")
    with pytest.raises(CheckpointError, match=r"no place in the model.*blocks\.0\.attn_norm\.bias"):
        open_run(run).load_model(torch.float32, "sdpa")


def test_the_config_may_be_another_directory_s(trained, tmp_path):
    run = write_run(tmp_path / "step2-unsharded", trained)
    with pytest.raises(CheckpointError, match=r"model\.tokenizer.*tokenizers/allenai_dolma2\.json"):
        open_run(run).load_tokenizer()
    (run / "config.yaml").rename(tmp_path / "config.yaml")
    assert listed(run).format == "olmo-unsharded"
    with pytest.raises(CheckpointError, match=r"no config\.yaml.*set checkpoints\.config"):
        open_run(run).load_model(torch.float32, "sdpa")
    for named in (tmp_path, tmp_path / "config.yaml"):
        assert open_run(run, config=str(named)).load_model(torch.float32, "sdpa")
    trained.model.config.save_pretrained(run)
    assert open_run(run).load_model(torch.float32, "sdpa")


@pytest.mark.parametrize(
    ("file", "style"),
    [(f"{stem}.{s.partition('-')[0]}", s) for stem in ("model", "optim") for s in STYLES[::2][:2]],
)
@pytest.mark.parametrize("length", [0, 100, -200])
def test_a_truncated_file_is_named_when_listed(trained, tmp_path, file, style, length):
    run = write_run(tmp_path / "step2-unsharded", trained, style)
    (run / file).write_bytes((run / file).read_bytes()[:length])
    with pytest.raises(CheckpointError, match=f"{file}: .*found .*truncated"):
        listed(run)


def test_the_optimizer_s_state_alone_is_no_checkpoint(trained, tmp_path):
    run = write_run(tmp_path / "step2-unsharded", trained)
    (run / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        listed(run)
    with pytest.raises(CheckpointError, match="no weights; expected"):
        open_run(run)
    (run / "config.yaml").unlink()
    assert open_moments(run).has_moments
    optimizer = run / "optim.safetensors"
    optimizer.write_bytes(optimizer.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"optim\.safetensors: found .*truncated"):
        open_moments(run)
    with pytest.raises(CheckpointError, match=r"no optim\.safetensors or optim\.pt"):
        open_moments(tmp_path)


def test_an_optim_pt_of_anybody_s_is_not_taken_for_olmo_s(trained, tmp_path):
    trained.model.save_pretrained(tmp_path / "step2")
    torch.save({"state": {}}, tmp_path / "step2" / "optim.pt")
    assert listed(tmp_path / "step2").format == "safetensors"


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_hostile_pickles_execute_nothing(trained, tmp_path):
    sprung = tmp_path / "sprung"
    content = optimizer_content(olmo_states(trained), STYLES[0])
    run = write_run(tmp_path / "step2-unsharded", trained)
    (run / "train.pt").write_bytes(pickle.dumps(Trap(sprung)))
    write_optimizer(run, content | {"param_groups": [Trap(sprung)]}, "safetensors")
    with pytest.raises(CheckpointError, match=r"param_groups.*it names .*nothing in it was run"):
        open_run(run)
    key = base64.urlsafe_b64encode(pickle.dumps(Trap(sprung))).decode()
    for file in ("optim.safetensors", "model.safetensors"):
        bad = write_run(tmp_path / file / "step2-unsharded", trained)
        save_file({encoded_key(("a",)): torch.zeros(1), key: torch.zeros(1)}, bad / file)
        with pytest.raises(CheckpointError, match=f"{file}: key .*it names .*nothing in it was"):
            listed(bad)
        with pytest.raises(CheckpointError, match=f"{file}: key .*it names"):
            open_run(bad)
    for file in ("optim.pt", "model.pt"):
        bad = write_run(tmp_path / file / "step2-unsharded", trained, "pt-names")
        torch.save({"state": {"a": Trap(sprung)}}, bad / file)
        with pytest.raises(CheckpointError, match=f"{file}: cannot be read"):
            open_run(bad)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap works where it is sprung


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("transformer.wte.weight", "is not one of OLMo's, expected base64"),
        (base64.urlsafe_b64encode(b"no pickle").decode(), "not usable"),
        (encoded_key("wte"), "means .*expected \\(names, whether pickled\\)"),
        (encoded_key(("wte", 1.5)), "means .*expected"),
    ],
)
def test_a_key_that_is_not_olmo_s_is_named(trained, tmp_path, key, message):
    run = write_run(tmp_path / "step2-unsharded", trained)
    content = {encoded_key(("a",)): torch.zeros(1), key: torch.zeros(1)}
    save_file(content, run / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"model.safetensors: key '{key[:20]}.*{message}"):
        open_run(run)


def test_a_series_is_listed_without_torch(trained, tmp_path):
    for step in (1000, 2):
        write_run(tmp_path / f"step{step}-unsharded", trained)
    script = (
        "import json, sys; from probe.series import list_checkpoints as l; "
        "from probe.spec import LocalCheckpoints as S; "
        f"refs = l(S(path={str(tmp_path / 'step*')!r})); "
        "print(json.dumps([[r.step, r.format, r.has_moments] for r in refs])); "
        "print('torch' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    series, torch_seen = found.stdout.splitlines()
    assert json.loads(series) == [[2, "olmo-unsharded", True], [1000, "olmo-unsharded", True]]
    assert torch_seen == "False"


def test_a_pickled_key_that_announces_an_absurd_size_is_corrupt():
    data = b"\x80\x05\x96" + (2**50).to_bytes(8, "little")
    with pytest.raises(CheckpointError, match="a key: not usable: MemoryError"):
        plain_value(data, "a key")
