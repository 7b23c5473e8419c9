"""Series whose checkpoints do not go together, or do not go with the job."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from probe.checkpoints import save_checkpoint
from probe.engine import Session
from probe.errors import CheckpointError, ConfigError, DirectionError
from probe.plan import expand_units, make_plan
from probe.spec_load import parse_spec


@pytest.fixture
def copied(series, tmp_path):
    """Two checkpoints of the run to break, and the spec that measures them."""
    for step in (4, 12):
        shutil.copytree(series.directory / f"step-{step}", tmp_path / f"step-{step}")

    def spec(**changes):
        where = {"source": "local", "path": str(tmp_path / "step-*")}
        return parse_spec(series.spec(checkpoints=where, measurement__repeats=1, **changes))

    return tmp_path, spec


def exchange_words(directory):
    """Give w2 the number of w3 and so on: as many tokens, other numbers for the same text."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    words = [word for word in vocab if word.startswith("w")]
    numbers = [vocab[word] for word in words]
    vocab.update(zip(words, numbers[1:] + numbers[:1], strict=True))
    path.write_text(json.dumps(content))


def test_each_checkpoint_is_measured_with_its_own_tokenizer(copied):
    directory, spec = copied
    exchange_words(directory / "step-12")
    session, units = Session(spec()), expand_units(spec())
    first, second = (session.measure(unit).measurements[0] for unit in units)
    assert first.update_batch_sha256 != second.update_batch_sha256
    # As a worker that takes the job over after the first unit would measure it.
    alone = Session(spec()).measure(units[1]).measurements[0]
    assert (second.update_batch_sha256, second.trials) == (alone.update_batch_sha256, alone.trials)


def test_equal_tokenizers_share_the_batches(copied):
    _, spec = copied
    session, units = Session(spec()), expand_units(spec())
    session.measure(units[0])
    batches = session.workbench._batches
    session.measure(units[1])
    assert session.workbench._batches is batches


def test_a_named_tokenizer_serves_the_whole_series(copied):
    directory, spec = copied
    exchange_words(directory / "step-12")
    job = spec(model__tokenizer=str(directory / "step-4"))
    session, units = Session(job), expand_units(job)
    first, second = (session.measure(unit).measurements[0] for unit in units)
    assert first.update_batch_sha256 == second.update_batch_sha256


def test_a_later_checkpoint_without_tokenizer_is_an_error_as_it_is_alone(copied):
    directory, spec = copied
    for file in (directory / "step-12").glob("tokenizer*"):
        file.unlink()
    session, units = Session(spec()), expand_units(spec())
    session.measure(units[0])
    with pytest.raises(CheckpointError, match=r"no tokenizer.*Set model\.tokenizer"):
        session.measure(units[1])


def test_sequences_longer_than_the_model_has_positions_for_are_refused(copied):
    _, spec = copied
    units = expand_units(spec())
    Session(spec(batches__sequence_length=64)).measure(units[0])
    with pytest.raises(ConfigError, match=r"sequence_length is 65, the model has 64 positions"):
        Session(spec(batches__sequence_length=65)).measure(units[0])


@pytest.mark.parametrize(("kind", "value"), [("exp_avg", float("nan")), ("exp_avg_sq", -1.0)])
def test_broken_moments_are_named(copied, kind, value):
    directory, spec = copied
    path = directory / "step-4" / "optimizer.safetensors"
    state = {key: tensor.clone() for key, tensor in load_file(path).items()}
    state[f"model.norm.weight.{kind}"].fill_(torch.tensor(value))
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(DirectionError, match=r"'model\.norm\.weight' is not finite"):
        Session(spec()).measure(expand_units(spec())[0])


def test_the_plan_says_that_moments_come_from_two_sources(copied):
    directory, spec = copied
    assert make_plan(spec()).notes == []
    (directory / "step-12" / "optimizer.safetensors").unlink()
    [note] = make_plan(spec()).notes
    assert note.startswith("1 of 2 checkpoints hold no optimizer state")
    assert make_plan(spec(optimizer__moments="warmup")).notes == []


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_no_decay_pattern_that_matches_nothing_is_refused(copied, name):
    _, spec = copied
    units = expand_units(spec())
    optimizer = {"name": name, "weight_decay": 0.1, "no_decay": ["*wte*", "*norm*"]}
    with pytest.raises(ConfigError, match=r"'\*wte\*', which matches none of .* 2\d parameters"):
        Session(spec(optimizer=optimizer)).measure(units[0])
    for harmless in ({"weight_decay": 0.0}, {"no_decay": []}):
        Session(spec(optimizer=optimizer | harmless)).measure(units[0])


@pytest.mark.parametrize("loss_batch", ["update", "held_out", "both"])
def test_searches_that_use_their_budget_up_spend_the_plan_s_limit(series, loss_batch):
    measurement = {"loss_batch": loss_batch, "repeats": 2, "max_forward_passes": 3}
    job = parse_spec(series.spec(measurement=measurement))
    result = Session(job).measure(expand_units(job)[0])
    assert {m.outcome.value for m in result.measurements} == {"budget_exhausted"}
    plan = make_plan(job)
    assert result.num_forward_passes * len(plan.units) == plan.max_forward_passes
    assert result.num_backward_passes * len(plan.units) == plan.num_backward_passes


def test_the_plan_of_a_gguf_file_does_not_speak_of_fetching(series, tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    job = parse_spec(series.spec(checkpoints={"source": "gguf", "path": str(file)}))
    plan = make_plan(job)
    assert plan.num_parameters is None
    assert plan.notes == ["the model's size is not read from a GGUF file before it is measured"]


def test_a_model_without_sdpa_names_the_setting_that_runs_it(series, tmp_path):
    config = Gemma2Config(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    tokenizer = AutoTokenizer.from_pretrained(series.directory / "step-4")
    save_checkpoint(Gemma2ForCausalLM(config), tmp_path / "step-1", tokenizer=tokenizer)
    where = {"source": "local", "path": str(tmp_path / "step-1")}
    units = expand_units(parse_spec(series.spec(checkpoints=where)))
    with pytest.raises(CheckpointError, match=r"no sdpa attention: use model\.attention: eager"):
        Session(parse_spec(series.spec(checkpoints=where))).measure(units[0])
    job = parse_spec(series.spec(checkpoints=where, model__attention="eager"))
    assert Session(job).measure(units[0]).provenance.attention == "eager"
