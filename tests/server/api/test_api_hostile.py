"""Requests that mean harm, as a table: what is sent, and the status and code it must get.

Each goes straight to the app, byte for byte, as no well-behaved client would send it. Whatever it
is: no 5xx, no traceback, no word of its contents executed, nothing queued; the answer is a problem.
"""

import asyncio
import copy
import json
import os
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from server.api.app import create_app
from server.settings import Settings

KEY = "the-only-key-there-is"
HERE = os.fsencode(Path(__file__).parents[3])  # where the program is, is nobody's business
JSON = (b"content-type", b"application/json")
DEEP = 100_000


class Row(NamedTuple):
    """One request and what must come of it."""

    method: str
    target: str
    status: int
    code: str
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: Any = b""  # bytes, or values that are sent as JSON
    change: tuple[str, Any] | None = None  # instead of body: a good job, one field changed


def get(target: str, status: int, code: str, *headers: tuple[bytes, bytes]) -> Row:
    return Row("GET", target, status, code, headers)


def post(
    body: Any, status: int, code: str, *headers: tuple[bytes, bytes], to: str = "/v1/jobs"
) -> Row:
    return Row("POST", to, status, code, (JSON, *headers), body)


def job(field: str, value: Any, code: str = "config_error") -> Row:
    return Row("POST", "/v1/jobs", 422, code, (JSON,), change=(field, value))


def query(text: str) -> Row:
    return get(f"/v1/jobs?{text}", 422, "validation_error")


def header(name: bytes, value: bytes, status: int, code: str) -> Row:
    return Row("POST", "/v1/jobs", status, code, (JSON, (name, value)), change=("name", "fine"))


