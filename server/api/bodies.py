"""Read a JSON request body: size, media type, and values no database or client can hold.

FastAPI's own parsing is not used, so that a wrong job spec is answered in the words of
`probe.spec_load`, the same as on the command line.
"""

import hashlib
import json
import math
from typing import Any, NoReturn

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from server.api.problems import ProblemError, invalid
from server.wire import FieldProblem

_MAX_INT = 2**63 - 1
_MAX_DEPTH = 40
_MOST_PROBLEMS = 20
_SMALL_BYTES = 65_536  # read at once; more would hold up everybody else's requests
# A value's place: its mapping's or list's, and the key in it. Joined only where it is told: a long
# key would be copied for every value within.
_Place = tuple["_Place", str | int] | None


async def read_json(request: Request) -> Any:
    """The body as plain values.

    Raises:
        ProblemError: 415 not JSON by its Content-Type, 413 too large, 400 not JSON, 422 with the
            field where a value holds a NUL, half a surrogate pair, or more than 64 bits.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ProblemError(
            415,
            "unsupported_media_type",
            f"send Content-Type: application/json, found {media_type[:80]!r}",
        )
    body = await _read(request, request.app.state.settings.max_body_bytes)
    if len(body) <= _SMALL_BYTES:
        return parse_json(body)
    return await run_in_threadpool(parse_json, body)


def parse_json(body: bytes) -> Any:
    """Plain values of a JSON text; raises as `read_json` does, 413 and 415 aside."""
    try:
        # Decoded here: `json` would guess at UTF-16 and at text that is none.
        value = json.loads(body.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # also not UTF-8, or a number of 4300 digits
        raise ProblemError(400, "invalid_json", f"the body is not JSON: {error}") from error
    problems: list[FieldProblem] = []
    _check(value, None, 0, problems)
    if problems:
        raise invalid(problems, "config_error")
    return value


def sha256_of(value: Any) -> str:
    """Hash of a JSON value: equal for bodies that differ in spaces and key order only."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


async def _read(request: Request, max_bytes: int) -> bytes:
    # What the header says is believed only where it is too much; the bytes are counted as well.
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated[:20]) > max_bytes:
        raise _too_large(max_bytes)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(max_bytes: int) -> ProblemError:
    return ProblemError(413, "body_too_large", f"a body holds at most {max_bytes:,} bytes")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check(value: Any, at: _Place, depth: int, problems: list[FieldProblem]) -> None:
    message = None
    if depth > _MAX_DEPTH:
        message = f"nested deeper than {_MAX_DEPTH} levels"
    elif isinstance(value, dict):
        for key, inner in value.items():
            # A key that cannot be stored cannot be echoed either.
            shown = key if _storable(key) else ascii(key)
            if shown != key and len(problems) < _MOST_PROBLEMS:
                problems.append(FieldProblem(field=_path((at, shown)), message=_UNSTORABLE))
            _check(inner, (at, shown), depth + 1, problems)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check(inner, (at, index), depth + 1, problems)
    elif isinstance(value, str) and not _storable(value):
        message = _UNSTORABLE
    elif isinstance(value, int) and abs(value) > _MAX_INT:
        message = "an integer of more than 64 bits"
    elif isinstance(value, float) and not math.isfinite(value):
        message = "a number beyond what 64 bits hold"  # 1e999 is JSON
    if message is not None and len(problems) < _MOST_PROBLEMS:
        problems.append(FieldProblem(field=_path(at) or "(spec)", message=message))


def _path(at: _Place) -> str:
    parts: list[str] = []
    while at is not None:
        at, part = at
        parts.append(str(part))
    return ".".join(reversed(parts))


_UNSTORABLE = "text must be valid Unicode without NUL characters"


def _storable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)
