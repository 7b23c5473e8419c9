"""The event stream: every event once, in order, also across a broken connection."""

import asyncio
import itertools
import subprocess
import sys
import threading
import time

import httpx
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from server import event_reads, tables
from server.api import event_hub
from tests.server.conftest import database_url  # noqa: F401 (on both databases)

DEADLINE_S = 30


def parse(lines):
    """(id, type) of every event in the lines of a stream."""
    events, current = [], {}
    for line in lines:
        if not line and current:
            events.append((int(current["id"]), current["event"]))
            current = {}
        elif ": " in line and not line.startswith(":"):
            name, value = line.split(": ", 1)
            current[name] = value
    return events


def read(url, *, last_event_id=None, stop_after=None):
    """Events until the stream ends, or until enough have come."""
    headers = {} if last_event_id is None else {"Last-Event-ID": str(last_event_id)}
    lines = []
    with httpx.stream("GET", url, headers=headers, timeout=DEADLINE_S) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            lines.append(line)
            if stop_after is not None and len(parse(lines)) == stop_after:
                break
    return parse(lines)


def add_units(store, job_id, count):
    for index in range(count):
        store.append_event(job_id, "unit.started", {"unit_id": str(index), "index": index})


def test_a_broken_stream_goes_on_with_last_event_id(served, store, submitted, end_job):
    url = f"{served}/v1/jobs/{submitted}/events"
    add_units(store, submitted, 4)  # after job.queued: ids 2 to 5
    first = read(url, stop_after=3)
    writer = threading.Thread(
        target=lambda: (add_units(store, submitted, 3), end_job(submitted)), daemon=True
    )
    writer.start()
    rest = read(url, last_event_id=first[-1][0])
    writer.join()
    assert [number for number, _ in first + rest] == list(range(1, 10))
    assert rest[-1] == (9, "job.succeeded")
    assert [kind for _, kind in first + rest].count("unit.started") == 7


def test_each_event_comes_once_while_the_job_goes_on_and_the_stream_ends_with_it(
    served, store, submitted, end_job
):
    with httpx.stream(
        "GET", f"{served}/v1/jobs/{submitted}/events", timeout=DEADLINE_S
    ) as response:
        lines = response.iter_lines()
        numbers = (int(line[4:]) for line in lines if line.startswith("id: "))
        assert next(numbers) == 1  # job.queued
        for expected in (2, 3, 4):  # each written only after the one before has been read
            add_units(store, submitted, 1)
            assert next(numbers) == expected
        end_job(submitted)
        assert list(numbers) == [5]


def test_the_header_wins_over_after(client, store, submitted, end_job):
    add_units(store, submitted, 3)
    end_job(submitted)
    url = f"/v1/jobs/{submitted}/events"
    numbers = [n for n, _ in parse(client.get(f"{url}?after=2").text.splitlines())]
    assert numbers == [3, 4, 5]
    answer = client.get(f"{url}?after=2", headers={"Last-Event-ID": "4"})
    assert [n for n, _ in parse(answer.text.splitlines())] == [5]


@pytest.mark.parametrize("after", [2, 3, 10**18])
def test_nothing_left_is_204_so_that_browsers_stop_asking(client, submitted, after):
    client.post(f"/v1/jobs/{submitted}/cancel")  # job.queued, job.cancelled
    answer = client.get(f"/v1/jobs/{submitted}/events?after={after}")
    assert (answer.status_code, answer.content) == (204, b"")


def test_a_silent_stream_sends_heartbeats(served, submitted):
    with httpx.stream(
        "GET", f"{served}/v1/jobs/{submitted}/events?after=1", timeout=DEADLINE_S
    ) as response:
        lines = response.iter_lines()
        assert next(line for line in lines if line.startswith(":"))


def test_a_reader_that_leaves_frees_its_stream(served, store, submitted, monkeypatch):
    asked = []
    real = store.news

    def counted(*args, **kwargs):
        asked.append(time.monotonic())
        return real(*args, **kwargs)

    monkeypatch.setattr(store, "news", counted)
    url = f"{served}/v1/jobs/{submitted}/events"
    with httpx.stream("GET", url, timeout=DEADLINE_S) as response:
        lines = response.iter_lines()  # held: the stream ends with it
        deadline = time.monotonic() + DEADLINE_S
        while len(asked) < 3:
            next(lines)  # heartbeats
            assert time.monotonic() < deadline
    # Gone once a second passes without a look; while open there are fifty.
    while time.monotonic() - asked[-1] < 1.0:
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)


