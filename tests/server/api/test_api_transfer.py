"""Jobs from one server to another: the same answers there, and nothing that was made up."""

import asyncio
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from clients.cli.main import app as commands
from clients.http import ProbeClient
from clients.transfer import ExportError, export_job, exports_in, import_job
from server import queue
from server.api.app import create_app
from server.api.problems import ProblemError
from server.api.transfer import _receive
from server.settings import Settings
from server.store import SqlStore
from server.tables import events
from server.wire import JobError

LOOPBACK = "http://127.0.0.1"
ARCHIVED = ("manifest.json", "job.json", "results.json", "events.jsonl")
ANSWERS = (
    *("results", "results?format=csv", "results?format=parquet", "plan", "event-log", "events"),
    *("chart?format=svg", "chart?format=vega", "chart?format=png", "chart?format=svg&theme=dark"),
)


class Side:
    """One server with its store and clients of both kinds."""

    def __init__(self, url: str, directory: Path, **settings: Any) -> None:
        self.store = SqlStore(url)
        given = Settings(data_dir=directory, database_url=url, **settings)
        self.app = create_app(given, self.store, event_poll_s=0.02)
        self.http = TestClient(self.app, LOOPBACK, raise_server_exceptions=False)
        self.probe = ProbeClient(LOOPBACK, transport=httpx.MockTransport(self._answer))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.raw_path.decode()
        headers = {k: v for k, v in request.headers.items() if k in ("accept", "content-type")}
        got = self.http.request(request.method, path, content=request.read(), headers=headers)
        kept = {k: v for k, v in got.headers.items() if k == "content-type"}
        return httpx.Response(got.status_code, headers=kept, content=got.content)

    def send(self, archive: bytes, **options: Any) -> Any:
        headers = {"Content-Type": "application/x-tar"}
        return self.http.post("/v1/jobs:import", content=archive, headers=headers, **options)

    def close(self) -> None:
        self.http.close()
        self.store.close()


@pytest.fixture
def sides(tmp_path, postgres_url):
    """A server on SQLite and one on Postgres."""
    found = {
        "sqlite": Side(f"sqlite:///{tmp_path / 'one' / 'probe.db'}", tmp_path / "one"),
        "postgres": Side(postgres_url, tmp_path / "two"),
    }
    yield found
    for side in found.values():
        side.close()


@pytest.fixture
def here(tmp_path):
    side = Side(f"sqlite:///{tmp_path / 'here' / 'probe.db'}", tmp_path / "here")
    yield side
    side.close()


@pytest.fixture
def there(tmp_path):
    side = Side(f"sqlite:///{tmp_path / 'there' / 'probe.db'}", tmp_path / "there")
    yield side
    side.close()


@pytest.fixture
def finish(spec, make_unit_result) -> Callable[..., str]:
    """Makes a job of two checkpoints of three, with retries and an error, end on a side."""

    def finish(side: Side, status: str = "ERROR", num_units: int = 2, **changes: Any) -> str:
        wanted = spec | {"priority": 200, "time_limit_s": 60.0, "labels": {"run": "7"}} | changes
        job_id = side.http.post("/v1/jobs", json=wanted).json()["id"]
        side.store.mark_running(job_id, "w")
        units = side.store.get_plan(job_id).units
        for unit in units[:num_units]:
            side.store.append_event(job_id, "unit.progress", {"index": unit.index})
            result = make_unit_result(unit.index, unit.checkpoint.step)
            side.store.record_unit(job_id, result.model_copy(update={"unit": unit}))
        if status == "ERROR":
            failed = {"code": "unit_crashed", "message": "why\nä", "unit_id": units[2].unit_id}
            side.store.record_error(job_id, JobError(**failed))
        end(side, job_id, status)
        return job_id

    return finish


def end(side: Side, job_id: str, status: str) -> None:
    workflows = queue.workflow_status_table(side.store.engine)
    with side.store.engine.begin() as connection:
        values = {"status": status, "completed_at": sa.literal_column("updated_at")}
        own = workflows.c.workflow_uuid == job_id
        connection.execute(sa.update(workflows).where(own).values(**values))
    side.store.settle(job_id)


