"""Nothing that a checkpoint, a tokenizer or a data set brings is run: by no plan and by no rank."""

import ast
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient

from server.api.app import create_app
from server.settings import Settings
from tests.server.conftest import on_sqlite_only

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted(p for top in ("probe", "server", "clients") for p in (ROOT / top).rglob("*.py"))
# The readers that take pickles apart themselves, by a list of names.
UNPICKLERS = {"probe/checkpoints/dcp_index.py", "probe/checkpoints/olmo_files.py"}
NEVER = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.unsafe_load",
         "pickle.load", "pickle.loads", "marshal.loads", "marshal.load", "shelve.open",
         "joblib.load", "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads",
         "pandas.read_pickle", "pd.read_pickle", "runpy.run_path", "imp.load_source"}  # fmt: skip
MUST = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False),
        "numpy.load": ("allow_pickle", False)}  # fmt: skip


def calls() -> Any:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                keywords = {
                    k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
                }
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                yield where, ast.unparse(node.func), keywords


def test_no_call_in_the_code_can_run_what_it_reads():
    num_seen = 0
    for where, name, keywords in calls():
        assert name not in NEVER, f"{where} calls {name}"
        assert keywords.get("trust_remote_code", False) is False, where
        assert keywords.get("shell", False) is False, where
        if name in MUST:
            keyword, value = MUST[name]
            assert keywords.get(keyword) is value, f"{where}: {name} needs {keyword}={value}"
            num_seen += 1
        # `architecture` is one of transformers' own classes, filled from tensors: no file is read.
        # `ScriptDirectory` is alembic's, of our own migrations.
        by_file = name not in ("architecture.from_pretrained", "ScriptDirectory.from_config")
        if by_file and name.endswith((".from_pretrained", ".from_config")):
            assert keywords.get("trust_remote_code") is False, where
            num_seen += 1
    assert num_seen > 8  # so that the names looked for are those that are used


def test_yaml_makes_plain_values_only():
    from probe.spec_load import _SpecLoader

    assert issubclass(_SpecLoader, yaml.SafeLoader)
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "yaml.load":
                assert [ast.unparse(argument) for argument in node.args][1:] == ["_SpecLoader"]


def test_pickles_are_taken_apart_in_two_places_only():
    found = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node) == "pickle.Unpickler"
    }
    assert found == UNPICKLERS


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def plant_code(path: Path, canary: Path) -> None:
    path.write_text(
        f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n"
        "class Planted:\n    def __init__(self, *a, **k): pass\n"
    )


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_traps_work(canary, tmp_path):
    pickle.loads(pickle.dumps(Trap(canary)))
    assert canary.exists()
    canary.unlink()
    plant_code(tmp_path / "planted.py", canary)
    subprocess.run([sys.executable, tmp_path / "planted.py"], check=True)
    assert canary.exists()


def set_traps(directory: Path, canary: Path) -> None:
    """Step 1: a model of its own code. Step 2: such a tokenizer. Step 3: pickles all over."""
    plant_code(directory / "step-1" / "planted.py", canary)
    auto = {"AutoConfig": "planted.Planted", "AutoModelForCausalLM": "planted.Planted"}
    change_json(directory / "step-1" / "config.json", model_type="planted", auto_map=auto)
    plant_code(directory / "step-2" / "planted.py", canary)
    change_json(
        directory / "step-2" / "tokenizer_config.json",
        tokenizer_class="Planted",
        auto_map={"AutoTokenizer": ["planted.Planted", "planted.Planted"]},
    )
    for name in ("optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth"):
        (directory / "step-3" / name).write_bytes(pickle.dumps(Trap(canary)))


@on_sqlite_only
def test_neither_server_nor_rank_runs_what_a_checkpoint_brings(lab, series_spec, tmp_path, canary):
    set_traps(tmp_path, canary)
    series_spec["model"] = {"device": "cpu"}
    client = TestClient(create_app(Settings(roots=[tmp_path]), lab.store), "http://127.0.0.1")
    answers = [
        client.post("/v1/jobs:plan", json=series_spec),
        client.post("/v1/jobs", json=series_spec),
        client.post("/v1/checkpoints", json=series_spec["checkpoints"]),
    ]
    assert all(answer.status_code < 500 for answer in answers)
    assert not canary.exists()
    spec = tmp_path / "job.yaml"
    spec.write_text(yaml.safe_dump(series_spec))
    ran = subprocess.run(
        [sys.executable, "-m", "probe.rank", "--spec", spec],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
    )
    events = [json.loads(line) for line in ran.stdout.splitlines()]
    errors = {e["unit_id"]: e for e in events if e["type"] == "error"}
    assert [unit_id[5:] for unit_id in errors] == ["step-1"], ran.stderr
    assert errors["0000-step-1"]["code"] == "checkpoint_error"
    assert "custom code" in errors["0000-step-1"]["message"]
    # The others have what they need without code: a tokenizer.json, and weights in safetensors.
    assert sum(e["type"] == "result" for e in events) == 2
    assert not canary.exists()


def test_pickled_weights_are_refused_when_a_job_is_planned(lab, tmp_path, canary):
    directory = tmp_path / "step-1"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(canary)))
    client = TestClient(create_app(Settings(), lab.store), "http://127.0.0.1")
    answer = client.post("/v1/checkpoints", json={"source": "local", "path": str(directory)})
    assert (answer.status_code, answer.json()["code"]) == (422, "checkpoint_error")
    assert "pickles" in answer.json()["detail"]
    assert not canary.exists()


def test_a_data_sets_loading_script_is_not_run(tmp_path, canary):
    from probe.batches.hub_rows import read_hub_rows
    from probe.errors import BatchError
    from probe.spec import HubData

    directory = tmp_path / "planted"
    directory.mkdir()
    plant_code(directory / "planted.py", canary)
    source = HubData(type="hub", name="x", dataset=str(directory))
    with pytest.raises(BatchError):
        list(read_hub_rows(source))
    assert not canary.exists()
