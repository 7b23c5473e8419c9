"""Removing ended jobs, on both databases: which ones go, what of them, and what never does."""

import datetime as dt
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from probe.errors import ConfigError
from server import prune, queue, retention, tables
from server.retention import Rules
from server.store import SqlStore
from server.tables import jobs, webhook_deliveries

ALL = Rules(statuses=("succeeded", "failed", "cancelled"))
DAY_S = 86400.0


def everywhere(engine, text):
    """Every table with a row that holds this text in some column, DBOS's tables included."""
    inspector = sa.inspect(engine)
    found = set()
    schemas = [None] if queue.is_sqlite(engine) else ["public", queue.DBOS_SCHEMA]
    with engine.connect() as connection:
        for schema in schemas:
            for name in inspector.get_table_names(schema=schema):
                table = sa.Table(name, sa.MetaData(), schema=schema, autoload_with=engine)
                holds = [sa.cast(column, sa.Text).contains(text) for column in table.columns]
                number = sa.select(sa.func.count()).select_from(table).where(sa.or_(*holds))
                if connection.scalar(number):
                    found.add(name)
    return found


@pytest.fixture
def client(store):
    client = queue.make_client(store.engine)
    yield client
    client.destroy()


@pytest.fixture
def ended(store, make_plan):
    """Makes a job that has ended; `days` ago by the database's clock."""

    def ended(status="SUCCESS", days=0.0, kind="checkpoint_series", **spec):
        plan = make_plan(1, **spec).model_copy(update={"kind": kind})
        job_id = store.create_job(plan=plan, idempotency_key=None, body_sha256="0")[0].id
        workflows = queue.workflow_status_table(store.engine)
        with store.engine.begin() as connection:
            own = workflows.c.workflow_uuid == job_id
            connection.execute(sa.update(workflows).where(own).values(status=status))
        if status not in ("ENQUEUED", "PENDING"):
            store.settle(job_id)
        with store.engine.begin() as connection:
            ago = tables.now_ms(store.engine) - int(days * DAY_S * 1000)
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(ended_at=ago))
        return job_id

    return ended


def picked(store, **rules):
    return [job.id for job in retention.candidates(store.engine, Rules(**rules))]


def test_a_job_goes_with_everything_while_the_others_run_on(lab):
    finished = lab.submit(labels={"project": "demo"})
    lab.start_worker()
    lab.until_status(finished, "succeeded")
    running = lab.submit({0: ["hold"]})
    lab.until_started(running, 0)
    queued = lab.submit()
    log = lab.data_dir / "logs" / f"{finished}.log"
    assert log.exists()
    before = everywhere(lab.store.engine, finished)
    assert {"jobs", "job_labels", "unit_results", "events"} <= before
    assert {"workflow_status", "operation_outputs"} <= before

    assert [job.id for job in retention.candidates(lab.store.engine, ALL)] == [finished]
    client = queue.make_client(lab.store.engine)
    # Also when it is asked to: what is queued or runs stays.
    asked = [finished, running, queued]
    removed = retention.remove(lab.store.engine, client, asked, Path("/nowhere"))
    assert (removed.num_jobs, removed.num_logs) == (1, 0)
    client.destroy()

    assert everywhere(lab.store.engine, finished) == set()
    assert lab.store.get_job(finished) is None
    lab.release(running)
    for job_id in (running, queued):
        assert lab.until_status(job_id, "succeeded", "failed").status == "succeeded"
        assert lab.job(job_id).num_units_finished == 3


def test_every_rule_has_to_pick_a_job(store, ended):
    old = ended(days=91, labels={"project": "demo", "run": "1"})
    failed = ended("ERROR", days=91, labels={"project": "demo", "run": "2"})
    young = ended(days=89)
    cancelled = ended("CANCELLED", days=200, kind="mix_scan")
    ended("ENQUEUED")
    ended("PENDING", days=300)
    assert picked(store, older_than_s=90 * DAY_S) == [old, failed, cancelled]
    assert picked(store, older_than_s=0.0) == [old, failed, young, cancelled]
    assert picked(store, older_than_s=1e30) == []  # fits no column
    assert picked(store, statuses=["failed", "cancelled"]) == [failed, cancelled]
    assert picked(store, kinds=["mix_scan"]) == [cancelled]
    assert picked(store, labels={"project": "demo"}) == [old, failed]
    assert picked(store, labels={"project": "demo", "run": "2"}) == [failed]
    assert picked(store, labels={"project": "demo"}, statuses=["succeeded"]) == [old]
    assert picked(store, labels={"project": "other"}) == []