def answers(side: Side, job_id: str) -> dict[str, tuple[int, bytes]]:
    found = {part: side.http.get(f"/v1/jobs/{job_id}/{part}") for part in ANSWERS}
    return {part: (answer.status_code, answer.content) for part, answer in found.items()}


@pytest.mark.postgres
@pytest.mark.parametrize(("source", "target"), [("sqlite", "postgres"), ("postgres", "sqlite")])
def test_an_imported_job_answers_as_the_original_on_the_other_database(
    sides, source, target, finish, tmp_path
):
    from_side, to_side = sides[source], sides[target]
    job_id = finish(from_side)
    path, manifest = export_job(from_side.probe, job_id, tmp_path / "out")
    assert path == tmp_path / "out" / job_id
    assert {p.name for p in path.iterdir()} == {*manifest.files, "manifest.json"}
    assert set(manifest.files) == {
        *("job.json", "results.json", "results.parquet", "events.jsonl"),
        *("chart.svg", "chart.png", "chart.vl.json"),
    }
    before = answers(from_side, job_id)
    assert before["results"][1] == (path / "results.json").read_bytes()
    assert before["event-log"][1] == (path / "events.jsonl").read_bytes()

    job, created = import_job(to_side.probe, path)
    assert (job.id, created, job.status) == (job_id, True, "failed")
    assert job.imported_at is not None
    assert answers(to_side, job_id) == before
    original = from_side.http.get(f"/v1/jobs/{job_id}").json()
    for shown in (
        to_side.http.get(f"/v1/jobs/{job_id}").json(),
        *to_side.http.get("/v1/jobs?status=failed&label=run=7").json()["data"],
    ):
        assert shown.pop("imported_at") is not None
        assert shown == {k: v for k, v in original.items() if k != "imported_at"}
    assert to_side.http.get("/v1/jobs?status=queued").json()["data"] == []
    assert to_side.store.count_jobs()["failed"] == 1
    assert original["name"] in to_side.http.get("/").text
    assert "unit_crashed" in to_side.http.get(f"/jobs/{job_id}").text

    # From there it can go on, byte for byte, and come back to where it is known.
    again, _ = export_job(to_side.probe, job_id, tmp_path / "again")
    for name in ("results.json", "events.jsonl", "results.parquet", "chart.svg"):
        assert (again / name).read_bytes() == (path / name).read_bytes()
    assert import_job(from_side.probe, again)[1] is False


def test_an_imported_job_is_never_run_cancelled_or_estimated_from(here, there, finish, tmp_path):
    job_id = finish(here, "SUCCESS", 3)
    import_job(there.probe, export_job(here.probe, job_id, tmp_path)[0])
    assert there.store.cancel_job(job_id).status == "succeeded"
    there.store.settle_all()
    workflows = queue.workflow_status_table(there.store.engine)
    with there.store.engine.connect() as connection:
        assert connection.execute(sa.select(workflows)).all() == []
    assert len(there.store.events_after(job_id, 0)) == len(here.store.events_after(job_id, 0))
    # Where it ran is no measure for this machine.
    assert there.store.get_job(job_id).started_at is not None
    assert there.http.get("/v1/workers").json()["data"] == []


def test_the_same_again_changes_nothing_and_other_contents_are_refused(
    here, there, finish, tmp_path
):
    job_id = finish(here)
    path, _ = export_job(here.probe, job_id, tmp_path)
    first = there.send(pack(path))
    again = there.send(pack(path))
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert first.headers["location"] == f"/v1/jobs/{job_id}"
    assert here.send(pack(path)).status_code == 200  # where it ran
    other = changed(
        path, tmp_path / "other", "job.json", lambda j: j["view"]["error"].update(code="x")
    )
    for side in (here, there):
        refused = side.send(pack(other))
        assert (refused.status_code, refused.json()["code"]) == (409, "job_exists")
    assert there.http.get(f"/v1/jobs/{job_id}").json()["error"]["code"] == "unit_crashed"


