"""One file by plain HTTP: resumed where a connection was cut, checked, whole or not there.

Bytes go to `<file>.part` beside `<file>.part.json`, which remembers whose they are, and the file
gets its name only when it is complete and every check passed. A resumed request carries
`If-Range`: a file that changed on the server between two parts is begun again, never spliced.
Only https is fetched; http reaches loopback addresses, and only where `PROBE_LOOPBACK_HTTP=1`.
"""

import ipaddress
import json
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from probe import __version__
from probe.checkpoints.checksums import Digests, etag_md5, sha256_in, stated_checksums
from probe.disk_cache import only_one
from probe.errors import CheckpointError, CheckpointUnavailableError
from probe.transport import is_transport_failure

logger = logging.getLogger(__name__)

LOOPBACK_HTTP = "PROBE_LOOPBACK_HTTP"
_ABSENT = (401, 403, 404, 410)  # object stores answer 403 for what is not there
_BLOCK = 1 << 20
_TIMEOUT = httpx.Timeout(60.0, connect=20.0)


class NotThereError(CheckpointError):
    """The server has no such file, or does not give it to everybody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a server that fails is tried again."""

    tries: int = 6  # in a row without a byte of progress
    first_wait_s: float = 1.0  # doubled each time, up to
    longest_wait_s: float = 60.0
    wait: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True, kw_only=True)
class Downloaded:
    """A complete file."""

    path: Path
    num_bytes: int
    sha256: str
    checked_by: str  # what vouched for its content, in words


def download(
    url: str,
    target: Path,
    *,
    check: Callable[[Path], None] | None = None,
    before: Callable[[int], None] | None = None,
    patience: Patience | None = None,
) -> Downloaded:
    """The file at `url`, in `target`; from there when it was fetched before.

    Args:
        url: https.
        target: Where to; its folder exists.
        check: Raises CheckpointError for a complete file that is broken all the same.
        before: Called with the bytes about to be written, once they are known.
        patience: With a server that does not answer.

    Returns:
        The file, with its sha256 and what it was checked against: the server's checksum where it
        states one, else its length and `check` alone.

    Raises:
        NotThereError: 404 and the like.
        CheckpointUnavailableError: The server did not answer in time, or keeps failing.
        CheckpointError: The content is broken, twice in a row; or the URL is refused.

    Cost: the download; one more request where the answer states no checksum.
    """
    check_url(url)
    with only_one(f"download {target.resolve()}"):
        known = _record(target.with_name(f"{target.name}.json"))
        same = known.get("url") == url and target.is_file()
        if same and target.stat().st_size == known.get("num_bytes"):
            return _downloaded(target, known)
        transfer = _Transfer(url, target, before, patience or Patience())
        try:
            with _client() as client:
                return transfer.run(client, check)
        except OSError as error:
            raise CheckpointError(f"{target}: cannot be written: {error.strerror}") from error
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise CheckpointError(f"{url}: {error}") from error