def test_the_newest_of_every_name_stay(store, ended):
    a = [ended(name="a", days=100) for _ in range(4)]
    b = [ended("ERROR", name="b", days=100) for _ in range(2)]
    ended("ENQUEUED", name="a")  # has not ended: counts for nothing
    assert picked(store, keep_last=1) == [*a[:3], b[0]]
    assert picked(store, keep_last=3) == [a[0]]
    assert picked(store, keep_last=2, statuses=["failed"]) == []
    assert picked(store, keep_last=1, statuses=["succeeded"]) == a[:3]


def test_a_job_whose_end_has_yet_to_be_told_stays(store, ended, client, tmp_path):
    job_id = ended()
    with store.engine.begin() as connection:
        due = {"body": "{}", "created_at": 1, "num_attempts": 0, "next_attempt_at": 5}
        connection.execute(
            sa.insert(webhook_deliveries).values(id="d", job_id=job_id, url="u", **due)
        )
    assert picked(store, older_than_s=0.0) == []
    assert retention.remove(store.engine, client, [job_id], tmp_path).num_jobs == 0
    with store.engine.begin() as connection:
        connection.execute(sa.update(webhook_deliveries).values(next_attempt_at=None))
    assert picked(store, older_than_s=0.0) == [job_id]
    assert retention.remove(store.engine, client, [job_id], tmp_path).num_jobs == 1
    assert everywhere(store.engine, job_id) == set()


def test_a_removal_that_died_half_way_is_finished_by_the_next(
    store, ended, client, tmp_path, monkeypatch
):
    job_id, other = ended(), ended("ENQUEUED")

    def dies(_ids):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(client, "delete_workflows", dies)
        with pytest.raises(KeyboardInterrupt):
            retention.remove(store.engine, client, [job_id], tmp_path)
    assert "workflow_status" in everywhere(store.engine, job_id)
    assert [view.id for view in store.list_jobs()[0]] == [other]  # nobody sees half a job
    retention.remove(store.engine, client, [], tmp_path)
    assert everywhere(store.engine, job_id) == set()
    assert store.get_job(other).status == "queued"


