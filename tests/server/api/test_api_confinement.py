"""Every path and every repository that a job can name stays within what the operator allows."""

import copy
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel

from probe.kinds import KINDS
from probe.spec_load import SpecError, parse_spec
from server.api.app import create_app
from server.confinement import Confinement, NotAllowedError
from server.settings import Settings

LOOPBACK = "http://127.0.0.1"

# What every text in a spec is. A new field must be put here; a path or a repository must then
# also get a place in `job_with`, and is attacked with everything below.
PATHS = {
    "checkpoints.path",
    "checkpoints.config",
    "checkpoints.optimizer_states",
    "model.tokenizer",
    "batches.sources.paths",
    "mixture.sources.paths",
    "eval_tasks.data.paths",
    "stream.data.images",  # of idx files; of npz the name of an array
    "stream.data.labels",
    "stream.data.path",
}
REPOS = {
    "checkpoints.repo",
    "model.tokenizer",
    "checkpoints.optimizer_states",
    "batches.sources.dataset",
    "mixture.sources.dataset",
    "eval_tasks.data.dataset",
    "stream.data.repo",
}
REVISIONS = {
    "checkpoints.revisions",
    "batches.sources.revision",
    "mixture.sources.revision",
    "eval_tasks.data.revision",
    "stream.data.revision",
}
# Names that are looked up in what was read, words for people, patterns of parameters' names.
_OF_A_SOURCE = {"config", "split", "name", "format.field", "format.question", "format.answer"} | {
    "format.choices",
    "format.template",
}
WORDS = (
    {"name", "labels", "webhook", "checkpoints.step_pattern", "optimizer.no_decay"}
    | {f"{place}.{word}" for place in ("batches.sources", "mixture.sources", "eval_tasks.data")
       for word in _OF_A_SOURCE}
    | {"mixture.varied", "methods.name", "controls.name", "stream.data.split"}
    | {"stream.data.image_column", "stream.data.label_column"}
)  # fmt: skip