def test_a_job_that_has_not_ended_is_exported_only_in_part_and_not_imported(
    here, there, finish, tmp_path
):
    job_id = finish(here, "PENDING", 1)
    with pytest.raises(ExportError, match="is running: wait for its end"):
        export_job(here.probe, job_id, tmp_path)
    path, manifest = export_job(here.probe, job_id, tmp_path, partial=True)
    assert (manifest.complete, "chart.svg" in manifest.files) == (False, True)
    with pytest.raises(ExportError, match="had not ended"):
        import_job(there.probe, path)
    refused = there.send(pack(path))
    assert (refused.status_code, refused.json()["code"]) == (422, "export_incomplete")
    # Nor when the manifest lies.
    lying = changed(path, tmp_path / "lying", "manifest.json", lambda m: m.update(complete=True))
    refused = there.send(pack(lying))
    assert (refused.status_code, refused.json()["code"]) == (422, "export_invalid")
    assert "only ended ones" in refused.json()["detail"]


def test_a_job_without_results_is_exported_without_charts(here, there, finish, tmp_path):
    job_id = finish(here, "CANCELLED", 0)
    path, manifest = export_job(here.probe, job_id, tmp_path)
    assert set(manifest.files) == {"job.json", "results.json", "events.jsonl"}
    assert import_job(there.probe, path)[0].status == "cancelled"
    with pytest.raises(ExportError, match="is there already"):
        export_job(here.probe, job_id, tmp_path)
    assert [p.name for p in tmp_path.glob(".job*")] == []


def test_what_was_changed_on_the_way_is_not_sent(here, there, finish, tmp_path):
    path, _ = export_job(here.probe, finish(here), tmp_path)
    assert exports_in(tmp_path) == exports_in(path) == [path]
    for name in ("results.parquet", "results.json"):
        original = (path / name).read_bytes()
        (path / name).write_bytes(original + b" ")
        with pytest.raises(ExportError, match=f"{name} is not the file"):
            import_job(there.probe, path)
        (path / name).write_bytes(original)
    (path / "events.jsonl").unlink()
    with pytest.raises(ExportError, match="No such file"):
        import_job(there.probe, path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="holds no exported job"):
        exports_in(tmp_path / "empty")
    assert there.http.get("/v1/jobs").json()["data"] == []


def pack(path: Path, names: tuple[str, ...] = ARCHIVED) -> bytes:
    return tar([(name, (path / name).read_bytes()) for name in names])


def tar(members: list[tuple[str, bytes]], **fields: Any) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in fields.items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def changed(path: Path, target: Path, name: str, change: Callable[[Any], Any]) -> Path:
    """A copy with one file changed, its manifest to match."""
    text = (path / name).read_text()
    if name == "events.jsonl":
        lines = [json.loads(line) for line in text.splitlines()]
        change(lines)
        return rewritten(path, target, name, "".join(json.dumps(line) + "\n" for line in lines))
    value = json.loads(text)
    change(value)
    return rewritten(path, target, name, json.dumps(value))