def check_url(url: str) -> None:
    """Refuse everything but https, and http to this machine where that is allowed.

    Raises:
        CheckpointError: It is something else.
    """
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    allowed = os.environ.get(LOOPBACK_HTTP) == "1"
    if not (parts.scheme == "http" and allowed and _is_loopback(parts.hostname or "")):
        raise CheckpointError(
            f"{url}: only https is fetched (http from loopback where {LOOPBACK_HTTP}=1)"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _client() -> httpx.Client:
    return httpx.Client(
        follow_redirects=True,
        timeout=_TIMEOUT,
        # identity: lengths, ranges and checksums are of the file itself
        headers={
            "Accept-Encoding": "identity",
            "User-Agent": f"sharpness-probe/{__version__}",
        },
        event_hooks={"request": [lambda request: check_url(str(request.url))]},  # redirects too
    )


class _TryAgainError(Exception):
    """This try brought nothing more; another one may."""

    def __init__(self, why: str, wait_s: float | None = None) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class _Transfer:
    """The bytes of one URL on their way into one file."""

    def __init__(
        self, url: str, target: Path, before: Callable[[int], None] | None, patience: Patience
    ) -> None:
        self._url, self._target, self._patience = url, target, patience
        self._before = before
        self._part = target.with_name(f"{target.name}.part")
        self._state = target.with_name(f"{target.name}.part.json")
        self._digests = Digests()
        self._headers: httpx.Headers = httpx.Headers()

    def run(self, client: httpx.Client, check: Callable[[Path], None] | None) -> Downloaded:
        seen: set[str] = set()
        while True:
            self._fetch(client)
            sha256 = self._digests.sha256
            try:
                checked_by = self._verify(client, agreed=sha256 in seen)
                if check is not None:
                    check(self._part)
                break
            except CheckpointError as error:
                self._part.unlink(missing_ok=True)
                if seen:
                    raise CheckpointError(f"{self._url}: {error}, twice in a row") from error
                logger.warning("%s: %s; fetched again", self._url, error)
                seen.add(sha256)
        record = {
            "url": self._url,
            "num_bytes": self._digests.num_bytes,
            "sha256": sha256,
            "checked_by": checked_by,
        }
        _write_json(self._target.with_name(f"{self._target.name}.json"), record)
        self._part.replace(self._target)
        self._state.unlink(missing_ok=True)
        return _downloaded(self._target, record)

    def _fetch(self, client: httpx.Client) -> None:
        """Bring the part to its full length, over as many connections as it takes."""
        failures = 0
        while True:
            begin = self._resume()
            try:
                self._receive(client, begin)
                return
            except (_TryAgainError, httpx.TransportError) as error:
                arrived = self._part.stat().st_size if self._part.exists() else 0
                failures = 1 if arrived > begin else failures + 1
                if failures >= self._patience.tries:
                    raise CheckpointUnavailableError(
                        f"{self._url}: given up after {failures} tries: {error or type(error)}"
                    ) from error
                wait_s = getattr(error, "wait_s", None)
                self._patience.wait(self._wait_s(failures) if wait_s is None else wait_s)

    def _wait_s(self, failures: int) -> float:
        longest = self._patience.first_wait_s * 2.0 ** (failures - 1)
        return min(longest, self._patience.longest_wait_s) * random.uniform(0.5, 1)

    def _resume(self) -> int:
        """How much of the file is here already; its digests are brought up to there."""
        self._digests = Digests()
        state = _record(self._state)
        if state.get("url") != self._url or not state.get("validator") or not self._part.exists():
            self._part.unlink(missing_ok=True)
            return 0
        with self._part.open("rb") as part:
            while block := part.read(_BLOCK):
                self._digests.feed(block)
        return self._digests.num_bytes

    def _receive(self, client: httpx.Client, begin: int) -> None:
        state = _record(self._state)
        headers = {"Range": f"bytes={begin}-", "If-Range": state["validator"]} if begin else {}
        with client.stream("GET", self._url, headers=headers) as answer:
            total = self._begin(answer, begin, state)
            if self._before is not None and total is not None:
                self._before(total - self._digests.num_bytes)
            with self._part.open("ab") as part:
                for block in answer.iter_raw():
                    part.write(block)
                    self._digests.feed(block)
        found = self._digests.num_bytes
        if total is not None and found != total:
            if found > total:
                self._part.unlink()
            raise _TryAgainError(f"{found} bytes arrived, expected {total}")

    def _begin(self, answer: httpx.Response, begin: int, state: dict[str, Any]) -> int | None:
        """Look at the status line and headers; returns the file's full length where stated."""
        self._refuse(answer)
        validator = _validator(answer.headers)
        total = _total(answer, begin)
        if answer.status_code == 206 and (
            total is None or validator != state.get("validator") or total != state.get("total")
        ):
            self._part.unlink()
            raise _TryAgainError("the file changed on the server between two parts")
        if answer.status_code == 200:  # the first part, or of a file that has changed
            self._part.write_bytes(b"")
            self._digests = Digests()
            _write_json(self._state, {"url": self._url, "validator": validator, "total": total})
        self._headers = answer.headers
        return total

    def _refuse(self, answer: httpx.Response) -> None:
        status = answer.status_code
        if status in (200, 206):
            return
        if status in _ABSENT:
            raise NotThereError(f"{self._url}: {status} {answer.reason_phrase}")
        if status == 416:  # longer than the file: not its part
            self._part.unlink(missing_ok=True)
            raise _TryAgainError("416 Range Not Satisfiable")
        failure = httpx.HTTPStatusError("", request=answer.request, response=answer)
        if is_transport_failure(failure):
            raise _TryAgainError(f"{status} {answer.reason_phrase}", self._retry_after_s(answer))
        raise CheckpointError(f"{self._url}: unexpected answer {status} {answer.reason_phrase}")

    def _retry_after_s(self, answer: httpx.Response) -> float | None:
        text = answer.headers.get("retry-after", "")
        return min(float(text), self._patience.longest_wait_s) if text.isdecimal() else None

    def _verify(self, client: httpx.Client, *, agreed: bool) -> str:
        """Compare with what the server states; in words, what vouched for the content.

        An ETag of 32 digits is usually the md5 and sometimes only looks like one (encrypted
        stores): two downloads that agree with each other outweigh it.
        """
        stated = stated_checksums(self._headers)
        for algorithm, expected in stated.items():
            found = self._digests.of(algorithm)
            if found != expected:
                raise CheckpointError(f"found {algorithm} {found}, the server states {expected}")
        if stated:
            return f"the server's {' and '.join(sorted(stated))}"
        md5 = etag_md5(self._headers.get("etag"))
        if md5 == self._digests.md5:
            return "the server's ETag, an md5"
        if md5 is not None and not agreed:
            raise CheckpointError(f"found md5 {self._digests.md5}, the ETag says {md5}")
        published = self._published_sha256(client)
        if published is None:
            return "its length; the server states no checksum"
        if published != self._digests.sha256:
            raise CheckpointError(
                f"found sha256 {self._digests.sha256}, {self._url}.sha256 says {published}"
            )
        return "the .sha256 file beside it"

    def _published_sha256(self, client: httpx.Client) -> str | None:
        try:
            answer = client.get(f"{self._url}.sha256")
        except httpx.TransportError:
            return None
        return sha256_in(answer.text[:4096]) if answer.status_code == 200 else None


def _validator(headers: httpx.Headers) -> str | None:
    """What If-Range may carry: a strong ETag, else the date of the last change."""
    etag: str | None = headers.get("etag")
    if etag is not None and not etag.startswith("W/"):
        return etag
    modified: str | None = headers.get("last-modified")
    return modified


def _total(answer: httpx.Response, begin: int) -> int | None:
    """Full length of the file; None where it is not stated or the range is another one."""
    if answer.status_code == 206:
        span, _, total = (
            answer.headers.get("content-range", "").removeprefix("bytes ").partition("/")
        )
        matches = span.startswith(f"{begin}-") and total.isdecimal()
        return int(total) if matches else None
    length = answer.headers.get("content-length", "")
    return int(length) if length.isdecimal() else None


def _downloaded(target: Path, record: dict[str, Any]) -> Downloaded:
    return Downloaded(
        path=target,
        num_bytes=record["num_bytes"],
        sha256=record["sha256"],
        checked_by=record["checked_by"],
    )


def _record(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or cut off while it was written
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    scratch = path.with_name(f"{path.name}.new")
    scratch.write_text(json.dumps(content), encoding="utf-8")
    scratch.replace(path)