def test_all_streams_share_one_look_and_each_gets_every_event_once(
    app, served, store, submitted, end_job, client, spec, monkeypatch
):
    other = client.post("/v1/jobs", json=spec).json()["id"]
    looks = []
    real = store.news

    def counted(known):
        begin = time.monotonic()
        news = real(known)
        looks.append((begin, time.monotonic(), len(known)))
        return news

    monkeypatch.setattr(store, "news", counted)
    found = {}

    def follow(number, job_id, after):
        found[number] = [
            event for event, _ in read(f"{served}/v1/jobs/{job_id}/events", last_event_id=after)
        ]

    asked = [(job_id, after) for job_id in (submitted, other) for after in range(10)]
    threads = [threading.Thread(target=follow, args=(n, *what)) for n, what in enumerate(asked)]
    for thread in threads:
        thread.start()
    feeds, deadline = app.state.event_hub._feeds, time.monotonic() + DEADLINE_S
    while sum(feed.num_streams for feed in list(feeds.values())) < len(asked):
        assert time.monotonic() < deadline  # a stream that comes late begins another look
        time.sleep(0.01)
    add_units(store, submitted, 30)
    add_units(store, other, 30)
    for job_id in (submitted, other):
        end_job(job_id)
    for thread in threads:
        thread.join(DEADLINE_S)
    for number, (_, after) in enumerate(asked):
        assert found[number] == list(range(after + 1, 33))
    # Not one for each of twenty streams: one after the other, and all jobs in one. A pause of
    # uvloop's is counted from when the loop last read the clock, so some are shorter than asked.
    pairs = list(itertools.pairwise(sorted(looks)))
    assert all(begin >= end for (_, end, _), (begin, _, _) in pairs)
    assert len(pairs) < 5 * (looks[-1][0] - looks[0][0]) / 0.02
    assert max(num_jobs for _, _, num_jobs in looks) == 2


def test_a_stream_that_is_behind_what_is_kept_reads_the_rest_itself(
    served, store, submitted, end_job, monkeypatch
):
    monkeypatch.setattr(event_hub, "_KEPT", 5)
    monkeypatch.setattr(event_reads, "_LIMIT", 7)
    url = f"{served}/v1/jobs/{submitted}/events"
    with httpx.stream("GET", url, timeout=DEADLINE_S) as response:
        lines = response.iter_lines()
        numbers = (int(line[4:]) for line in lines if line.startswith("id: "))
        assert next(numbers) == 1
        add_units(store, submitted, 40)
        end_job(submitted)
        assert list(numbers) == list(range(2, 43))


def test_streams_outlive_a_database_that_is_away(served, store, submitted, end_job, monkeypatch):
    monkeypatch.setattr(event_hub, "_PAUSE_AFTER_ERROR_S", 0.02)
    real, failed = store.news, threading.Event()

    def fail(known):
        failed.set()
        raise OperationalError("select 1", {}, Exception("away"))

    with httpx.stream("GET", f"{served}/v1/jobs/{submitted}/events", timeout=DEADLINE_S) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "id: 1"
        monkeypatch.setattr(store, "news", fail)
        assert failed.wait(DEADLINE_S)
        monkeypatch.setattr(store, "news", real)
        add_units(store, submitted, 1)
        end_job(submitted)
        assert [line for line in lines if line.startswith("id: ")] == ["id: 2", "id: 3"]


def test_a_reader_that_names_an_id_too_high_is_let_go_at_the_end(
    served, store, submitted, end_job, monkeypatch
):
    """Of another database, or of this one before it was put back from a copy."""
    real, looked = store.news, threading.Semaphore(0)

    def look(known):
        found = real(known)
        looked.release()
        return found

    monkeypatch.setattr(store, "news", look)
    url = f"{served}/v1/jobs/{submitted}/events"
    with httpx.stream("GET", url, params={"after": 999}, timeout=DEADLINE_S) as response:
        assert all(
            looked.acquire(timeout=DEADLINE_S) for _ in range(2)
        )  # the second knows the last
        end_job(submitted)
        assert parse(response.iter_lines()) == []


