"""Generated requests, good and bad, against the OpenAPI description: nothing is a 5xx.

Every answer must have a status, a media type and a body that the description names.
"""

import copy
import json
from typing import Any, cast

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis import checks as known

import probe.plan
import probe.plan_mix
import server.api.jobs
from probe.errors import CheckpointError
from probe.series import list_checkpoints
from probe.spec import HubCheckpoints
from server.api import guard
from server.api.app import create_app
from server.api.guard import ADMIN_PATHS
from server.keys import SCOPES, KeyTable
from server.settings import Settings

JSON_TYPE = {"Content-Type": "application/json"}
CHECKS = [
    known.not_a_server_error,
    known.status_code_conformance,
    known.content_type_conformance,
    known.response_headers_conformance,
    known.response_schema_conformance,
    known.negative_data_rejection,
    known.unsupported_method,
]


# Archives are made up as any other bytes.
schemathesis.serializer.alias("application/x-tar", "application/octet-stream")


@pytest.fixture
def without_hub(monkeypatch):
    """The hub says no at once: no network here, and a 503 is for real outages."""

    def listed(checkpoints):
        if isinstance(checkpoints, HubCheckpoints):
            raise CheckpointError("no such repository")
        return list_checkpoints(checkpoints)

    monkeypatch.setattr(server.api.jobs, "list_checkpoints", listed)
    monkeypatch.setattr(probe.plan, "list_checkpoints", listed)
    monkeypatch.setattr(probe.plan_mix, "list_checkpoints", listed)


# The description does not depend on the store, so the operations can be named before there is one.
OPERATIONS = [
    (path, method)
    for path, methods in create_app(Settings(), cast(Any, object())).openapi()["paths"].items()
    for method in methods
]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_operation_keeps_to_its_description(app, without_hub, submitted, path, method, mode):
    described = schemathesis.openapi.from_asgi("/openapi.json", app, headers={"Host": "localhost"})
    operation = described[path][method]

    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate("http://localhost", checks=CHECKS)

    try:
        check()
    except Unsatisfiable:
        # An operation without anything to get wrong has no negative cases.
        assert mode is GenerationMode.NEGATIVE


@pytest.mark.parametrize("scope", SCOPES)
def test_every_operation_keeps_to_its_description_for_a_key_of_each_scope(
    store, without_hub, submitted, monkeypatch, scope
):
    """Also for those that may not: 403 is described; and without the key nothing is answered."""
    monkeypatch.setattr(guard, "_WRONG_BURST", 10**6)  # what asks without a key asks a lot
    _, key = KeyTable(store.engine).create("the key", scope)
    app = create_app(Settings(rate_limit_per_s=1e6, rate_limit_burst=10**6), store)
    headers = {"Host": "localhost", "Authorization": f"Bearer {key}"}
    described = schemathesis.openapi.from_asgi("/openapi.json", app, headers=headers)
    # A key that may not POST hears that, before it hears whether anyone may.
    checks = [c for c in CHECKS if scope != "read" or c is not known.unsupported_method]
    statuses = set()

    def check_all(mode: GenerationMode, path: str, method: str) -> None:
        @settings(
            max_examples=3,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=described[path][method].as_strategy(generation_mode=mode))
        def check(case):
            answer = case.call_and_validate(
                "http://localhost", headers=headers, checks=[*checks, known.ignored_auth]
            )
            if mode is GenerationMode.POSITIVE:  # the others leave the key out, too
                statuses.add(answer.status_code)

        try:
            check()
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE

    for mode in GenerationMode:
        for path, method in OPERATIONS:
            check_all(mode, path, method)
    is_short = scope == "read" or (
        scope == "submit" and any(p in ADMIN_PATHS for p, _ in OPERATIONS)
    )
    assert (403 in statuses) == is_short
    assert 401 not in statuses


READ_A_JOB = [path for path, method in OPERATIONS if "{job_id}" in path and method == "get"]


@pytest.mark.parametrize("path", READ_A_JOB)
@pytest.mark.parametrize("query", [{}, {"format": "csv"}, {"format": "png"}])
def test_answers_about_a_real_job_keep_to_the_description(
    app, store, submitted, end_job, make_unit_result, path, query
):
    store.record_unit(submitted, make_unit_result(0, 100))
    end_job(submitted)
    described = schemathesis.openapi.from_asgi("/openapi.json", app, headers={"Host": "localhost"})
    case = described[path]["get"].Case(path_parameters={"job_id": submitted}, query=query)
    checks = [check for check in CHECKS if check is not known.negative_data_rejection]
    case.call_and_validate("http://localhost", checks=checks)


def places(value, path=()):
    """Every place in a JSON value, the whole left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in inner:
        yield (*path, key)
        if isinstance(below, dict | list):
            yield from places(below, (*path, key))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20) | st.sampled_from(["", "/", "*", "**", "\0", "(", "1e999", "a/b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)  # fmt: skip


def test_a_good_job_with_one_value_changed_is_planned_or_refused(client, spec, without_hub):
    full = client.post("/v1/jobs:plan", json=spec).json()["spec"]  # every default spelled out
    everywhere = sorted(places(full), key=str)
    statuses = set()

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(everywhere), JSON_VALUES)
    def check(place, value):
        changed = copy.deepcopy(full)
        target = changed
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = value
        answer = client.post("/v1/jobs:plan", content=json.dumps(changed), headers=JSON_TYPE)
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 422), answer.text
        if answer.status_code == 422:
            problem = answer.json()
            assert problem["errors"] or problem["code"] in ("config_error", "checkpoint_error")

    assert client.post("/v1/jobs:plan", json=full).status_code == 200
    check()
    assert 422 in statuses