def texts_of(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted path of every field that can hold any text, through lists, unions and models."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        found |= texts_in(field.annotation, f"{prefix}{name}")
    return found


def texts_in(annotation: Any, path: str) -> set[str]:
    if annotation is str:
        return {path}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return texts_of(annotation, f"{path}.")
    origin = get_origin(annotation)
    if origin is Literal or origin is None:
        return set()
    assert origin in (list, dict, tuple, Union, types.UnionType, Annotated), (path, annotation)
    parts = get_args(annotation)[:1] if origin is Annotated else get_args(annotation)
    return set().union(*(texts_in(part, path) for part in parts))


def test_no_text_of_a_spec_is_forgotten():
    found = set().union(*(texts_of(kind) for kind in KINDS.values()))
    known = PATHS | REPOS | REVISIONS | WORDS
    assert found - known == set(), "a new field: is it a path, a repository, a revision or a word?"
    assert known - found == set(), "a field that is gone"


@pytest.fixture
def root(workspace: Path) -> Path:
    """What may be read; beside it lies what may not."""
    (workspace / "root").mkdir()
    for name in ("runs", "text.jsonl"):
        (workspace / name).rename(workspace / "root" / name)
    (workspace / "secret").mkdir()
    (workspace / "secret" / "config.json").write_text("{}")
    (workspace / "secret" / "a.jsonl").write_text("{}")
    (workspace / "root-2").mkdir()
    (workspace / "root" / "out").symlink_to(workspace / "secret")
    (workspace / "root" / "out.jsonl").symlink_to(workspace / "secret" / "a.jsonl")
    (workspace / "root" / "[a].jsonl").symlink_to(workspace / "secret" / "a.jsonl")
    (workspace / "root" / "loop").symlink_to(workspace / "root" / "loop")
    (workspace / "root" / "hidden" / "deep").mkdir(parents=True)
    (workspace / "root" / "hidden" / "deep" / "x.jsonl").symlink_to("/etc/hostname")
    return workspace / "root"


ATTACKS = [
    "{w}/secret", "{w}/secret/a.jsonl", "{w}/root-2", "{w}", "/", "/etc/passwd", "/etc/*",
    "//etc/passwd", "/./etc/passwd", "/proc/self/environ", "/proc/self/root/etc/passwd",
    "/dev/stdin", "/proc/self/cwd/x",
    "{r}/..", "{r}/../secret", "{r}/runs/../../secret/a.jsonl", "{r}/*/../../secret",
    "{r}/runs/../../root-2", "..", "../x", "./../x", "{r}/a/../../..",
    "~", "~root", "~/x", "~root/.ssh/id_rsa",
    "{r}/out", "{r}/out/a.jsonl", "{r}/out.jsonl", "{r}/[a].jsonl", "{r}/loop/x",
    "relative", "relative/a.jsonl", "*", "**/*", "./x", ".", "$HOME/x", "%2e%2e/x",
    "file:///etc/passwd", "file:/etc/passwd", "FILE:///etc/passwd", "s3://bucket/x",
    "hf://datasets/o/r/x.jsonl", "http://127.0.0.1/x", "https://example.org/x.jsonl", "gs://b/x",
    "zip://x::https://example.org/a.zip", "memory://x", "github://o:r@main/x", "sftp://h/x",
    "\\\\server\\share\\x", "C:\\Windows\\x", "\\etc\\passwd",
    "{r}/" + "a" * 5000, "/" + "a/" * 3000,
    "\N{FULLWIDTH FULL STOP}\N{FULLWIDTH FULL STOP}/secret", "\u2024\u2024/x", "/etc\u2215passwd",
    "/\u202e/etc/passwd", "{w}/roo\u0074\u0301", "{r}\u200b/x", "{w}/ROOT/x", "{r} /x", " {r}/x",
]  # fmt: skip


def job_with(field: str, value: Any, spec: dict[str, Any], mix: dict[str, Any], root: Path) -> Any:
    """A job that is right but for one field."""
    top, *below = field.split(".")
    files = {"type": "files", "paths": [str(root / "text.jsonl")]}
    if top in ("mixture", "eval_tasks"):
        job = copy.deepcopy(mix) | {"checkpoints": {"path": str(root / "runs" / "step-100")}}
        job["checkpoints"]["source"] = "local"
        for source in [*job["mixture"]["sources"], *(t["data"] for t in job["eval_tasks"])]:
            source["paths"] = files["paths"]
    elif top == "stream":
        job = {
            "kind": "continual_learning",
            "name": "x",
            "methods": [{"name": "m"}],
            "stream": {"type": "random_labels", "data": {}},
        }
    else:
        job = copy.deepcopy(spec)
        job["checkpoints"]["path"] = str(root / "runs" / "step-100")
        job["batches"]["sources"][0]["paths"] = files["paths"]
    last = below[-1]
    if field in ("checkpoints.repo", "checkpoints.revisions", "checkpoints.optimizer_states"):
        job["checkpoints"] = {"source": "hub", "repo": "allenai/OLMo", "revisions": ["main"]}
        job["checkpoints"][last] = [value] if last == "revisions" else value
    elif top in ("checkpoints", "model"):
        job[top] = job.get(top, {}) | {last: value}
    elif top == "stream":
        job["stream"]["data"] = {
            "images": {"type": "idx", "images": value, "labels": files["paths"][0]},
            "labels": {"type": "idx", "labels": value, "images": files["paths"][0]},
            "path": {"type": "npz", "path": value},
            "repo": {"type": "hub", "repo": value},
            "revision": {"type": "hub", "repo": "allenai/x", "revision": value},
        }[last]
    else:
        sources = {
            "batches": lambda: job["batches"]["sources"][0],
            "mixture": lambda: job["mixture"]["sources"][1],
            "eval_tasks": lambda: job["eval_tasks"][0]["data"],
        }
        source = sources[top]()
        if last == "paths":
            source["paths"] = [files["paths"][0], value]
        else:
            del source["paths"]
            source |= {"type": "hub", "dataset": "allenai/c4", last: value}
    return job


def field_of(error: NotAllowedError) -> str:
    """Without the numbers of list entries."""
    return ".".join(part for part in error.field.split(".") if not part.isdecimal())


def refusal(confinement: Confinement, job: Any) -> tuple[str, str] | None:
    """Code and field; None where nothing is refused."""
    try:
        confinement.check_spec(job)
    except NotAllowedError as error:
        return error.code, field_of(error)
    return None


@pytest.mark.parametrize("field", sorted(PATHS))
def test_every_path_of_every_kind_is_confined(field, spec, mix_spec, root, workspace):
    confinement = Confinement(roots=[root])
    inside = str(root / "text.jsonl")
    good = "none" if field == "checkpoints.optimizer_states" else inside
    confinement.check_spec(parse_spec(job_with(field, good, spec, mix_spec, root)))
    for attack in ATTACKS:
        value = attack.format(w=workspace, r=root)
        if field == "checkpoints.optimizer_states":
            value += "/x.csv"
        try:
            parsed = parse_spec(job_with(field, value, spec, mix_spec, root))
        except SpecError:
            continue  # refused sooner
        if field == "model.tokenizer" and attack == "relative/a.jsonl":
            continue  # what a hub id looks like
        if field == "model.tokenizer" and attack == "relative":
            continue  # the same
        assert refusal(confinement, parsed) == ("path_not_allowed", field), value


def test_an_address_is_no_file_even_where_the_service_runs_in_a_root(
    spec, mix_spec, root, monkeypatch
):
    """There `file:///x` would be a file within the root to a check, and `/x` to some readers."""
    monkeypatch.chdir(root)
    confinement = Confinement(roots=[root])
    for value in ("file:///etc/passwd", "s3://b/x", "hf://o/r", "HTTP://h/x", "zip://a::file:///x"):
        job = job_with("batches.sources.paths", value, spec, mix_spec, root)
        assert refusal(confinement, parse_spec(job)) == (
            *("path_not_allowed", "batches.sources.paths"),
        )
    relative = job_with("batches.sources.paths", "text.jsonl", spec, mix_spec, root)
    assert refusal(confinement, parse_spec(relative)) is None


def test_globs_are_followed_to_what_they_match(spec, mix_spec, root):
    confinement = Confinement(roots=[root])
    job = job_with("batches.sources.paths", f"{root}/runs/**", spec, mix_spec, root)
    confinement.check_spec(parse_spec(job))
    for pattern in ("*.jsonl", "o*", "**/*.jsonl", "hidden/**", "hidden/*/x.jsonl", "?ut.jsonl"):
        job = job_with("batches.sources.paths", f"{root}/{pattern}", spec, mix_spec, root)
        with pytest.raises(NotAllowedError):
            confinement.check_spec(parse_spec(job))


def test_files_of_a_tokenizer_that_are_linked_out_are_refused(spec, mix_spec, root):
    (root / "tok").mkdir()
    (root / "tok" / "tokenizer_config.json").write_text("{}")
    job = parse_spec(job_with("model.tokenizer", str(root / "tok"), spec, mix_spec, root))
    Confinement(roots=[root]).check_spec(job)
    (root / "tok" / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(NotAllowedError):
        Confinement(roots=[root]).check_spec(job)


@pytest.mark.parametrize("field", sorted(REVISIONS))
def test_a_revision_is_no_way_out_of_the_cache(field, spec, mix_spec, root):
    confinement = Confinement(roots=[root])
    for good in ("main", "refs/pr/1", "stage1-step1000-tokens5B", "v1..2"):
        confinement.check_spec(parse_spec(job_with(field, good, spec, mix_spec, root)))
    for value in ("../../x", "a/../../b", "/etc/passwd", "..", "a//b", "..\\..\\x", "refs/../.."):
        with pytest.raises(NotAllowedError) as caught:
            confinement.check_spec(parse_spec(job_with(field, value, spec, mix_spec, root)))
        assert field_of(caught.value) == field


@pytest.mark.parametrize("field", sorted(REPOS))
def test_only_the_repositories_of_the_list_may_be_named(field, spec, mix_spec, root):
    confinement = Confinement(hub_repos=["allenai/*", "ylecun/mnist", "https://states.example/*"])
    is_state = field == "checkpoints.optimizer_states"
    allowed = ["https://states.example/{step}/", "auto"] if is_state else ["allenai/OLMo-2-0425-1B"]
    for value in allowed:
        confinement.check_spec(parse_spec(job_with(field, value, spec, mix_spec, root)))
    refused = ["evil/model", "allenai2/x", "xallenai/x", "Allenai/OLMo", "ylecun/mnist2",
               "ylecun/MNIST", "openai/gsm8k", "allena\u0131/x"]  # fmt: skip
    if is_state:
        refused = ["https://evil.example/{step}/", "https://states.example/../{step}"]
    for value in refused:
        job = parse_spec(job_with(field, value, spec, mix_spec, root))
        assert refusal(confinement, job) == ("repo_not_allowed", field), value
        Confinement().check_spec(job)  # without a list any may be named


@pytest.mark.parametrize("name", ["json", "text", "csv", "imagefolder", "/etc", "../x", "a/b/c"])
def test_a_data_set_is_no_reader_of_local_files(spec, mix_spec, root, name):
    job = parse_spec(job_with("batches.sources.dataset", name, spec, mix_spec, root))
    with pytest.raises(NotAllowedError):
        Confinement(roots=[root]).check_spec(job)


def test_a_data_set_that_is_a_directory_here_is_refused(spec, mix_spec, root, monkeypatch):
    monkeypatch.chdir(root)
    job = parse_spec(job_with("batches.sources.dataset", "hidden/deep", spec, mix_spec, root))
    with pytest.raises(NotAllowedError):
        Confinement(roots=[root]).check_spec(job)


def test_refusals_reach_the_client_and_nothing_is_queued(store, spec, mix_spec, root, workspace):
    app = create_app(Settings(roots=[root], hub_repos=["allenai/*"]), store)
    client = TestClient(app, LOOPBACK, raise_server_exceptions=False)
    outside = str(workspace / "secret" / "a.jsonl")
    cases = {field: outside for field in PATHS - {"checkpoints.optimizer_states"}}
    cases |= {field: "evil/model" for field in REPOS - PATHS}
    for field, value in cases.items():
        job = job_with(field, value, spec, mix_spec, root)
        for url in ("/v1/jobs", "/v1/jobs:plan"):
            answer = client.post(url, json=job)
            code = "path_not_allowed" if value == outside else "repo_not_allowed"
            assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
            (problem,) = answer.json()["errors"]
            assert ".".join(p for p in problem["field"].split(".") if not p.isdecimal()) == field
    assert client.get("/v1/jobs").json()["data"] == []
