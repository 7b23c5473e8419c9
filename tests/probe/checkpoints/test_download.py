"""Downloads against a server that cuts, lies and changes: the file is whole, right, or not there.

Every content is made here; what must arrive is compared with it byte by byte.
"""

import base64
import hashlib
import os
import random
import subprocess
import sys
import threading

import pytest

from probe.checkpoints.download import NotThereError, Patience, check_url, download
from probe.errors import CheckpointError, CheckpointUnavailableError
from tests.probe.checkpoints.http_files import file_server, md5_etag

CONTENT = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PROBE_LOOPBACK_HTTP", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server():
    with file_server() as running:
        yield running


@pytest.fixture
def waits():
    return []


@pytest.fixture
def patience(waits):
    return Patience(tries=4, wait=waits.append)


def only_the_file(target):
    names = {path.name for path in target.parent.iterdir() if path.name != "cache"}
    return names == {target.name, f"{target.name}.json"}


def test_a_whole_file_and_its_own_sha256(server, tmp_path, patience):
    target = tmp_path / "f"
    done = download(server.add("/f", CONTENT), target, patience=patience)
    assert target.read_bytes() == CONTENT
    assert (done.num_bytes, done.sha256) == (300_000, hashlib.sha256(CONTENT).hexdigest())
    assert done.checked_by == "its length; the server states no checksum"
    assert only_the_file(target)


def test_the_second_time_nothing_is_asked(server, tmp_path):
    url = server.add("/f", CONTENT, etag=md5_etag(CONTENT))
    first = download(url, tmp_path / "f")
    assert download(url, tmp_path / "f") == first
    assert server.paths() == ["/f"]


def test_a_cut_connection_goes_on_where_it_was_cut(server, tmp_path, patience, waits):
    url = server.add("/f", CONTENT, etag=md5_etag(CONTENT), cut_after=[100_000, 50_000])
    download(url, tmp_path / "f", patience=patience)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert [r for _, r in server.requests] == [None, "bytes=100000-", "bytes=150000-"]
    assert len(waits) == 2


def test_a_killed_process_leaves_a_part_that_the_next_one_continues(server, tmp_path):
    url = server.add("/f", CONTENT, etag=md5_etag(CONTENT), cut_after=[120_000])
    code = (
        "import sys, os; from pathlib import Path\n"
        "from probe.checkpoints.download import download, Patience\n"
        "kill = lambda s: os.kill(os.getpid(), 9)\n"
        "download(sys.argv[1], Path(sys.argv[2]), patience=Patience(wait=kill))\n"
    )
    target = tmp_path / "f"
    done = subprocess.run([sys.executable, "-c", code, url, str(target)], check=False, timeout=60)
    assert done.returncode == -9
    assert not target.exists()
    download(url, target)
    assert target.read_bytes() == CONTENT
    assert server.requests[-1] == ("/f", "bytes=120000-")
    assert only_the_file(target)


def test_a_file_that_changed_between_two_parts_is_begun_again(server, tmp_path):
    url = server.add("/f", CONTENT, etag='"v1"', cut_after=[100_000])

    def change(_):
        server.add("/f", OTHER, etag='"v2"')

    download(url, tmp_path / "f", patience=Patience(wait=change))
    assert (tmp_path / "f").read_bytes() == OTHER


def test_a_server_that_ignores_if_range_does_not_splice_two_files(server, tmp_path):
    url = server.add("/f", CONTENT, etag='"v1"', cut_after=[100_000])

    def change(_):
        server.add("/f", OTHER, etag='"v2"', ignore_if_range=True)

    download(url, tmp_path / "f", patience=Patience(wait=change))
    assert (tmp_path / "f").read_bytes() == OTHER


