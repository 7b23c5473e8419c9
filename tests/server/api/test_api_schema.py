"""Generated requests, good and bad, against the OpenAPI description: nothing is a 5xx.

Every answer must have a status, a media type and a body that the description names.
"""

from typing import Any, cast

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis import checks as known

import probe.plan
import server.api.jobs
from probe.errors import CheckpointError
from probe.series import list_checkpoints
from probe.spec import HubCheckpoints
from server.api.app import create_app
from server.settings import Settings

CHECKS = [
    known.not_a_server_error,
    known.status_code_conformance,
    known.content_type_conformance,
    known.response_headers_conformance,
    known.response_schema_conformance,
    known.negative_data_rejection,
    known.unsupported_method,
]


@pytest.fixture
def without_hub(monkeypatch):
    """The hub says no at once: no network here, and a 503 is for real outages."""

    def listed(checkpoints):
        if isinstance(checkpoints, HubCheckpoints):
            raise CheckpointError("no such repository")
        return list_checkpoints(checkpoints)

    monkeypatch.setattr(server.api.jobs, "list_checkpoints", listed)
    monkeypatch.setattr(probe.plan, "list_checkpoints", listed)


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
