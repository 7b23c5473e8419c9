"""Directories a real DeepSpeed run wrote; the truth is what DeepSpeed itself said while it ran."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from probe.checkpoints import open_checkpoint
from probe.checkpoints.deepspeed_state import load_states
from probe.checkpoints.expected import ExpectedWeights
from probe.errors import CheckpointError
from probe.result import CheckpointRef
from probe.series import list_checkpoints
from probe.spec import LocalCheckpoints

pytestmark = pytest.mark.distributed

RANKS = Path(__file__).with_name("deepspeed_ranks.py")
TRAINER = Path(__file__).with_name("deepspeed_trainer.py")
ON_TWO = {  # case -> the optimizer DeepSpeed makes of it
    "z1-fp32": "DeepSpeedZeroOptimizer",
    "z2-bf16": "DeepSpeedZeroOptimizer",
    "z2-fp32-tied": "DeepSpeedZeroOptimizer",
    "z1-bf16-accum32": "BF16_Optimizer",
    "z3-bf16": "DeepSpeedZeroOptimizer_Stage3",
}
ON_THREE = {
    "z3-fp32": "DeepSpeedZeroOptimizer_Stage3",
    "z3-bf16-tied": "DeepSpeedZeroOptimizer_Stage3",
    "z2-fp32": "DeepSpeedZeroOptimizer",
}
AMSGRAD = ("z2-fp32-amsgrad", "z3-bf16-amsgrad")
KINDS = ("weight", "exp_avg", "exp_avg_sq")
EXPERTS = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
UP = "model.layers.1.mlp.up_proj.weight"


def run_ranks(directory: Path, size: int, cases: list[str]) -> None:
    run([[str(RANKS), str(directory), str(rank), str(size), *cases] for rank in range(size)])


def run(scripts: list[list[str]]) -> None:
    """Scripts side by side, none of which may fail or outlive the others."""
    children = [
        subprocess.Popen(
            [sys.executable, *script],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for script in scripts
    ]
    try:
        errors = [child.communicate(timeout=140)[1] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    for child, error in zip(children, errors, strict=True):
        assert child.returncode == 0, error[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for size, cases in ((2, [*ON_TWO, *AMSGRAD]), (3, ON_THREE)):
        directory = tmp_path_factory.mktemp(f"on-{size}")
        run_ranks(directory, size, list(cases))
        found |= {f"{case}-on-{size}": directory / case for case in cases}
    return found


@pytest.fixture(autouse=True)
def without_deepspeed(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # importing it is an error


@pytest.fixture
def copy(runs, tmp_path):
    """A run's directory, to be broken."""

    def copied(case: str) -> Path:
        return Path(shutil.copytree(runs[case], tmp_path / case))

    return copied


def open_directory(directory: Path, **fields):
    return open_checkpoint(CheckpointRef(source="local", location=str(directory), **fields))


def truth_of(directory: Path) -> dict:
    return torch.load(f"{directory}.truth.pt", weights_only=True)["truth"]


def listed(path: Path) -> CheckpointRef:
    (ref,) = list_checkpoints(LocalCheckpoints(path=str(path)))
    return ref


@pytest.mark.parametrize("case", [*(f"{c}-on-2" for c in ON_TWO), *(f"{c}-on-3" for c in ON_THREE)])
def test_masters_and_moments_bit_for_bit(runs, case):
    directory = runs[case]
    saved = torch.load(f"{directory}.truth.pt", weights_only=True)
    assert saved["kind"] == (ON_TWO | ON_THREE)[case[:-5]]
    ref = listed(directory)
    assert (ref.step, ref.format, ref.has_moments) == (3, "deepspeed", True)
    states = directory.glob("global_step3/*_states.pt")
    assert ref.size_bytes == sum(path.stat().st_size for path in states)
    source = open_checkpoint(ref)
    assert (source.ref, source.has_moments) == (ref, True)
    assert source.stored_betas == (0.9, 0.999)  # torch's defaults
    loaded = source.load_model(torch.float32, "sdpa")
    names = [name for name, _ in loaded.named_parameters()]
    assert set(names) == saved["truth"].keys()
    for name, parameter in loaded.named_parameters():
        truth = saved["truth"][name]
        assert torch.equal(parameter, truth["weight"])
        assert source.hyper(name) == {"step": 3}
        for kind in KINDS:
            flat = truth[kind].flatten()
            assert flat.any()
            assert torch.equal(source.read(name, kind), flat)
            for lo, hi in ((0, 3), (5, 11), (len(flat) - 3, len(flat)), (4, 4)):
                assert torch.equal(source.read(name, kind, lo, hi), flat[lo:hi])
    expected = ExpectedWeights(source.skeleton("sdpa")).find_in(source)
    assert expected == {name: (name,) for name in names}