@pytest.mark.parametrize(
    "options",
    [
        {"etag": None},
        {"etag": 'W/"weak"'},
        {"ranges": False},
    ],
    ids=["no-validator", "weak", "no-ranges"],
)
def test_where_resuming_is_not_safe_the_file_begins_again(server, tmp_path, patience, options):
    url = server.add("/f", CONTENT, cut_after=[100_000], **options)
    download(url, tmp_path / "f", patience=patience)
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_date_is_enough_to_resume(server, tmp_path, patience):
    date = {"Last-Modified": "Tue, 26 Nov 2024 10:00:00 GMT"}
    url = server.add("/f", CONTENT, etag=None, headers=date, cut_after=[100_000])
    download(url, tmp_path / "f", patience=patience)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert server.requests[1] == ("/f", "bytes=100000-")


def test_a_part_longer_than_the_file_is_dropped(server, tmp_path, patience):
    url = server.add("/f", CONTENT, cut_after=[100_000])

    def shrink(_):
        server.add("/f", CONTENT[:50_000])  # the same ETag: a server that lies

    download(url, tmp_path / "f", patience=Patience(wait=shrink))
    assert (tmp_path / "f").read_bytes() == CONTENT[:50_000]


@pytest.mark.parametrize("status", [404, 410, 403])
def test_what_is_not_there_is_said_at_once(server, tmp_path, patience, waits, status):
    url = server.add("/f", CONTENT, statuses=[status])
    with pytest.raises(NotThereError, match=str(status)):
        download(url, tmp_path / "f", patience=patience)
    assert waits == []
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_tried_again(server, tmp_path, patience, waits, status):
    url = server.add("/f", CONTENT, statuses=[status, status])
    download(url, tmp_path / "f", patience=patience)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert 0.5 <= waits[0] <= 1
    assert 1 <= waits[1] <= 2


def test_retry_after_is_kept_to(server, tmp_path, patience, waits):
    url = server.add("/f", CONTENT, statuses=[503, 429], headers={"Retry-After": "7"})
    download(url, tmp_path / "f", patience=patience)
    assert waits == [7, 7]


def test_a_server_that_keeps_failing_is_given_up(server, tmp_path, patience, waits):
    url = server.add("/f", CONTENT, statuses=[503] * 9)
    with pytest.raises(CheckpointUnavailableError, match=r"4 tries.*503"):
        download(url, tmp_path / "f", patience=patience)
    assert len(waits) == 3


def test_progress_starts_the_count_of_tries_anew(server, tmp_path):
    url = server.add("/f", CONTENT, etag=md5_etag(CONTENT), cut_after=[10_000] * 12)
    download(url, tmp_path / "f", patience=Patience(tries=2, wait=lambda _: None))
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_nobody_listening_can_be_tried_later(tmp_path, patience):
    with file_server() as gone:
        url = f"{gone.url}/f"
    with pytest.raises(CheckpointUnavailableError, match="given up"):
        download(url, tmp_path / "f", patience=patience)


def b64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def md5(content: bytes) -> bytes:
    return hashlib.md5(content, usedforsecurity=False).digest()


CHECKSUMS = {
    "Repr-Digest": lambda c: f"sha-256=:{b64(hashlib.sha256(c).digest())}:",
    "Digest": lambda c: f"SHA-256={b64(hashlib.sha256(c).digest())}",
    "Content-MD5": lambda c: b64(md5(c)),
    "x-goog-hash": lambda c: f"crc32c=AAAAAA==,md5={b64(md5(c))}",
}


@pytest.mark.parametrize("header", CHECKSUMS)
def test_a_stated_checksum_is_checked(server, tmp_path, header):
    url = server.add("/f", CONTENT, headers={header: CHECKSUMS[header](CONTENT)})
    assert "the server's" in download(url, tmp_path / "f").checked_by
    assert server.paths() == ["/f"]


@pytest.mark.parametrize("header", CHECKSUMS)
def test_a_wrong_content_is_fetched_once_more_and_then_refused(server, tmp_path, header):
    url = server.add("/f", CONTENT, headers={header: CHECKSUMS[header](OTHER)})
    with pytest.raises(CheckpointError, match=r"found (md5|sha256) .* the server states .* twice"):
        download(url, tmp_path / "f")
    assert server.paths() == ["/f", "/f"]
    assert not list(tmp_path.glob("f*"))[1:]
    assert not (tmp_path / "f").exists()