NOT_JSON = [
    b"", b" ", b"\0", b"{", b"}", b"[", b'{"a"}', b"{'a': 1}", b'{"a": 1,}', b"{a: 1}", b"nul",
    b"undefined", b"NaN", b"Infinity", b"-Infinity", b'{"kind": NaN}', b"\xff\xfe{\0}\0",
    b'{"a": "\xff"}', b'{"a": "\xc0\xaf"}', b'{"a": "\xed\xa0\x80"}', b"[" * DEEP,
    b'{"a":' * DEEP, b"[" * DEEP + b"]" * DEEP, b'{"a": 1}{"b": 2}', b"<xml/>", b"a=b&c=d",
    b'{"a": ' + b"9" * 5000 + b"}", b'"unterminated', b'{"a": "\\x41"}', b'{"a": "\\ud8"}',
    b"// comment\n{}", b"!!python/object/apply:os.system ['true']", b"\x80\x04\x95.", b"PK\x03\x04",
    b'\xef\xbb\xbf{"a": 1}', b'{"a": 01}', b'{"a": +1}', b'{"a": .5}', b'{"a": 0x10}',
    b'{"a": "tab\tin text"}', b"--boundary\r\n", b"\x1f\x8b\x08\x00",
]  # fmt: skip
NO_JOB = [
    "null", "true", "0", "[]", "{}", '""', "1e400", '"kind"', "[{}]", '{"kind": null}',
    '{"kind": 1}', '{"kind": []}', '{"kind": {}}', '{"kind": ""}', '{"kind": "__class__"}',
    '{"kind": "checkpoint_series"}', '{"kind": "CHECKPOINT_SERIES"}', '{"kind": "mix_scan\\u0000"}',
    '{"__proto__": {"admin": true}}', '{"constructor": {"prototype": {}}}', '{"": ""}',
    '{"kind": "../../etc/passwd"}', '{"$ref": "file:///etc/passwd"}', '{"\\u0000": 1}',
    '{"\\ud800": 1}', '{"a": "\\ud800"}', '{"a": "\\u0000"}', '{"a": 9223372036854775808}',
    '{"a": -9223372036854775809}', '{"a": 1e999}', "[" * 50 + "]" * 50,
    '{"a":' * 50 + "1" + "}" * 50,
    '{"kind": "checkpoint_series", "kind": "nothing"}', '{"presets": {}}', '{"spec": {}}',
]  # fmt: skip
LONG = "x" * 10_000
WRONG_FIELDS = [
    ("name", None), ("name", ""), ("name", "x" * 201), ("name", 1), ("name", ["x"]),
    ("name", {"$gt": ""}), ("name", True), ("labels", None), ("labels", []), ("labels", "a=b"),
    ("labels", {"a": 1}), ("labels", {"a": None}), ("labels", {"": "x"}), ("labels", {"a b": "x"}),
    ("labels", {"../x": "y\0"}), ("labels", {"x" * 64: "y"}), ("labels", {"x": "y" * 256}),
    ("labels", {"<script>": "x"}), ("labels", {"a'--": "x"}), ("labels", {"__proto__\n": "x"}),
    ("labels", {f"k{n}": "v" for n in range(33)}), ("labels", {"\u0430": "x"}),
    ("priority", 0), ("priority", -1), ("priority", 10_001), ("priority", "1"), ("priority", 1.5),
    ("priority", None), ("priority", True), ("priority", 2**62),
    ("time_limit_s", 0), ("time_limit_s", -1), ("time_limit_s", 1e300), ("time_limit_s", "1h"),
    ("webhook", "file:///etc/passwd"),
    ("webhook", "gopher://127.0.0.1:6379/_FLUSHALL"), ("webhook", "javascript:alert(1)"),
    ("webhook", "//evil.example/x"), ("webhook", "https://u:p@ok.example/"), ("webhook", ""),
    ("webhook", "https://ok.example/#@evil.example"), ("webhook", "https://ok.example\\@evil/"),
    ("webhook", "https://ok.example/\r\nX: y"), ("webhook", "https:///x"), ("webhook", 1),
    ("webhook", "https://[::1"), ("webhook", "https://ok.example:99999/"), ("webhook", LONG),
    ("webhook", "https://\u24de\u24da.example/"), ("webhook", "https://ok.example/ x"),
    ("checkpoints", None), ("checkpoints", []), ("checkpoints", {}), ("checkpoints", "/etc"),
    ("checkpoints.source", "pickle"), ("checkpoints.source", ["local"]), ("checkpoints.path", ""),
    ("checkpoints.path", None), ("checkpoints.path", ["/etc/passwd"]), ("checkpoints.path", "a\0b"),
    ("checkpoints.step_pattern", "("), ("checkpoints.step_pattern", "step"),
    ("checkpoints.step_pattern", "(a)(b)"), ("checkpoints.step_pattern", "(?P<x>"),
    ("checkpoints.every", 0), ("checkpoints.every", -1), ("checkpoints.every", 1.0),
    ("checkpoints.first_step", -1), ("checkpoints.trust_remote_code", True),
    ("model", []), ("model.dtype", "float8"), ("model.device", "cuda:0; rm -rf /"),
    ("model.attention", "__import__('os')"), ("model.trust_remote_code", True),
    ("model.tokenizer", 1), ("parallel.ranks", 0), ("parallel.ranks", 10**9),
    ("parallel.nodes", 0), ("parallel.dtype", "float32"), ("optimizer.name", "eval"),
    ("optimizer.eps", 0), ("optimizer.eps", "1e-8"), ("optimizer.betas", [0.9]),
    ("optimizer.betas", [1.0, 1.0]), ("optimizer.weight_decay", -1), ("optimizer.lambda", 1),
    ("batches.sources", []), ("batches.sources", {}), ("batches.sources", ["x"] * 1000),
    ("batches.sequence_length", 7), ("batches.sequence_length", 10**12),
    ("batches.batch_sequences", 0), ("batches.batch_sequences", True), ("batches.seed", 2**31),
    ("batches.seed", -1), ("batches.seed", 1e3), ("measurement", None),
    ("measurement.repeats", 10**6), ("measurement.rel_tol", 0), ("measurement.rel_tol", 2),
    ("measurement.eta_init", 1e300), ("measurement.max_forward_passes", 10**9),
    ("measurement.loss_batch", "both; drop table jobs"), ("schedule.type", {}),
    ("unknown", 1), ("Kind", "x"), ("__class__", {}), ("kind ", "x"), ("spec_sha256", "0"),
    ("submitted_by", "root"), ("status", "succeeded"), ("id", "job_1"), ("command", ["sh"]),
]  # fmt: skip
OUTSIDE = [
    "/etc/passwd", "/etc/*", "/", "..", "../..", "~", "~root/x", "{r}/../outside", "{r}/..",
    "{r}/runs/../../outside", "{r}/link", "file:///etc/passwd", "http://127.0.0.1:8765/x",
    "s3://b/k", "hf://o/r", "relative", "{r}-2", "/proc/self/environ", "//etc//passwd",
    "{r}/%2e%2e/x/../../..", "\\\\host\\share", "C:/x", "{r}/" + "a/" * 2500, "/\u2024\u2024/etc",
]  # fmt: skip
WRONG_QUERIES = [
    "limit=0", "limit=-1", "limit=201", "limit=1e3", "limit=", "limit=NaN", "limit=1%00",
    "limit=99999999999999999999999", "limit=%EF%BC%91%00", "limit[]=1", "status=", "status=x",
    "status=queued'--", "status[$ne]=x", "kind=..%2F..", "kind=", "queue=tpu", "queue=gpu%0a",
    "label=", "label=a", "label==b", "label=a%00=b", "label=a=%00", "label=%27%20OR%201=1--",
    "label=" + "a" * 64 + "=b", "label=a=" + "b" * 256, "after=", "after=..%2F..", "after=a%00",
    "after='", "after=" + "a" * 101, "after=%F0%9F%92%A9", "after=a;b", "unknown=1", "Limit=1",
    "limit=1&limit2=1", "__proto__=1", "%00=1", "%ff%fe=1", "callback=alert(1)", "fields=*",
    "a" * 500 + "=1", "limit=5&after=a%20b",
]  # fmt: skip
NOTHING_THERE = [
    "/v1", "/v2/jobs", "/v1/jobs/", "/v1/jobs/..", "/v1/jobs/../../etc/passwd", "/v1//jobs",
    "/v1/jobs/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/v1/jobs/..%2f..", "/v1/jobs/%00", "/v1/jobs/a%00b",
    "/v1/jobs/' OR '1'='1", "/v1/jobs/%27;DROP%20TABLE%20jobs;--", "/v1/jobs/" + "a" * 101,
    "/v1/jobs/" + "a" * 5000, "/v1/jobs/%F0%9F%92%A9", "/v1/jobs/%ff%fe", "/v1/jobs/{{7*7}}",
    "/v1/jobs/$(id)", "/v1/jobs/<script>", "/v1/jobs/none/events", "/v1/jobs/none/results",
    "/v1/jobs/none/chart", "/v1/jobs/%0d%0aX:%20y/events", "/v1/jobs/none/nothing",
    "/static/../settings.py", "/static/..%2f..%2fsettings.py", "/static/%2e%2e/app.py",
    "/static/app.js%00.css", "/static/", "/static/jobs.html", "/jobs/none", "/jobs/..%2f..",
    "/.git/config", "/.env", "/etc/passwd", "/admin", "/wp-login.php", "/server-status",
    "/v1/jobs;x=1", "/v1/jobs%20", "/V1/jobs", "/v1/Jobs", "/openapi.yaml", "/redoc", "/\\etc",
]  # fmt: skip
ROWS = [
    *(post(body, 400, "invalid_json") for body in NOT_JSON),
    *(post(body.encode(), 422, "config_error") for body in NO_JOB),
    *(job(field, value) for field, value in WRONG_FIELDS),
    *(job("checkpoints.path", path, "path_not_allowed") for path in OUTSIDE),
    *(query(text) for text in WRONG_QUERIES),
    *(get(path, 404, "not_found") for path in NOTHING_THERE),
    job("webhook", "https://ok.example/x", "webhook_not_allowed"),
    job("webhook", "http://169.254.169.254/latest", "webhook_not_allowed"),
    # the body's type, length and encoding
    *(
        header(b"content-type", value, 415, "unsupported_media_type")
        for value in (b"text/plain", b"application/xml", b"application/jsonx", b"", b"*/*",
                      b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x",
                      b"application/json\0", b"text/json", b"application/octet-stream")
    ),
    post(b'"' + b"x" * (1 << 20) + b'"', 413, "body_too_large"),
    post(b"{}", 413, "body_too_large", (b"content-length", b"1048577")),
    post(b"{}", 413, "body_too_large", (b"content-length", b"9" * 40)),
    post(b"\x1f\x8b\x08\0\0\0", 400, "invalid_json", (b"content-encoding", b"gzip")),
    # keys that make a job once
    *(
        header(b"idempotency-key", value, 422, "validation_error")
        for value in (b"", b" ", b"a b", b"a\tb", b"x" * 256, b"\xff", b"a\x7f", b"\xc3\xa9", b"\0")
    ),
    # who is asked, and by whom
    *(
        header(b"host", value, 403, "host_not_allowed")
        for value in (b"evil.example", b"", b"127.0.0.1.evil.example", b"localhost@evil.example",
                      b"evil.example:8765", b"[::ffff:1.2.3.4]", b"[", b"localhost.", b"0.0.0.0",
                      b"169.254.169.254", b"local\0host", b"\xff", b"localhost, evil.example",
                      b"2130706433", b"127.1")
    ),
    *(
        header(b"origin", value, 403, "cross_origin")
        for value in (b"null", b"https://evil.example", b"http://localhost:1", b"file://", b"http://[",
                      b"http://localhost.evil.example", b"", b"chrome-extension://x")
    ),
    header(b"sec-fetch-site", b"cross-site", 403, "cross_origin"),
    header(b"sec-fetch-site", b"same-site", 403, "cross_origin"),
    header(b"sec-fetch-site", b"nonsense", 403, "cross_origin"),
    # sizes of all the rest
    get("/v1/jobs?after=" + "a" * 9000, 414, "uri_too_long"),
    get("/" + "a/" * 5000, 414, "uri_too_long"),
    get("/v1/jobs", 431, "headers_too_large", (b"x", b"a" * 40_000)),
    get("/v1/jobs", 431, "headers_too_large", (b"cookie", b"a=b; " * 10_000)),
    get("/v1/jobs", 431, "headers_too_large", *(((b"x-%d" % n, b"a" * 100)) for n in range(400))),
    # methods
    *(
        Row(method, "/v1/jobs", 405, "method_not_allowed")
        for method in ("PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "PROPFIND", "get", "\u0130")
    ),
    Row("POST", "/v1/workers", 405, "method_not_allowed"),
    Row("GET", "/v1/jobs:plan", 405, "method_not_allowed"),
    Row("DELETE", "/v1/jobs/none", 405, "method_not_allowed"),
    Row("POST", "/v1/jobs/none/cancel", 404, "not_found"),
    Row("POST", "/v1/jobs/..%2f../cancel", 404, "not_found"),
    # places in an event stream
    *(
        get(f"/v1/jobs/JOB/events?after={value}", 422, "validation_error")
        for value in ("-1", "x", "1e3", "9223372036854775808", "", "1%00", "0x1")
    ),
    *(
        get("/v1/jobs/JOB/events", 422, "validation_error", (b"last-event-id", value))
        for value in (b"-1", b"x", b"1; drop", b"9" * 30, b"\xff", b"1.5")
    ),
    *(
        get(f"/v1/jobs/JOB/{path}", 422, "validation_error")
        for path in ("results?format=exe", "chart?format=../x", "chart?format=", "results?x=1",
                     "results?format=json%00", "events?format=csv", "cancel?x=1")
        if not path.startswith("cancel")
    ),
    get("/v1/jobs/JOB/results", 406, "not_acceptable", (b"accept", b"text/html")),
    get("/v1/jobs/JOB/results", 406, "not_acceptable", (b"accept", b"*/*;q=0")),
    get("/v1/jobs/JOB/chart", 406, "not_acceptable", (b"accept", b"\xff/\xff")),
    get("/v1/jobs/JOB/chart", 409, "no_results"),
]  # fmt: skip
WRONG_CREDENTIALS = [
    (b"authorization", b""),
    (b"authorization", b"Bearer"),
    (b"authorization", b"Bearer "),
    (b"authorization", b"Bearer wrong"),
    (b"authorization", b"bearer\t" + KEY.encode()),
    (b"authorization", b"Basic " + KEY.encode()),
    (b"authorization", KEY.encode()),
    (b"authorization", b"Bearer " + KEY.encode() + b"\0"),
    (b"authorization", b"Bearer \xff\xfe"),
    (b"authorization", b"Bearer " + KEY.encode() + b", Bearer x"),
    (b"authorization", b"Bearer null"),
    (b"authorization", b"Bearer " + KEY[:-1].encode()),
    (b"authorization", b"Bearer *"),
    (b"authorization", b"Bearer ' OR 1=1 --"),
    (b"authorization", b"Bearer spk_"),
    (b"authorization", b"Bearer spk_" + b"a" * 12 + b"_" + b"A" * 43),
    (b"authorization", b"Bearer spk_%00_x"),
    (b"authorization", b"Bearer " + b"x" * 20_000),
    (b"cookie", b"probe_session="),
    (b"cookie", b"probe_session=" + KEY.encode()),
]
MORE_WRONG_CREDENTIALS = [
    (b"cookie", b"probe_session=a.b.c"), (b"cookie", b"probe_session=" + b"0" * 64),
    (b"cookie", b"probe_session=.."), (b"cookie", b"=;=;=\0"), (b"cookie", b"\xff=\xff"),
    (b"cookie", b'probe_session="unterminated'), (b"cookie", b"PROBE_SESSION=" + KEY.encode()),
    (b"x-api-key", KEY.encode()), (b"x-forwarded-user", b"admin"), (b"x-original-url", b"/healthz"),
    (b"x-http-method-override", b"GET"), (b"proxy-authorization", b"Bearer " + KEY.encode()),
]  # fmt: skip


async def _ask(app: FastAPI, row: Row, body: bytes) -> tuple[int, dict[str, str], bytes]:
    path, _, query_string = row.target.partition("?")
    headers = [(b"host", b"localhost")] if b"host" not in dict(row.headers) else []
    given = dict(row.headers)  # the later one of two counts
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": row.method,
        "scheme": "http",
        "path": unquote(path),  # as uvicorn does
        "raw_path": path.encode(),
        "query_string": query_string.encode(),
        "root_path": "",
        "headers": [*headers, *given.items()],
        "client": ("192.0.2.1", 1),
        "server": ("localhost", 8765),
        "state": {},
    }
    chunks = [body[i : i + 65_536] for i in range(0, len(body), 65_536)] or [b""]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not chunks:
            await asyncio.Event().wait()
        chunk = chunks.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}

    async def send(message: Any) -> None:
        sent.append(message)

    await asyncio.wait_for(app(scope, receive, send), 30)
    answer = {k.decode().lower(): v.decode("latin-1") for k, v in sent[0]["headers"]}
    return sent[0]["status"], answer, b"".join(m.get("body", b"") for m in sent[1:])