def test_what_the_cases_cover(runs):
    """Parameters that straddle two ranks, padded parts, several sub-groups, an unsaved name."""

    def states(case, pattern):
        return [load_states(p) for p in sorted(runs[case].glob(f"global_step3/{pattern}"))]

    shares = [
        state["optimizer_state_dict"]["param_slice_mappings"]
        for state in states("z2-fp32-on-3", "*optim_states.pt")
    ]
    held = [{name for group in share for name in group} for share in shares]
    assert held[0] & held[1]
    assert held[1] & held[2]
    optimizer = states("z3-bf16-tied-on-3", "*optim_states.pt")[0]["optimizer_state_dict"]
    assert len(optimizer["fp32_flat_groups"]) == 3
    assert any(t["weight"].numel() % 3 for t in truth_of(runs["z3-fp32-on-3"]).values())
    model = states("z2-fp32-tied-on-2", "*model_states.pt")[0]
    assert model["shared_params"] == {"lm_head.weight": "model.embed_tokens.weight"}


def test_one_step_of_several_is_named_or_the_latest(copy):
    directory = copy("z2-bf16-on-2")
    shutil.copytree(directory / "global_step3", directory / "global_step2")
    model = directory / "global_step2" / "mp_rank_00_model_states.pt"
    edit(model, lambda content: content.update(global_steps=2))
    for state in (directory / "global_step2").glob("*optim_states.pt"):
        edit(state, step_two)
    refs = list_checkpoints(LocalCheckpoints(path=str(directory / "global_step*")))
    assert [(ref.step, ref.format) for ref in refs] == [(2, "deepspeed"), (3, "deepspeed")]
    assert [open_checkpoint(ref).hyper(UP)["step"] for ref in refs] == [2, 3]
    assert open_checkpoint(refs[0]).load_model(torch.float32, "sdpa")  # config.json lies above
    assert listed(directory).step == 3
    (directory / "latest").write_text("global_step2")
    assert listed(directory).step == 2
    (directory / "latest").write_text("global_step9")
    with pytest.raises(CheckpointError, match=r"latest: names 'global_step9', but .*cut off"):
        listed(directory)
    (directory / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match=r"latest: holds '\.\./elsewhere', expected the name"):
        listed(directory)
    (directory / "latest").unlink()
    with pytest.raises(CheckpointError, match="no file `latest` says which of global_step2, glob"):
        listed(directory)


def test_beside_what_trainer_saves_the_masters_are_read(runs, copy, make_model):
    directory = copy("z2-bf16-on-2").rename(copy("z1-fp32-on-2").parent / "checkpoint-3")
    truth = truth_of(runs["z2-bf16-on-2"])
    model = make_model(vocab_size=49)
    model.load_state_dict({name: t["weight"] for name, t in truth.items()})
    model.to(torch.bfloat16).save_pretrained(directory)  # as Trainer does with bf16
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    ref = listed(directory)
    assert (ref.step, ref.format) == (3, "deepspeed")
    weight = open_checkpoint(ref).read(UP, "weight")
    assert torch.equal(weight, truth[UP]["weight"].flatten())
    assert not torch.equal(weight, weight.to(torch.bfloat16).float())  # the rounded copy differs
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": 4}))
    with pytest.raises(CheckpointError, match=r"trainer_state\.json: global_step is 4, expected 3"):
        open_directory(directory)


