"""Keys, hosts, origins and roots: who may ask for what."""

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from probe.errors import ConfigError
from server.api.app import create_app
from server.settings import Settings

KEY = "sk-test-0123456789"
LOOPBACK = "http://127.0.0.1"


def make_client(store, base_url=LOOPBACK, **settings):
    app = create_app(Settings(**settings), store)
    return TestClient(app, base_url, raise_server_exceptions=False, follow_redirects=False)


def code_of(answer):
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["code"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_machines_need_keys_and_roots(store, tmp_path, host):
    with pytest.raises(ConfigError, match="PROBE_API_KEYS"):
        create_app(Settings(host=host, roots=[tmp_path]), store)
    with pytest.raises(ConfigError, match="PROBE_ROOTS"):
        create_app(Settings(host=host, api_keys=[SecretStr(KEY)]), store)
    keys = [SecretStr(KEY), SecretStr("guess-me")]
    with pytest.raises(ConfigError, match="at least 16 characters"):
        create_app(Settings(host=host, api_keys=keys, roots=[tmp_path]), store)
    create_app(Settings(host=host, api_keys=[SecretStr(KEY)], roots=[tmp_path]), store)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_neither(store, host):
    create_app(Settings(host=host), store)


def test_an_empty_key_is_no_key():
    for keys in ([""], ["a", ""]):
        with pytest.raises(ValueError, match="at least 1"):
            Settings(api_keys=keys)


def test_every_v1_path_needs_the_key(store, spec):
    client = make_client(store, api_keys=[SecretStr("other"), SecretStr(KEY)])
    paths = client.get("/openapi.json").json()["paths"]
    for path, operations in paths.items():
        for method in operations:
            if path not in ("/healthz", "/readyz"):
                answer = client.request(method, path)
                assert code_of(answer) == (401, "unauthorized")
                assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
    right = {"Authorization": f"Bearer {KEY}"}
    assert client.post("/v1/jobs", json=spec, headers=right).status_code == 202
    for wrong in (f"Bearer {KEY}x", f"Basic {KEY}", "Bearer ", KEY, "Bearer \u00e9"):
        headers = {"Authorization": wrong.encode("latin-1")}
        assert code_of(client.get("/v1/jobs", headers=headers)) == (401, "unauthorized")


def test_the_dashboard_asks_for_a_key_and_keeps_something_else(store):
    client = make_client(store, api_keys=[SecretStr(KEY)])
    html = {"Accept": "text/html"}
    answer = client.get("/", headers=html)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert client.get("/login").status_code == 200
    wrong = client.post("/login", data={"key": "wrong"})
    assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)
    right = client.post("/login", data={"key": KEY})
    cookie = right.headers["set-cookie"]
    assert right.status_code == 303
    assert KEY not in cookie
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert client.get("/", headers=html).status_code == 200  # the client keeps the cookie
    assert client.get("/v1/jobs").status_code == 200
    client.cookies.set("probe_session", KEY)
    assert client.get("/v1/jobs", headers={"Cookie": f"probe_session={KEY}"}).status_code == 401


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[", "a@evil"])
def test_a_name_that_only_resolves_to_us_is_refused(store, host):
    client = make_client(store)
    for path in ("/", "/v1/jobs", "/healthz", "/static/app.js"):
        assert code_of(client.get(path, headers={"Host": host})) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost:8765", "127.0.0.1:1", "[::1]:8765", "LOCALHOST"])
def test_our_own_names_are_fine(store, host):
    assert make_client(store).get("/v1/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_pages_of_other_sites_change_nothing(client, submitted, headers):
    for path in (f"/v1/jobs/{submitted}/cancel", f"/jobs/{submitted}/cancel", "/v1/jobs"):
        assert code_of(client.post(path, headers=headers)) == (403, "cross_origin")
    assert client.get(f"/v1/jobs/{submitted}").json()["status"] == "queued"


def test_our_own_pages_may_post(client, submitted):
    headers = {"Origin": LOOPBACK, "Sec-Fetch-Site": "same-origin"}
    answer = client.post(f"/jobs/{submitted}/cancel", headers=headers)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/jobs/{submitted}")
    assert client.get(f"/v1/jobs/{submitted}").json()["status"] == "cancelled"


@pytest.mark.parametrize("path", ["/", "/v1/jobs", "/nothing", "/static/app.js"])
def test_every_answer_forbids_foreign_content(client, path):
    policy = client.get(path).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


@pytest.fixture
def fenced(store, workspace):
    """A client of a server whose only root is `workspace/runs` and the text beside it."""
    outside = workspace / "outside"
    (workspace / "runs" / "step-100").rename(outside)
    (workspace / "runs" / "step-150").symlink_to(outside)
    return make_client(store, roots=[workspace / "runs", workspace / "text.jsonl"])


def refused_field(answer):
    assert code_of(answer) == (422, "path_not_allowed")
    return answer.json()["errors"][0]["field"]


def test_paths_inside_the_roots_are_fine(fenced, spec, workspace):
    spec["checkpoints"]["path"] = str(workspace / "runs" / "step-[23]00")
    assert fenced.post("/v1/jobs", json=spec).status_code == 202
    assert fenced.post("/v1/checkpoints", json=spec["checkpoints"]).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["{w}/outside", "{w}/*", "/etc/*", "{w}/runs/../outside", "{w}/runs/*/../../outside",
     "{w}/runs/step-150", "{w}/runs/step-*", "~/x", "relative/*", "*", "/", "{w}/runs-other"],
)  # fmt: skip
def test_checkpoints_outside_the_roots_or_linked_out_are_refused(fenced, spec, workspace, path):
    spec["checkpoints"]["path"] = path.format(w=workspace)
    for url in ("/v1/jobs", "/v1/jobs:plan"):
        assert refused_field(fenced.post(url, json=spec)) == "checkpoints.path"
    refused_field(fenced.post("/v1/checkpoints", json=spec["checkpoints"]))
    assert fenced.get("/v1/jobs").json()["data"] == []


def test_a_config_outside_the_roots_or_linked_out_is_refused(fenced, spec, workspace):
    (workspace / "outside" / "config.json").write_text("{}")
    (workspace / "runs" / "conf").mkdir()
    (workspace / "runs" / "conf" / "config.json").symlink_to(workspace / "outside/config.json")
    spec["checkpoints"]["path"] = str(workspace / "runs" / "step-[23]00")
    for config in ("outside", "outside/config.json", "runs/conf", "runs/conf/config.json"):
        spec["checkpoints"]["config"] = str(workspace / config)
        for url in ("/v1/jobs", "/v1/jobs:plan"):
            assert refused_field(fenced.post(url, json=spec)) == "checkpoints.config"


def test_files_of_a_part_of_a_checkpoint_that_are_linked_out_are_refused(fenced, spec, workspace):
    part = workspace / "runs" / "step-200" / "optimizer_0"
    part.mkdir()
    (part / "__0_0.data").symlink_to("/etc/hostname")
    spec["checkpoints"]["path"] = str(workspace / "runs" / "step-[23]00")
    assert refused_field(fenced.post("/v1/jobs", json=spec)) == "checkpoints.path"


def test_a_gguf_file_outside_the_roots_is_refused(fenced, spec):
    spec["checkpoints"] = {"source": "gguf", "path": "/etc/passwd"}
    assert refused_field(fenced.post("/v1/jobs", json=spec)) == "checkpoints.path"


def test_a_hub_id_that_is_a_directory_here_is_refused(fenced, spec, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    for repo in ("runs/step-200", "../outside"):
        spec["checkpoints"] = {"source": "hub", "repo": repo, "revisions": ["main"]}
        assert refused_field(fenced.post("/v1/jobs", json=spec)) == "checkpoints.repo"


def test_a_list_of_optimizer_states_outside_the_roots_is_refused(fenced, spec, workspace):
    (workspace / "runs" / "linked.csv").symlink_to("/etc/hostname")
    for path in ("/etc/x.csv", "~/x.csv", f"{workspace}/outside/x.csv", "runs/linked.csv"):
        source = {"source": "hub", "repo": "o/r", "revisions": ["step1"], "optimizer_states": path}
        for url in ("/v1/jobs", "/v1/jobs:plan"):
            answer = fenced.post(url, json=spec | {"checkpoints": source})
            assert refused_field(answer) == "checkpoints.optimizer_states"


def test_a_plan_asks_no_url_that_a_stranger_names(fenced, spec):
    """Nobody listens on that port of this machine: the URL is kept for the worker, not asked."""
    url = "http://127.0.0.1:9/{step}/"
    source = {"source": "hub", "repo": "o/r", "revisions": ["step1"], "optimizer_states": url}
    answer = fenced.post("/v1/jobs:plan", json=spec | {"checkpoints": source})
    assert answer.status_code == 200
    (unit,) = answer.json()["units"]
    assert unit["checkpoint"]["moments_url"] == "http://127.0.0.1:9/1/"


def test_data_and_tokenizer_outside_the_roots_are_refused(fenced, spec, workspace):
    spec["checkpoints"]["path"] = str(workspace / "runs" / "step-[23]00")
    (workspace / "runs" / "linked.jsonl").symlink_to("/etc/hostname")
    for path in ("/etc/passwd", f"{workspace}/runs/*.jsonl", f"{workspace}/../x.jsonl"):
        spec["batches"]["sources"][0]["paths"] = [str(workspace / "text.jsonl"), path]
        answer = fenced.post("/v1/jobs", json=spec)
        assert refused_field(answer) == "batches.sources.0.paths.1"
    spec["batches"]["sources"][0]["paths"] = [str(workspace / "text.jsonl")]
    for name in ("/etc", "../tok", "~/tok", "./tok", f"{workspace}/outside"):
        answer = fenced.post("/v1/jobs", json=spec | {"model": {"tokenizer": name}})
        assert refused_field(answer) == "model.tokenizer"
    hub = fenced.post("/v1/jobs", json=spec | {"model": {"tokenizer": "allenai/OLMo-2-0425-1B"}})
    assert hub.status_code == 202