def test_so_is_one_whose_job_ends_before_the_first_look(store, submitted, end_job):
    end_job(submitted)
    hub = event_hub.EventHub(store, poll_s=0.01)

    async def sent():
        async with asyncio.timeout(DEADLINE_S):
            return [content async for content in hub.stream(submitted, 999, [])]

    assert asyncio.run(sent()) == []


def test_the_last_event_is_sent_where_the_first_look_finds_it_before_the_stream_does(
    store, submitted, end_job, monkeypatch
):
    """The stream read for itself, found nothing new, and was told that all is known meanwhile."""
    real_after, real_news = store.events_after, store.news
    has_read, has_looked = threading.Event(), threading.Event()

    def after(*args):
        found = real_after(*args)
        has_read.set()
        assert has_looked.wait(DEADLINE_S)
        return found

    def news(known):
        assert has_read.wait(DEADLINE_S)
        if not has_looked.is_set():
            end_job(submitted)
        found = real_news(known)
        asyncio.get_running_loop().call_later(0.1, has_looked.set)  # once the feed knows
        return found

    async def read(call, *args):  # as the server's, a thread for each
        if call is not news:
            return await asyncio.to_thread(call, *args)
        assert await asyncio.to_thread(has_read.wait, DEADLINE_S)
        return news(*args)

    monkeypatch.setattr(store, "events_after", after)
    monkeypatch.setattr(store, "news", news)
    monkeypatch.setattr(event_hub, "read", read)
    first = real_after(submitted, 0)
    hub = event_hub.EventHub(store, poll_s=0.01)

    async def sent():
        async with asyncio.timeout(DEADLINE_S):
            parts = [content async for content in hub.stream(submitted, 0, first)]
        return parse(b"".join(parts).decode().splitlines())

    assert asyncio.run(sent()) == [(1, "job.queued"), (2, "job.succeeded")]


def test_the_stream_of_a_job_that_is_removed_ends(served, store, submitted):
    with httpx.stream("GET", f"{served}/v1/jobs/{submitted}/events", timeout=DEADLINE_S) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "id: 1"
        with store.engine.begin() as connection:
            connection.execute(sa.delete(tables.jobs).where(tables.jobs.c.id == submitted))
        assert not [line for line in lines if line.startswith("id: ")]


def test_many_open_streams_do_not_hold_up_other_requests(served, submitted):
    with httpx.Client(limits=httpx.Limits(max_connections=100)) as http:
        url = f"{served}/v1/jobs/{submitted}/events?after=1"
        open_streams = [http.stream("GET", url, timeout=DEADLINE_S) for _ in range(60)]
        for stream in open_streams:
            stream.__enter__()
        assert http.get(f"{served}/v1/jobs/{submitted}", timeout=DEADLINE_S).status_code == 200
        for stream in open_streams:
            stream.__exit__(None, None, None)


@pytest.mark.slow
def test_the_server_stops_in_time_with_a_stream_open(settings, store, client, spec, tmp_path):
    job_id = client.post("/v1/jobs", json=spec).json()["id"]
    log = tmp_path / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "server.api", "--port", "0"],
            env={"PROBE_DATABASE_URL": settings.database_url, "PATH": "/usr/bin:/bin"},
            stderr=out,
        )
    try:
        deadline = time.monotonic() + 60
        while "running on " not in log.read_text():
            assert server.poll() is None
            assert time.monotonic() < deadline
            threading.Event().wait(0.05)
        address = log.read_text().split("running on ")[1].split()[0]
        url = f"{address}/v1/jobs/{job_id}/events"
        with httpx.stream("GET", url, timeout=DEADLINE_S) as response:
            lines = response.iter_lines()  # held: the stream ends with it
            assert next(lines) == "id: 1"
            server.terminate()
            assert server.wait(timeout=DEADLINE_S) is not None
    finally:
        server.kill()
        server.wait()
