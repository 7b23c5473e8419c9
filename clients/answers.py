"""Read what a server answers into wire types, or into the problem that explains a refusal."""

import json
from typing import TypeVar, get_args

import httpx
from pydantic import BaseModel, ValidationError

from clients.errors import ProtocolError
from server.wire import Event, EventType, Problem

Model = TypeVar("Model", bound=BaseModel)
_EVENT_TYPES = frozenset(get_args(EventType))


def parse(model: type[Model], response: httpx.Response) -> Model:
    """The response's body as a wire type.

    Raises:
        ProtocolError: It is not one: another program, or another version, answered.
    """
    try:
        return model.model_validate_json(response.content)
    except ValidationError as error:
        raise ProtocolError(
            f"{response.url} did not answer as a Sharpness Probe server of this version does "
            f"(no {model.__name__}: {error.error_count()} problems)"
        ) from error


def event_from(text: str) -> Event | None:
    """An event from its JSON; None for a type that this version does not know.

    Raises:
        ProtocolError: It is no event at all.
    """
    try:
        values = json.loads(text)
        if isinstance(values, dict) and values.get("type") not in _EVENT_TYPES:
            return None  # event types are only ever added
        return Event.model_validate(values)
    except ValueError as error:  # ValidationError is one
        raise ProtocolError(f"the event stream holds no event: {text[:200]!r}") from error


def problem_of(response: httpx.Response) -> Problem:
    """The problem a refused request carries, or one made from its status line."""
    try:
        body = json.loads(response.content)
        return Problem.model_validate(body | {"status": response.status_code})
    except (ValueError, TypeError):
        reason = response.reason_phrase or "no reason given"
        request = response.request
        return Problem(
            title=reason,
            status=response.status_code,
            detail=f"{request.method} {request.url}: HTTP {response.status_code} {reason}",
            code="http_error",
        )


def retry_after_s(response: httpx.Response, *, otherwise: float) -> float:
    """Seconds the server asks to wait, at most 30; a date in the header counts as no answer."""
    value = response.headers.get("retry-after", "")
    return min(float(value), 30.0) if value.isascii() and value.isdigit() else otherwise
