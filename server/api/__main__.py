"""`python -m server.api`: the HTTP server in the foreground."""

import argparse
import gc
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

from probe.errors import ConfigError, ProbeError
from server.api.check import what_is_wrong
from server.redaction import redact
from server.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

# Open event streams end at once; this is for requests that are being answered.
_GRACE_S = 5


def main() -> int:
    """Serve until SIGINT or SIGTERM; exit code 2: settings refused, 1: the database."""
    parser = argparse.ArgumentParser(prog="python -m server.api", description=__doc__)
    parser.add_argument("--host", help="address to listen on (default: PROBE_HOST or 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port (default: PROBE_PORT or 8765; 0: any)")
    parser.add_argument(
        "--check",
        action="store_true",
        default=None,
        help="start nothing; exit 0 if the server at this address is ready, else 1",
    )
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    check_only = given.pop("check", False)
    try:
        settings = Settings(**given)
        if check_only:
            return _check(settings)
        app = _prepare(settings)
    except (ConfigError, ValueError) as error:
        print(redact(f"{parser.prog}: {error}"), file=sys.stderr)  # noqa: T201
        return 2
    except ProbeError as error:
        print(redact(f"{parser.prog}: {error}"), file=sys.stderr)  # noqa: T201
        return 1
    try:
        _serve(app, settings)
    finally:
        _end_tracing()
    return 0


def _end_tracing() -> None:
    from server.tracing import end_tracing

    end_tracing()


def _prepare(settings: Settings) -> "FastAPI":
    # here, because a health check runs every few seconds and needs none of it
    from sqlalchemy.exc import OperationalError

    from server.api.app import create_app
    from server.log_format import set_up_logging
    from server.readiness import not_reached
    from server.tracing import set_up_tracing

    set_up_logging(settings)
    set_up_tracing("sharpness-probe-server")
    try:
        return create_app(settings)
    except OperationalError as error:
        raise not_reached(error) from error


def _serve(app: "FastAPI", settings: Settings) -> None:
    import uvicorn

    # What has been imported stays: going through it again and again, as the collector would under
    # load, stops every answer for a tenth of a second each time.
    gc.collect()
    gc.freeze()
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=settings.log_level == "DEBUG",
        server_header=False,
        http=_http_protocol(),
        ws="none",
        # Who asks counts for limits: another's word for it is taken only where the operator says.
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,
        timeout_graceful_shutdown=_GRACE_S,
    )


def _http_protocol() -> Any:
    if importlib.util.find_spec("httptools") is None:
        return "h11"
    from server.api.http_head import BoundedHttpProtocol

    return BoundedHttpProtocol


def _check(settings: Settings) -> int:
    problem = what_is_wrong(settings)
    if problem is not None:
        print(redact(problem), file=sys.stderr)  # noqa: T201
    return 0 if problem is None else 1


if __name__ == "__main__":
    sys.exit(main())