def test_persistent_buffers_are_read_with_the_weights(tmp_path):
    """The router's bias of a mixture of experts is trained, and no parameter."""
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**EXPERTS)).eval()
    model.get_buffer(bias).copy_(torch.tensor([0.5, -0.25, 0.0, 1.0]))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    flat = torch.cat([weight.flatten() for weight in weights.values()])
    optimizer = {  # of ZeRO-3 on one rank, where nothing is cut
        "partition_count": 1,
        "fp32_flat_groups": [flat],
        "optimizer_state_dict": {"state": {0: {"exp_avg": flat, "exp_avg_sq": flat, "step": 1}}},
    }
    content = {
        "param_shapes": [{name: weight.shape for name, weight in weights.items()}],
        "module": {bias: model.get_buffer(bias)},
        "buffer_names": [bias],
        "global_steps": 1,
    }
    directory = tmp_path / "global_step1"
    model.config.save_pretrained(directory)
    torch.save({"optimizer_state_dict": optimizer}, directory / SECOND[5:].replace("1", "0", 1))
    torch.save(content, directory / Z3_MODEL.replace("1", "0", 1))
    source = open_directory(directory)
    assert ExpectedWeights(source.skeleton("eager")).find_in(source)[bias] == (bias,)
    assert torch.equal(source.read(bias, "weight", 1, 3), torch.tensor([-0.25, 0.0]))
    with pytest.raises(
        CheckpointError, match=r"a buffer of 4 elements .* asked for exp_avg 0\.\.4"
    ):
        source.read(bias, "exp_avg")
    loaded = source.load_model(torch.float32, model.config._attn_implementation)
    ids = torch.arange(12)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    content["buffer_names"] = []
    torch.save(content, directory / Z3_MODEL.replace("1", "0", 1))
    with pytest.raises(CheckpointError, match=f"no buffer '{bias}' among those saved"):
        open_directory(directory).read(bias, "weight")


def test_what_trainer_writes_with_deepspeed_is_read(tmp_path):
    run([[str(TRAINER), str(tmp_path / "run")]])
    directory = tmp_path / "run" / "checkpoint-3"
    assert (directory / "trainer_state.json").is_file()
    assert not any(directory.glob("*.safetensors"))  # under ZeRO-3, where it is not asked for
    ref = listed(directory)
    assert (ref.step, ref.format, ref.has_moments) == (3, "deepspeed", True)
    source = open_checkpoint(ref)
    loaded = dict(source.load_model(torch.float32, "sdpa").named_parameters())
    truth = torch.load(tmp_path / "run" / "truth.pt", weights_only=True)
    assert truth.keys() == loaded.keys()
    for name, tensors in truth.items():
        assert torch.equal(loaded[name], tensors["weight"])
        assert source.hyper(name) == {"step": 3}
        for kind in KINDS:
            assert torch.equal(source.read(name, kind), tensors[kind].flatten())


def test_the_config_may_be_named_and_must_fit(runs, copy, tmp_path, make_model):
    directory = copy("z3-bf16-on-2")
    (directory / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"no config\.json .*set checkpoints\.config"):
        open_directory(directory).load_model(torch.float32, "sdpa")
    named = open_directory(directory, config=str(tmp_path))
    assert named.load_model(torch.float32, "sdpa")
    with pytest.raises(CheckpointError, match=r"no tokenizer .*set model\.tokenizer"):
        named.load_tokenizer()
    for options, message in (
        ({"intermediate_size": 25}, r"shape \[24, 16\], expected \[25, 16\]"),
        ({"num_hidden_layers": 3}, r"no key 'model\.layers\.2\.self_attn\.q_proj\.weight'"),
        ({"num_hidden_layers": 1}, "stored weights have no place in the model"),
        ({"tie_word_embeddings": True}, r"no place in the model.*lm_head"),
    ):
        make_model(**({"vocab_size": 49} | options)).config.save_pretrained(tmp_path / "other")
        with pytest.raises(CheckpointError, match=message):
            open_directory(directory, config=str(tmp_path / "other")).read(UP, "weight")
    untied = make_model(vocab_size=49).config
    tied = copy("z2-fp32-tied-on-2")
    untied.save_pretrained(tied)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' shares its values with 'model"):
        open_directory(tied).load_model(torch.float32, "sdpa")


def test_names_of_a_wrapped_model_are_found(runs, copy):
    directory = copy("z3-bf16-on-2")
    for path in directory.glob("global_step3/*model_states.pt"):
        edit(path, wrap_names)
    weight = open_directory(directory).read(UP, "weight")
    assert torch.equal(weight, truth_of(runs["z3-bf16-on-2"])[UP]["weight"].flatten())


CLASSES = {  # what the files name of DeepSpeed's; stand-ins, so that nothing has to import it
    "deepspeed.utils.tensor_fragment": "fragment_address",
    "deepspeed.runtime.zero.config": "ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler": "LossScaler",
}


def edit(path: Path, change) -> None:
    modules = {name: types.ModuleType(name) for name in ["deepspeed", *CLASSES]}
    for module, name in CLASSES.items():
        kind = type(name, (int,) if name == "ZeroStageEnum" else (), {"__module__": module})
        setattr(modules[module], name, kind)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)


