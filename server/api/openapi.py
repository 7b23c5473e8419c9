"""The OpenAPI description, with the job spec's schema, and a page that shows it offline."""

from typing import Annotated, Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import Field, TypeAdapter
from pydantic.json_schema import models_json_schema

from probe.kinds import JobSpec
from probe.spec import Checkpoints
from server.api.problems import responses
from server.wire import FieldProblem, Problem

_REF = "#/components/schemas/{model}"
_ANY_SPEC: Any = Annotated[JobSpec, Field(discriminator="kind")]


def describe(app: FastAPI, *, needs_key: bool) -> dict[str, Any]:
    """The OpenAPI document of the app's `/v1` and operations routes."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
    )
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    spec = TypeAdapter(_ANY_SPEC).json_schema(ref_template=_REF)
    parts = spec.pop("$defs")
    _, problem = models_json_schema(
        [(Problem, "serialization"), (FieldProblem, "serialization")], ref_template=_REF
    )
    checkpoints = TypeAdapter(Checkpoints).json_schema(ref_template=_REF)
    checkpoints.pop("$defs", None)  # the same models as the spec's
    schemas |= parts | problem["$defs"] | {"JobSpec": spec, "Checkpoints": checkpoints}
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _describe_guard(operation, path, needs_key=needs_key)
    return document


def _describe_guard(operation: dict[str, Any], path: str, *, needs_key: bool) -> None:
    """Add what `server.api.guard` may answer instead of the route."""
    statuses = [403, 414, 431]
    if path not in ("/healthz", "/readyz"):
        statuses.append(429)
        if needs_key:
            operation["security"] = [{"key": []}]
            statuses.append(401)
    for status, answer in responses(*statuses).items():
        operation["responses"].setdefault(str(status), answer)


def operations_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Every operation with its path and method, in the order of the routes, for the page."""
    return [
        operation | {"path": path, "method": method.upper()}
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
