"""OpenTelemetry traces of requests, jobs and units: an extra, and nothing where it is off.

On when `OTEL_EXPORTER_OTLP_ENDPOINT` (or `..._TRACES_ENDPOINT`) is set. A job's trace begins with
the request that submits it: its `traceparent` stands in the job's row, and the worker's spans of
the job and its units, whichever worker runs them, become part of that trace.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from probe.errors import ConfigError

logger = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_TRACEPARENT = "traceparent"
_provider: Any = None  # of this process, once it is on
_tracer: Any = None


def set_up_tracing(service: str, exporter: Any = None) -> bool:
    """Begin to make spans, if the environment asks for it; whether it does.

    Args:
        service: `service.name` of this process, unless `OTEL_SERVICE_NAME` says another.
        exporter: Where spans go; None: over OTLP/HTTP to where the environment says.

    Raises:
        ConfigError: It asks for traces, and the extra is not installed.
    """
    global _provider, _tracer
    asked = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if exporter is None and asked is None:
        return False
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"{asked or 'tracing'} is set, but OpenTelemetry is not installed ({error}): "
            "pip install 'sharpness-probe[otel]', or unset it"
        ) from error
    name = os.environ.get("OTEL_SERVICE_NAME") or service
    _provider = TracerProvider(resource=Resource.create({"service.name": name}))
    _provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
    _tracer = _provider.get_tracer("sharpness-probe")
    return True


def end_tracing() -> None:
    """Send what is left, and make no more spans."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        provider.shutdown()


def is_on() -> bool:
    """Whether spans are made."""
    return _tracer is not None


class Span:
    """A span under way, or none."""

    def __init__(self, inner: Any = None) -> None:
        """Wrap OpenTelemetry's span; None: everything is ignored."""
        self._inner = inner

    def set(self, **attributes: Any) -> None:
        """Add attributes: `job_id` becomes `probe.job_id`."""
        if self._inner is not None:
            for name, value in attributes.items():
                if value is not None:
                    self._inner.set_attribute(f"probe.{name}", value)

    def answered(self, method: str, route: str, status: int) -> None:
        """Name an HTTP request's span as OpenTelemetry's conventions do."""
        if self._inner is not None:
            self._inner.update_name(f"{method} {route}")
            self._inner.set_attribute("http.request.method", method)
            self._inner.set_attribute("http.route", route)
            self._inner.set_attribute("http.response.status_code", status)
            if status >= 500:
                self.failed(str(status))

    def failed(self, code: str) -> None:
        """Mark it as failed; the code only, as messages may be long."""
        if self._inner is not None:
            from opentelemetry.trace import Status, StatusCode

            self._inner.set_status(Status(StatusCode.ERROR, code))
            self._inner.set_attribute("error.type", code)


_NONE = Span()


@contextmanager
def span(
    name: str, *, parent: str | None = None, server: bool = False, **attributes: Any
) -> Iterator[Span]:
    """A span around what happens inside; an exception that leaves it marks it as failed.

    Args:
        name: Of the span.
        parent: A `traceparent`; None, or one that is none: the span around this one.
        server: It answers a request.
        attributes: See `Span.set`.
    """
    if _tracer is None:
        yield _NONE
        return
    from opentelemetry.trace import SpanKind

    kind = SpanKind.SERVER if server else SpanKind.INTERNAL
    context = _context_of(parent)
    with _tracer.start_as_current_span(
        name, context=context, kind=kind, record_exception=False, set_status_on_exception=False
    ) as inner:
        found = Span(inner)
        found.set(**attributes)
        try:
            yield found
        except BaseException as error:
            found.failed(str(getattr(error, "code", None) or type(error).__name__))
            raise


def _context_of(parent: str | None) -> Any:
    if not parent:
        return None
    from opentelemetry.trace import get_current_span
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({_TRACEPARENT: parent})
    return context if get_current_span(context).get_span_context().is_valid else None


def current_traceparent() -> str | None:
    """Of the span around the caller, to be handed on; None outside any."""
    if _tracer is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get(_TRACEPARENT)


def traceparent_of(headers: Mapping[bytes, bytes]) -> str | None:
    """Of a request's headers."""
    value = headers.get(_TRACEPARENT.encode())
    return None if value is None else value.decode("latin-1")