def rewritten(path: Path, target: Path, name: str, text: str) -> Path:
    """A copy with one file's text replaced, its manifest to match."""
    shutil.copytree(path, target)
    (target / name).write_text(text)
    if name != "manifest.json":
        manifest = json.loads((target / "manifest.json").read_text())
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        manifest["files"][name] = {"sha256": sha256, "num_bytes": len(text.encode())}
        (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def drop_last(values: list[Any]) -> None:
    values.pop()


# File, what is done to it, and what the refusal says.
FORGERIES: list[tuple[str, Callable[[Any], Any], str]] = [
    ("job.json", lambda j: j["view"].update(kind="pickle"), "kind"),
    ("job.json", lambda j: j["view"]["spec"].update(kind="pickle"), "kind"),
    ("job.json", lambda j: j["view"].update(id="../../etc/passwd"), "job.json is of job"),
    ("job.json", lambda j: j["view"].update(id="job_" + "0" * 26), "job.json is of job"),
    ("job.json", lambda j: j["view"].update(status="running"), "status must be 'running'"),
    ("job.json", lambda j: j["view"].update(status="succeeded"), "status"),
    ("job.json", lambda j: j["view"].update(status="done"), "view.status"),
    ("job.json", lambda j: j["view"].update(name="another"), "name"),
    ("job.json", lambda j: j["view"].update(labels={"run": "8"}), "labels"),
    ("job.json", lambda j: j["view"].update(priority=1), "priority"),
    ("job.json", lambda j: j["view"].update(queue="cpu"), "queue"),
    ("job.json", lambda j: j["view"].update(finished_at=None), "finished_at"),
    ("job.json", lambda j: j["view"].update(finished_at="2020-01-01T00:00:00Z"), "out of order"),
    ("job.json", lambda j: j["view"].update(finished_at="2999-01-01T00:00:00"), "zone"),
    ("job.json", lambda j: j["view"].update(error=None), "error"),
    ("job.json", lambda j: j["view"]["error"].update(code="x" * 65), "error_code has 65"),
    ("job.json", lambda j: j["view"].update(submitted_by="x" * 101), "submitted_by has 101"),
    ("job.json", lambda j: j["view"].update(queue_position=1), "queue_position"),
    ("job.json", lambda j: j["view"].update(worker="w"), "worker"),
    ("job.json", lambda j: j["view"].update(finished_at="2999-01-01T00:00:00.0001Z"), "finished"),
    ("job.json", lambda j: j["view"].update(finished_at="9999-12-31T23:59:59-14:00"), "years"),
    ("job.json", lambda j: j["view"].update(created_at="0001-01-01T00:00:00+14:00"), "years"),
    ("job.json", lambda j: j["view"]["spec"].update(webhook="https://a.example/x"), "webhook"),
    ("job.json", lambda j: j["view"].update(num_units=2), "num_units"),
    ("job.json", lambda j: j["view"].update(num_units_finished=3), "num_units_finished"),
    ("job.json", lambda j: j["view"].update(num_forward_passes=1), "num_forward_passes"),
    ("job.json", lambda j: j["view"].update(spec_sha256="0" * 64), "spec_sha256"),
    ("job.json", lambda j: j["view"]["spec"].update(priority="first"), "priority"),
    ("job.json", lambda j: j["view"]["spec"].update(extra=1), "extra"),
    ("job.json", lambda j: j["view"].update(name="a\0b"), "NUL"),
    ("job.json", lambda j: j["plan"].update(kind="mix_scan"), "plan.kind"),
    ("job.json", lambda j: drop_last(j["plan"]["units"]), "num_units"),
    ("job.json", lambda j: j["plan"]["units"][0].update(index=5), "unit indices"),
    ("job.json", lambda j: j.pop("plan"), "plan"),
    ("results.json", lambda r: r["data"].append(r["data"][0]), "each once"),
    ("results.json", lambda r: r["data"].reverse(), "in order"),
    ("results.json", lambda r: r["data"][0]["unit"].update(unit_id="x"), "unit of a result"),
    ("results.json", lambda r: r["data"][0]["unit"].update(index=99), "each once"),
    ("results.json", lambda r: r["data"][0].update(kind="mix_scan"), "results.json"),
    ("results.json", lambda r: r["data"][0].update(measurements="none"), "measurements"),
    ("results.json", lambda r: r["data"][0].update(num_forward_passes=-5), "num_forward_passes"),
    ("results.json", lambda r: r.update(data={}), "list `data`"),
    ("results.json", lambda r: r.update(job_id="job_x"), "job_id must be"),
    ("results.json", lambda r: r.update(status="succeeded"), "status must be"),
    ("events.jsonl", drop_last, "closing events"),
    ("events.jsonl", lambda e: e.append(e[-1]), "event ids"),
    ("events.jsonl", lambda e: e[1].update(id=7), "event ids"),
    ("events.jsonl", lambda e: e[0].update(type="job.exploded"), "line 1: type"),
    ("events.jsonl", lambda e: e[1].update(type="job.failed"), "closing events"),
    ("events.jsonl", lambda e: e[-1].update(type="job.succeeded"), "the last event"),
    ("events.jsonl", lambda e: e[0].update(at="2026-01-01T00:00:00"), "zone"),
    ("events.jsonl", lambda e: e[0].update(at="0001-01-01T00:00:00+14:00"), "years"),
    ("events.jsonl", lambda e: e[1].update(at="9999-12-31T23:59:59-14:00"), "years"),
    ("events.jsonl", lambda e: e.clear(), "closing events"),
    ("manifest.json", lambda m: m.update(format_version=2), "format_version"),
    ("manifest.json", lambda m: m.update(object="zip"), "object"),
    ("manifest.json", lambda m: m.update(job_id="job_1"), "job_id"),
    ("manifest.json", lambda m: m["files"].pop("job.json"), "does not list job.json"),
    ("manifest.json", lambda m: m["files"].update({"../../x": m["files"]["job.json"]}), "files"),
    ("manifest.json", lambda m: m["files"].update({"/etc/x": m["files"]["job.json"]}), "files"),
    ("manifest.json", lambda m: m["files"]["job.json"].update(sha256="0" * 64), "has sha256"),
    ("manifest.json", lambda m: m["files"]["job.json"].update(num_bytes=1), "bytes, the manifest"),
    ("manifest.json", lambda m: m["files"]["job.json"].update(sha256="x"), "sha256"),
]


def test_nothing_that_does_not_fit_together_is_taken(here, there, finish, tmp_path):
    path, _ = export_job(here.probe, finish(here), tmp_path / "out")
    taken = []
    for number, (name, change, message) in enumerate(FORGERIES):
        forged = changed(path, tmp_path / f"forged-{number}", name, change)
        told = there.send(pack(forged)).json()
        codes = ("export_invalid", "export_hash_mismatch", "config_error")
        right = told.get("status") == 422 and told["code"] in codes and message in told["detail"]
        taken += [] if right else [(number, name, message, told)]
    assert taken == []
    assert there.http.get("/v1/jobs").json()["data"] == []
    with there.store.engine.connect() as connection:
        for table in ("jobs", "job_labels", "unit_results", "events"):
            assert connection.scalar(sa.text(f"SELECT count(*) FROM {table}")) == 0
    beyond = (path / "events.jsonl").read_text().replace('"data":{}', '"data":{"x":1e999}', 1)
    told = there.send(pack(rewritten(path, tmp_path / "beyond", "events.jsonl", beyond))).json()
    assert (told["status"], told["code"]) == (422, "export_invalid")
    assert "beyond what 64 bits hold" in told["detail"]
    # What an event says beside is for people: odd values are kept, and break nothing.
    odd = changed(path, tmp_path / "odd", "events.jsonl", lambda e: e[3]["data"].update(index=[]))
    assert there.send(pack(odd)).status_code == 201
    assert there.http.get("/jobs/" + path.name).status_code == 200


def test_archives_that_are_none_or_hold_other_things_are_refused(here, there, finish, tmp_path):
    path, _ = export_job(here.probe, finish(here), tmp_path / "out")
    members = [(name, (path / name).read_bytes()) for name in ARCHIVED]
    sparse = tar(members, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
    bodies = [
        b"",
        b"not a tar archive" * 100,
        pack(path)[:700],
        pack(path, ARCHIVED[:3]),
        tar([*members, ("../../../tmp/x", b"x")]),
        tar([*members, ("/etc/cron.d/x", b"x")]),
        tar([*members, ("results.parquet", b"x")]),
        tar([*members, members[1]]),
        tar([("./job.json", members[1][1]), *members]),
        tar(members, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        tar(members, type=tarfile.LNKTYPE, linkname="job.json"),
        tar(members, type=tarfile.FIFOTYPE),
        tar(members, type=tarfile.DIRTYPE),
        tar([(name, b"[" * 100_000) for name in ARCHIVED]),
        tar([(name, b"\xff\xfe") for name in ARCHIVED]),
        tar([(name, b'{"a": 1e999}') for name in ARCHIVED]),
        tar([(name, b"NaN") for name in ARCHIVED]),
    ]
    for number, body in enumerate(bodies):
        told = there.send(body).json()
        assert (told.get("status"), told["code"]) == (422, "export_invalid"), f"{number}: {told}"
    assert there.send(sparse).status_code in (201, 422)  # the headers mean nothing in this place
    headers = {"Content-Type": "application/json"}
    wrong = there.http.post("/v1/jobs:import", content=b"{}", headers=headers)
    assert (wrong.status_code, wrong.json()["code"]) == (415, "unsupported_media_type")


def test_a_sparse_file_is_not_unfolded(there):
    header = tarfile.TarInfo("manifest.json")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 0
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"%011o\0" % (1 << 32)  # what it would unfold to: 4 GiB
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:512]))
    told = there.send(bytes(block) + bytes(1024)).json()
    assert (told["status"], told["code"]) == (422, "export_invalid")
    assert "plain files" in told["detail"]