def test_many_jobs_go_a_few_to_a_transaction(store, ended, client, tmp_path):
    ids = [ended() for _ in range(45)]
    (tmp_path / f"{ids[3]}.log").touch()
    (tmp_path / "worker-w.log").touch()
    commits = []
    sa.event.listen(store.engine, "commit", commits.append)
    removed = retention.remove(store.engine, client, ids, tmp_path)
    assert (removed.num_jobs, removed.num_logs) == (45, 1)
    assert len(commits) == 2 * 3  # 20, 20 and 5 jobs: our rows, then DBOS's
    assert [path.name for path in tmp_path.glob("*.log")] == ["worker-w.log"]
    assert store.list_jobs() == ([], False)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (Rules(), "no rule given"),
        (Rules(statuses=("running",)), "found status running, choose from cancelled, failed"),
        (Rules(older_than_s=-1.0), "cannot be negative"),
        (Rules(keep_last=-1), "cannot be negative"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(store, rules, message):
    with pytest.raises(ConfigError, match=message):
        retention.candidates(store.engine, rules)


def filled(store, make_plan, num_bytes=2_000_000):
    name = "x" * num_bytes
    plan = make_plan(1, name=name)
    job_id = store.create_job(plan=plan, idempotency_key=None, body_sha256="0")[0].id
    store.cancel_job(job_id)
    client = queue.make_client(store.engine)
    retention.shrink(store.engine)  # the journal goes into the file
    retention.remove(store.engine, client, [job_id], Path("/nowhere"))
    client.destroy()


def test_a_sqlite_file_shrinks_and_one_of_the_first_release_after_it_was_written_anew(
    tmp_path, make_plan
):
    path = tmp_path / "probe.db"
    store = SqlStore(f"sqlite:///{path}")
    filled(store, make_plan)
    assert retention.shrink(store.engine) >= 1_500_000
    store.close()

    old = tmp_path / "old.db"
    engine = sa.create_engine(f"sqlite:///{old}")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE something (x)")  # before anybody set a mode
    engine.dispose()
    store = SqlStore(f"sqlite:///{old}")
    filled(store, make_plan)
    assert retention.shrink(store.engine) == 0
    assert retention.shrink(store.engine, full=True) >= 1_500_000
    filled(store, make_plan)
    assert retention.shrink(store.engine) >= 1_500_000
    store.close()


def command(store, *words, data_dir):
    url = store.engine.url.render_as_string(hide_password=False)
    return prune.main([*words, "--database-url", url, "--data-dir", str(data_dir)])


def test_the_command_shows_asks_and_removes(store, ended, tmp_path, capsys, monkeypatch):
    ids = [ended(days=100, name=f"job {k}") for k in range(22)]
    with store.engine.connect() as connection:
        ended_ms = connection.scalar(sa.select(jobs.c.ended_at).where(jobs.c.id == ids[-1]))
    day = dt.datetime.fromtimestamp(ended_ms / 1000, dt.UTC)
    rules = ("--older-than-s", str(90 * DAY_S), "--status", "succeeded")
    assert command(store, *rules, "--dry-run", data_dir=tmp_path) == 0
    said = capsys.readouterr().out
    assert f"{ids[0]}  succeeded" in said
    assert "job 19" in said
    assert f"and 2 more, up to {day:%Y-%m}" in said
    assert "22 jobs: 22 succeeded" in said
    assert command(store, *rules, data_dir=tmp_path) == 2  # no terminal to ask
    assert "add --yes" in capsys.readouterr().err

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin.readline", lambda: "n\n", raising=False)
    assert command(store, *rules, data_dir=tmp_path) == 1
    assert len(store.list_jobs(limit=50)[0]) == 22
    monkeypatch.setattr("sys.stdin.readline", lambda: "y\n", raising=False)
    assert command(store, *rules, data_dir=tmp_path) == 0
    assert "removed 22 jobs and 0 logs" in capsys.readouterr().out
    assert store.list_jobs() == ([], False)


def test_the_command_finds_what_ended_while_nobody_looked(store, make_plan, tmp_path, capsys):
    job_id = store.create_job(plan=make_plan(1), idempotency_key=None, body_sha256="0")[0].id
    client = queue.make_client(store.engine)
    client.cancel_workflow(job_id)
    client.destroy()
    assert command(store, "--status", "cancelled", "--yes", "--json", data_dir=tmp_path) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["job_ids"], told["num_jobs"], told["dry_run"]) == ([job_id], 1, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no rule given"),
        (["--status", "queued"], "only jobs that have ended"),
        (["--label", "project"], "--label needs key=value"),
    ],
)
def test_wrong_words_are_code_2(store, tmp_path, capsys, words, message):
    assert command(store, *words, data_dir=tmp_path) == 2
    assert message in capsys.readouterr().err


def test_a_database_that_is_not_there_is_not_made(tmp_path, capsys):
    assert prune.main(["--status", "failed", "--data-dir", str(tmp_path / "typo")]) == 2
    assert "there is no database" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_probe_prune_runs_it(tmp_path, make_plan):
    store = SqlStore(f"sqlite:///{tmp_path / 'probe.db'}")
    job_id = store.create_job(plan=make_plan(1), idempotency_key=None, body_sha256="0")[0].id
    store.cancel_job(job_id)

    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "clients.cli.main", "prune", *words],
            env=os.environ | {"PROBE_DATA_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    kept = run("--older-than", "1d", "--status", "cancelled,failed", "--yes", "--json")
    assert json.loads(kept.stdout)["job_ids"] == []
    gone = run("--older-than", "0s", "--kind", "checkpoint_series", "--yes")
    assert (gone.returncode, gone.stderr) == (0, "")
    assert "removed 1 jobs" in gone.stdout
    assert store.get_job(job_id) is None
    assert run("--status", "running").returncode == 2
    store.close()