def wrap_names(content) -> None:
    content["param_shapes"] = [
        {f"module._orig_mod.{name}": shape for name, shape in group.items()}
        for group in content["param_shapes"]
    ]


def optimizer_of(content) -> dict:
    states = content["optimizer_state_dict"]
    return states.get("optimizer_state_dict") or states["base_optimizer_state"]


def step_two(content) -> None:
    for state in optimizer_of(content)["state"].values():
        state["step"] = torch.tensor(2.0)


def step_nine(content) -> None:
    for state in optimizer_of(content)["state"].values():
        state["step"] = 9


def shorten(content) -> None:
    flats = content["optimizer_state_dict"].get("fp32_flat_groups")
    flats = flats or content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    flats[0] = flats[0][:-1].clone()


def drop_exp_avg_sq(content) -> None:
    del optimizer_of(content)["state"][0]["exp_avg_sq"]


def drop_every_exp_avg_sq(content) -> None:
    for state in optimizer_of(content)["state"].values():
        del state["exp_avg_sq"]


def drop_mapping(content) -> None:
    content["optimizer_state_dict"]["param_slice_mappings"][0].popitem()


def world_of_four(content) -> None:
    content["optimizer_state_dict"]["partition_count"] = 4


def freeze(content) -> None:
    content["frozen_param_shapes"] = {"model.norm.weight": torch.Size([16])}