def ask(app: FastAPI, row: Row, body: bytes) -> tuple[int, dict[str, str], bytes]:
    return asyncio.run(_ask(app, row, body))


def check_answer(answer: tuple[int, dict[str, str], bytes], row: Row) -> None:
    status, headers, content = answer
    problem = json.loads(content) if content else {}
    assert (status, problem.get("code")) == (row.status, row.code), content[:500]
    assert headers["content-type"] == "application/problem+json"
    assert set(problem) == {"type", "title", "status", "detail", "code", "errors"}
    assert len(content) < 20_000  # what was sent is not sent back at length
    for leak in (b"Traceback", b'File "', b"sqlalchemy", b"site-packages", HERE, KEY.encode()):
        assert leak not in content
    for name, value in headers.items():
        assert "\n" not in name + value
        assert "\r" not in name + value


def changed(spec: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    full = copy.deepcopy(spec)
    target = full
    *above, last = field.split(".")
    for key in above:
        target = target.setdefault(key, {})
    target[last] = value
    return full


def test_the_table_is_long_enough_and_says_nothing_twice():
    assert len(ROWS) + len(WRONG_CREDENTIALS) + len(MORE_WRONG_CREDENTIALS) >= 200
    seen = [repr(row[:1] + row[1:2] + row[4:]) for row in ROWS]
    assert sorted({text for text in seen if seen.count(text) > 1}) == []


def test_every_hostile_request_gets_what_the_table_says(store, spec, workspace, caplog):
    (workspace / "outside").mkdir()
    (workspace / "runs-2").mkdir()
    (workspace / "runs" / "link").symlink_to(workspace / "outside")
    roots = [workspace / "runs", workspace / "text.jsonl"]
    limits = {"rate_limit_per_s": 1e6, "rate_limit_burst": 10**6}
    app = create_app(Settings(roots=roots, **limits), store)
    good = Row("POST", "/v1/jobs", 202, "", (JSON,))
    status, _, content = ask(app, good, json.dumps(spec).encode())
    assert status == 202  # so it is the change that is refused below
    job_id = json.loads(content)["id"]
    wrong = []
    for row in ROWS:
        body = row.body if isinstance(row.body, bytes) else json.dumps(row.body).encode()
        if row.change is not None:
            field, value = row.change
            if isinstance(value, str) and row.code == "path_not_allowed":
                value = value.replace("{r}", str(workspace / "runs"))
            body = json.dumps(changed(spec, field, value)).encode()
        asked = row._replace(target=row.target.replace("JOB", job_id))
        try:
            check_answer(ask(app, asked, body), row)
        except Exception as error:
            sent = f"{row.headers!r:.120} {row.change or row.body!r:.80}"
            wrong.append(f"{row.method} {row.target[:80]} {sent}: {error!s:.300}")
    assert not wrong, f"{len(wrong)} of {len(ROWS)}:\n" + "\n".join(wrong)
    assert [job.id for job in store.list_jobs()[0]] == [job_id]
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("credentials", [WRONG_CREDENTIALS, MORE_WRONG_CREDENTIALS])
def test_no_wrong_credentials_open_anything(store, credentials):
    app = create_app(Settings(api_keys=[SecretStr(KEY)]), store)
    right = Row("GET", "/v1/jobs", 200, "", ((b"authorization", b"Bearer " + KEY.encode()),))
    assert ask(app, right, b"")[0] == 200
    for given in credentials:
        row = get("/v1/jobs", 401, "unauthorized", given)
        check_answer(ask(app, row, b""), row)