def test_a_content_damaged_on_the_way_arrives_the_second_time(server, tmp_path):
    damaged = b"x" + CONTENT[1:]
    url = server.add("/f", damaged, then=CONTENT, headers={"Content-MD5": b64(md5(CONTENT))})
    download(url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert server.paths() == ["/f", "/f"]


def test_an_etag_that_only_looks_like_an_md5_does_not_refuse_a_good_file(server, tmp_path):
    url = server.add("/f", CONTENT, etag=f'"{"0" * 32}"')
    done = download(url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert done.checked_by == "its length; the server states no checksum"
    assert server.paths().count("/f") == 2


def test_a_sha256_file_beside_it_is_checked(server, tmp_path):
    url = server.add("/f", CONTENT)
    server.add("/f.sha256", f"{hashlib.sha256(CONTENT).hexdigest()}  f\n".encode())
    assert download(url, tmp_path / "f").checked_by == "the .sha256 file beside it"
    other = server.add("/g", CONTENT)
    server.add("/g.sha256", f"{hashlib.sha256(OTHER).hexdigest()}  g\n".encode())
    with pytest.raises(CheckpointError, match=r"g\.sha256 says"):
        download(other, tmp_path / "g")


def test_a_broken_file_by_the_callers_check_is_fetched_once_more(server, tmp_path):
    url = server.add("/f", CONTENT)

    def broken(_):
        raise CheckpointError("no header")

    with pytest.raises(CheckpointError, match="no header, twice in a row"):
        download(url, tmp_path / "f", check=broken)
    assert server.paths().count("/f") == 2
    assert not (tmp_path / "f").exists()


def test_room_is_asked_for_before_anything_is_written(server, tmp_path):
    asked = []

    def no_room(num_bytes):
        asked.append(num_bytes)
        raise CheckpointError("no room")

    with pytest.raises(CheckpointError, match="no room"):
        download(server.add("/f", CONTENT), tmp_path / "f", before=no_room)
    assert asked == [300_000]
    assert not (tmp_path / "f").exists()


def test_two_processes_fetch_one_file_once(server, tmp_path):
    gate = threading.Event()
    url = server.add("/f", CONTENT, etag=md5_etag(CONTENT), gate=gate)
    code = (
        "import sys; from pathlib import Path\n"
        "from probe.checkpoints.download import download\n"
        "print('began', flush=True); download(sys.argv[1], Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, url, str(tmp_path / "f")]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == b"began\n"
    server.wait_for(lambda: len(server.requests) == 1)
    gate.set()
    for child in children:
        child.communicate(timeout=60)
        assert child.returncode == 0
    assert server.paths() == ["/f"]
    assert (tmp_path / "f").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/f",
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "ftp://example.org/f",
        "https:///f",
    ],
)
def test_only_https_is_fetched(url, tmp_path):
    with pytest.raises(CheckpointError, match="only https is fetched"):
        download(url, tmp_path / "f")


def test_loopback_http_needs_the_setting(monkeypatch):
    check_url("http://127.0.0.1:8000/f")
    check_url("http://localhost/f")
    monkeypatch.delenv("PROBE_LOOPBACK_HTTP")
    with pytest.raises(CheckpointError, match="PROBE_LOOPBACK_HTTP"):
        check_url("http://127.0.0.1:8000/f")


def test_a_redirect_does_not_lead_around_the_rule(server, tmp_path, patience):
    url = server.add("/f", b"", redirect="http://169.254.169.254/latest/")
    with pytest.raises(CheckpointError, match="only https is fetched"):
        download(url, tmp_path / "f", patience=patience)


def test_a_full_disk_is_no_traceback(server, tmp_path):
    target = tmp_path / "gone" / "f"
    with pytest.raises(CheckpointError, match="cannot be written"):
        download(server.add("/f", CONTENT), target)
    assert os.listdir(tmp_path) == ["cache"]