def test_an_export_larger_than_allowed_is_refused_by_header_and_by_count(tmp_path):
    side = Side(f"sqlite:///{tmp_path / 'probe.db'}", tmp_path, max_import_bytes=2048)
    chunks = (b"x" * 1000 for _ in range(5))  # no Content-Length
    for body in (b"x" * 2049, chunks):
        told = side.send(body).json()
        assert (told["status"], told["code"]) == (413, "body_too_large")
        assert "PROBE_MAX_IMPORT_BYTES" in told["detail"]
    assert side.send(b"x" * 2048).status_code == 422
    side.close()


def test_what_is_too_large_is_not_read_to_its_end():
    taken = []

    class Endless:
        headers: ClassVar[dict[str, str]] = {}

        async def stream(self):
            while True:
                taken.append(1000)
                yield b"x" * 1000

    file = io.BytesIO()
    with pytest.raises(ProblemError, match="2,048 bytes"):
        asyncio.run(_receive(Endless(), file, 2048))
    assert (sum(taken), len(file.getvalue())) == (3000, 2000)


def test_importing_takes_a_key_of_scope_admin(tmp_path):
    side = Side(f"sqlite:///{tmp_path / 'probe.db'}", tmp_path, api_keys=["the-admin-key"])
    assert side.send(b"").status_code == 401
    side.http.headers["Authorization"] = "Bearer the-admin-key"
    assert side.send(b"").status_code == 422
    side.close()


