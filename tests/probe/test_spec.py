"""Job specs: what is accepted, what is refused, and what the refusal says."""

import copy
import json
from typing import Any

import pytest

from probe.errors import ConfigError
from probe.spec_load import SpecError, load_spec, parse_spec, resolved, spec_sha256

MINIMAL: dict[str, Any] = {
    "kind": "checkpoint_series",
    "name": "a series",
    "checkpoints": {"source": "local", "path": "runs/step-*"},
    "batches": {
        "sources": [{"name": "web", "type": "files", "paths": ["web.jsonl.gz"]}],
        "sequence_length": 128,
        "batch_sequences": 4,
    },
    "measurement": {"loss_batch": "update"},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    spec = copy.deepcopy(MINIMAL)
    *parents, last = path.split(".")
    place: Any = spec
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    place[last] = value
    return spec


def problems(raw: Any) -> dict[str, str]:
    with pytest.raises(SpecError) as caught:
        parse_spec(raw)
    return {p["field"]: p["message"] for p in caught.value.problems}


def test_the_minimal_spec_gets_every_default():
    spec = parse_spec(MINIMAL)
    assert spec.optimizer.name == "adamw"
    assert spec.optimizer.betas == (0.9, 0.95)
    assert spec.measurement.rel_tol == 1 / 16


def test_a_resolved_spec_is_itself_a_spec_with_the_same_hash():
    spec = parse_spec(MINIMAL)
    again = parse_spec(resolved(spec))
    assert again == spec
    assert spec_sha256(again) == spec_sha256(spec)


def test_the_hash_ignores_names_for_people_and_on_how_many_machines_ranks_are():
    spec = parse_spec(MINIMAL)
    assert spec_sha256(parse_spec(changed("name", "other"))) == spec_sha256(spec)
    assert spec_sha256(parse_spec(changed("labels", {"a": "b"}))) == spec_sha256(spec)
    assert spec_sha256(parse_spec(changed("batches.seed", 1))) != spec_sha256(spec)
    on_one = spec_sha256(parse_spec(changed("parallel", {"ranks": 4})))
    assert on_one != spec_sha256(spec)
    assert spec_sha256(parse_spec(changed("parallel", {"ranks": 4, "nodes": 2}))) == on_one


@pytest.mark.parametrize(
    ("path", "value", "field", "says"),
    [
        ("measurement.repeat", 3, "measurement.repeat", "did you mean 'repeats'?"),
        ("mesurement", {}, "mesurement", "did you mean 'measurement'?"),
        ("optimizer", {"name": "adamw", "beta": 1}, "optimizer.beta", "did you mean 'betas'?"),
        ("batches.sources.0.pathes", [], "batches.sources.0.pathes", "did you mean 'paths'?"),
        ("measurement.rel_tol", 1.0, "measurement.rel_tol", "less than 1 (found 1.0)"),
        ("measurement.repeats", True, "measurement.repeats", "valid integer (found True)"),
        ("measurement.repeats", "4", "measurement.repeats", "valid integer (found '4')"),
        ("measurement.eta_init", float("nan"), "measurement.eta_init", "finite number"),
        ("measurement.eta_init", 1e9, "measurement", "eta_min <= eta_init <= eta_max"),
        ("text", {}, "text", "unknown key"),
        ("adamw", {}, "adamw", "unknown key"),
        ("labels", {"hub": 3}, "labels.hub", "valid string"),
        ("checkpoints.local", 1, "checkpoints.local", "unknown key"),
        ("batches.sources.0.files", [], "batches.sources.0.files", "unknown key"),
        (
            "batches.sources.0.format",
            {"type": "text", "text": "body"},
            "batches.sources.0.format.text",
            "valid keys: answer, choices, field",
        ),
        ("measurement.eta_min", 5e-324, "measurement.eta_min", "greater than or equal to 0.0000"),
        ("measurement.eta_max", 1e39, "measurement.eta_max", "less than or equal to 1000000"),
        ("measurement.loss_batch", "held_out", "(spec)", "set batches.held_out_sequences"),
        ("checkpoints.source", "s3", "checkpoints", "'local', 'hub', 'gguf'"),
        ("optimizer", {"warmup_steps": 3}, "optimizer", "needs 'name'; choose from: adamw, sgd"),
        ("batches.sources", [{"name": "a"}], "batches.sources.0", "choose from: files, hub"),
        ("kind", "mix-scan", "kind", "choose from: checkpoint_series"),
        ("kind", "checkpoint_serie", "kind", "did you mean 'checkpoint_series'?"),
        ("schedule", {"type": "cosine"}, "schedule", "needs peak, total_steps"),
        ("schedule", {"peak": 1e-3}, "schedule", "peak needs a type"),
        ("labels", {"a b": "c"}, "labels.a b.[key]", "pattern"),
        ("parallel", {"backend": "single", "ranks": 2}, "parallel", "ranks is 2"),
        ("parallel", {"backend": "fsdp"}, "parallel.backend", "'fsdp2'"),
        ("parallel", {"nodes": 0}, "parallel.nodes", "greater than or equal to 1"),
        ("parallel", {"nodes": 2}, "parallel", "nodes is 2, ranks is None: set ranks"),
        ("parallel", {"nodes": 2, "ranks": 3}, "parallel", "ranks is 3: set ranks"),
        ("parallel", {"ranks": 0}, "parallel.ranks", "greater than or equal to 1"),
        ("parallel", {"ranks": 1025}, "parallel.ranks", "less than or equal to 1024"),
        ("parallel", {"rank": 2}, "parallel.rank", "did you mean 'ranks'?"),
        ("parallel", {"dtype": "bfloat16"}, "parallel", "dtype is model.dtype"),
    ],
)
def test_a_wrong_field_is_named_with_what_to_do(path, value, field, says):
    found = problems(changed(path, value))
    assert field in found, found
    assert says in found[field]


def test_every_problem_is_reported_at_once():
    raw = changed("measurement.repeats", 0)
    del raw["name"]
    assert set(problems(raw)) == {"name", "measurement.repeats"}


@pytest.mark.parametrize("raw", [None, [], "text", 3, {}, {"kind": ["x"]}])
def test_what_is_not_a_spec_at_all_is_refused(raw):
    problems(raw)


def test_source_names_differ():
    source = MINIMAL["batches"]["sources"][0]
    assert "must differ" in problems(changed("batches.sources", [source, source]))["batches"]


YAML = """
kind: checkpoint_series
name: from yaml
checkpoints: {source: local, path: runs/step-*}
batches:
  sources:
    - {name: web, type: files, paths: [web.jsonl.gz]}
  sequence_length: 128
  batch_sequences: 4
measurement: {loss_batch: update, eta_init: 1e-3, eta_max: 3e+05}
schedule: {type: constant, peak: 4e-4}
"""


def test_yaml_numbers_with_an_exponent_are_numbers(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(YAML)
    spec = load_spec(file)
    assert spec.measurement.eta_init == 1e-3
    assert spec.measurement.eta_max == 3e5
    assert spec.schedule.peak == 4e-4


def test_overrides_reach_into_mappings_and_lists(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(YAML)
    spec = load_spec(
        file,
        ["measurement.eta_init=2e-5", "batches.sources.0.name=c4", "optimizer.name=sgd"],
    )
    assert spec.measurement.eta_init == 2e-5
    assert spec.batches.sources[0].name == "c4"
    assert spec.optimizer.name == "sgd"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("measurement.eta_init", "key=value"),
        ("batches.sources.².name=x", "index into a list of 1"),
        ("batches.sources.7.name=x", "index into a list of 1"),
        ("name.x=1", "not a mapping or list"),
        ("measurement.repeats=[", "not a YAML value"),
        ("measurement.repeats=2026-13-01", "not a YAML value"),
        ("batches.sources.0.paths.0.x=1", "not a mapping or list"),
    ],
)
def test_a_bad_override_says_what_is_wrong(tmp_path, override, says):
    file = tmp_path / "job.yaml"
    file.write_text(YAML)
    with pytest.raises(ConfigError, match=None) as caught:
        load_spec(file, [override])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kind: [", "not valid YAML"),
        ("name: 2026-13-01", "not valid YAML"),
        ("- a", "must hold a mapping"),
        ("name: a\nname: b", "given twice (line 2)"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path, text, says):
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_spec(file)
    assert says in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_spec(tmp_path / "nowhere.yaml")


# What is for people and for the queue


@pytest.mark.parametrize(
    "fields",
    [{"priority": 7}, {"time_limit_s": 60.0}, {"webhook": "https://example.org/x"}, {"name": "b"}],
)
def test_what_the_queue_reads_is_no_part_of_the_measurement(fields):
    assert spec_sha256(parse_spec(MINIMAL | fields)) == spec_sha256(parse_spec(MINIMAL))


def test_the_webhook_address_is_never_shown_again():
    spec = parse_spec(MINIMAL | {"webhook": "https://example.org/secret-path"})
    assert spec.webhook == "https://example.org/secret-path"
    assert "webhook" not in resolved(spec)
    assert "secret-path" not in json.dumps(resolved(spec))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("priority", 0, "greater than or equal to 1"),
        ("priority", 10_001, "less than or equal to 10000"),
        ("priority", True, "valid integer"),
        ("time_limit_s", 0, "greater than 0"),
        ("time_limit_s", float("inf"), "finite"),
        ("webhook", "ftp://example.org/", "must begin with https://"),
        ("webhook", "https:///path", "name a host"),
        ("webhook", "https://user:word@example.org/", "user name or a password"),
        ("webhook", "https://example.org/a b", "plain ASCII"),
        ("webhook", "https://example.org/#x", "fragment"),
        ("webhook", "https://[::1", "is not an address"),
        ("webhook", "https://example.org:99999/", "is not an address"),
        ("webhook", "https://example.org\\@other.org/", "plain ASCII"),
    ],
)
def test_wrong_queue_fields_are_named(field, value, said):
    with pytest.raises(SpecError) as caught:
        parse_spec(MINIMAL | {field: value})
    [problem] = caught.value.problems
    assert problem["field"] == field
    assert said in problem["message"]
    assert field != "webhook" or value not in problem["message"]