Z3, Z2 = "z3-bf16-on-2", "z2-bf16-on-2"
SECOND = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
Z2_MODEL = "mp_rank_00_model_states.pt"
Z3_MODEL = "zero_pp_rank_1_mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("case", "file", "change", "message"),
    [
        (Z3, SECOND, step_two, "is of step 2, expected 3 as in bf16_zero_pp_rank_0.*two steps"),
        (Z2, SECOND, step_two, "is of step 2, expected 3 as in bf16_zero_pp_rank_0.*two steps"),
        (Z3, SECOND, shorten, r"weight of group 0 has \d+ elements, expected \d+: \d+ param"),
        (Z2, SECOND, shorten, r"weight of group 0 has \d+ elements, expected \d+ up to the end"),
        (Z3, SECOND, drop_exp_avg_sq, "the optimizer state is incomplete"),
        (Z2, SECOND, drop_mapping, r"the ranks hold 0 elements of 'lm_head\.weight', expected 784"),
        (Z3, SECOND, world_of_four, r"partition_count is 4, found 2 optim_states"),
        (Z3, SECOND, lambda c: c.clear(), r"expected fp32_flat_groups \(ZeRO-3\)"),
        (Z3, Z3_MODEL, lambda c: c.update(dp_world_size=4), "dp_world_size is 4, found 2 optim"),
        (Z3, Z3_MODEL, lambda c: c.update(global_steps=2), "global_steps is 2, expected 3"),
        (Z2, Z2_MODEL, lambda c: c.update(mp_world_size=2), "2: tensor parallelism is not read"),
        (Z2, Z2_MODEL, freeze, r"1 frozen parameters, the first is 'model\.norm\.weight'"),
        (Z2, Z2_MODEL, lambda c: c["param_shapes"].pop(), "has 1 groups, the partitions have 2"),
        (Z2, Z2_MODEL, lambda c: c.pop("param_shapes"), "no param_shapes"),
    ],
)
def test_parts_that_do_not_fit_are_named(copy, case, file, change, message):
    directory = copy(case)
    edit(directory / "global_step3" / file, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_directory(directory)
    assert "global_step3" in str(caught.value)


JUNK = (None, 0, [], [None], {}, {"a": 1}, "text", torch.zeros(()), torch.zeros(2, 2))


@pytest.mark.parametrize("case", [Z2, Z3])
@pytest.mark.parametrize("part", ["optimizer", "base", "state", "model"])
def test_junk_is_refused_or_makes_no_difference(copy, runs, case, part):
    """Any one entry replaced by anything: an error of ours, or the right numbers."""
    directory = copy(case)
    model = Z2_MODEL if case == Z2 else Z3_MODEL
    path = directory / "global_step3" / (model if part == "model" else SECOND)
    original = path.read_bytes()
    truth = truth_of(runs[case])[UP]
    owners = {
        "optimizer": lambda content: content["optimizer_state_dict"],
        "base": optimizer_of,
        "state": lambda content: optimizer_of(content)["state"][0],
        "model": lambda content: content,
    }
    keys: list = []
    edit(path, lambda content: keys.extend(owners[part](content)))
    num_refused = 0
    for key in keys:
        for junk in JUNK:
            path.write_bytes(original)
            edit(
                path, lambda content, key=key, junk=junk: owners[part](content).update({key: junk})
            )
            try:
                source = open_directory(directory)
                for kind in KINDS:
                    assert torch.equal(source.read(UP, kind), truth[kind].flatten()), (key, junk)
            except CheckpointError:
                num_refused += 1
    assert num_refused


def test_an_optimizer_with_one_moment_has_not_adam_s(copy):
    directory = copy(Z3)
    for path in directory.glob("global_step3/*optim_states.pt"):
        edit(path, drop_every_exp_avg_sq)
    source = open_directory(directory)
    assert (source.has_moments, source.ref.has_moments) == (False, False)
    with pytest.raises(CheckpointError, match=r"no exp_avg_sq .*found weight, exp_avg"):
        source.read(UP, "exp_avg_sq")


@pytest.mark.parametrize("case", AMSGRAD)
def test_moments_of_amsgrad_are_refused_when_read(runs, case):
    directory = runs[f"{case}-on-2"]
    source = open_directory(directory)
    assert torch.equal(source.read(UP, "weight"), truth_of(directory)[UP]["weight"].flatten())
    for call in (lambda: source.read(UP, "exp_avg_sq"), lambda: source.hyper(UP)):
        with pytest.raises(
            CheckpointError, match=r"optim_states\.pt: found 'max_exp.* moments: warmup"
        ):
            call()


def test_a_step_beyond_the_run_s_is_of_another_checkpoint(copy):
    directory = copy(Z2)
    for path in directory.glob("global_step3/*optim_states.pt"):
        edit(path, step_nine)
    with pytest.raises(CheckpointError, match=r"of step 9, mp_rank_00_model_states\.pt says 3"):
        open_directory(directory)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (Z3, lambda d: (d / SECOND).unlink(), "found 2 model_states.pt and 1 optim_states.pt"),
        (
            Z3,
            lambda d: (d / SECOND.replace("pp_rank_1", "pp_rank_0")).unlink(),
            "rank 0 is missing",
        ),
        (Z2, lambda d: [p.unlink() for p in d.glob("*optim*")], "only ZeRO stages 1, 2 and 3"),
        (Z2, lambda d: (d / Z2_MODEL).unlink(), "no model_states.pt beside"),
        (Z2, lambda d: (d / SECOND).write_bytes(b"PK"), "1_mp_rank_00_optim.*found 2 bytes"),
        (Z2, lambda d: (d / "mp_rank_01_model_states.pt").touch(), "mp_rank above 0"),
        (Z2, lambda d: (d / "layer_00-model_states.pt").touch(), "pipeline parallelism, which"),
        (Z2, lambda d: (d / SECOND[5:]).touch(), "both are of rank 1; files of two runs"),
        (
            Z2,
            lambda d: (d / "layer_0_expert_1_mp_rank_00_model_states.pt").touch(),
            "mixture of experts, which",
        ),
    ],
)
def test_files_that_are_missing_or_too_many_are_named_when_listed(copy, case, change, message):
    directory = copy(case)
    change(directory / "global_step3")
    with pytest.raises(CheckpointError, match=message):
        listed(directory)


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("file", [SECOND, Z2_MODEL])
def test_a_hostile_file_executes_nothing(copy, tmp_path, file):
    directory, sprung = copy(Z2), tmp_path / "sprung"
    edit(directory / "global_step3" / file, lambda content: content.update(more=Trap(sprung)))
    assert listed(directory).format == "deepspeed"
    with pytest.raises(CheckpointError, match=f"{file}: cannot be read"):
        open_directory(directory)
    (directory / "global_step3" / file).write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(CheckpointError, match=f"{file}: found"):
        listed(directory)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap works where it is sprung


def test_listing_imports_neither_torch_nor_deepspeed(runs):
    script = (
        "import sys; from probe.series import list_checkpoints as l; "
        "from probe.spec import LocalCheckpoints as S; "
        f"print(l(S(path={str(runs[Z2])!r}))[0].step, 'torch' in sys.modules, "
        "'deepspeed' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.split() == ["3", "False", "False"]
