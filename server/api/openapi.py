"""The OpenAPI description, with the job spec's schema, and a page that shows it offline."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from probe.spec import Checkpoints, CheckpointSeriesSpec
from server.wire import FieldProblem, Problem

_REF = "#/components/schemas/{model}"


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
    _, spec = models_json_schema(
        [(CheckpointSeriesSpec, "validation"), (Problem, "serialization")], ref_template=_REF
    )
    _, problem = models_json_schema([(FieldProblem, "serialization")], ref_template=_REF)
    checkpoints = TypeAdapter(Checkpoints).json_schema(ref_template=_REF)
    checkpoints.pop("$defs", None)  # the same models as the spec's
    schemas |= spec["$defs"] | problem["$defs"] | {"Checkpoints": checkpoints}
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                if path not in ("/healthz", "/readyz"):
                    operation["security"] = [{"key": []}]
                    operation["responses"]["401"] = {
                        "description": "Unauthorized",
                        "content": {
                            "application/problem+json": {
                                "schema": {"$ref": "#/components/schemas/Problem"}
                            }
                        },
                    }
    return document


def operations_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Every operation with its path and method, in the order of the routes, for the page."""
    return [
        operation | {"path": path, "method": method.upper()}
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