def test_the_event_log_goes_on_over_pages(here, finish):
    job_id = finish(here, "PENDING", 0)
    rows = [
        {"job_id": job_id, "seq": seq, "type": "unit.progress", "at": seq, "data": {}}
        for seq in range(3, 1103)  # more than a page of the store
    ]
    with here.store.engine.begin() as connection:
        connection.execute(sa.insert(events), rows)
    lines = here.http.get(f"/v1/jobs/{job_id}/event-log").text.splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(range(1, 1103))


@pytest.fixture
def run(here, there, monkeypatch):
    """Runs `probe` against the server here, or there with `--server there`."""
    sides = {None: here, "there": there}

    def connected(url: str | None = None) -> ProbeClient:
        return ProbeClient(LOOPBACK, transport=httpx.MockTransport(sides[url]._answer))

    monkeypatch.setattr("clients.http.ProbeClient", connected)
    monkeypatch.delenv("PROBE_SERVER", raising=False)
    return lambda *words: CliRunner().invoke(commands, [str(word) for word in words])


def test_the_commands_move_jobs_from_server_to_server(run, here, there, finish, tmp_path):
    ids = [finish(here), finish(here, "CANCELLED", 0)]
    out = tmp_path / "exported"
    done = run("export", ids[0], ids[1][-8:], "--out", out, "--json")
    assert done.exit_code == 0, done.stderr
    assert [Path(entry["path"]) for entry in json.loads(done.stdout)["data"]] == [
        out / job_id for job_id in ids
    ]
    assert "8 files" in done.stderr
    first = run("import", out, "--server", "there")
    assert first.stdout.split() == ids
    assert first.stderr.count(": imported") == 2
    again = run("import", out / ids[1], "--server", "there", "--json")
    assert [job["id"] for job in json.loads(again.stdout)["data"]] == [ids[1]]
    assert "was there already" in again.stderr
    listed = run("list", "--server", "there", "--json")
    assert [job["id"] for job in json.loads(listed.stdout)["data"]] == ids[::-1]
    assert "imported" in run("show", ids[0], "--server", "there").stdout


def test_the_commands_say_what_is_wrong(run, here, finish, tmp_path):
    running = finish(here, "PENDING", 1)
    done = run("export", running, "--out", tmp_path / "out")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--partial" in done.stderr
    assert run("export", running, "--partial", "--out", tmp_path / "out").exit_code == 0
    refused = run("import", tmp_path / "out", "--server", "there")
    assert refused.exit_code == 2
    assert "had not ended" in refused.stderr
    nothing = run("import", tmp_path / "nowhere")
    assert nothing.exit_code == 2
    assert "holds no exported job" in nothing.stderr
    (tmp_path / "file").touch()
    full = run("export", finish(here), "--out", tmp_path / "file")
    assert full.exit_code == 2
    assert "cannot write" in full.stderr
