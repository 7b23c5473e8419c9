"""Log records as JSON, one object per line, for programs that collect logs. Torch-free.

Keys: `time` (UTC), `level`, `logger`, `message`; whatever a record carries beside (`event`,
`job_id`, `unit_id`, `rank`, `worker`, `step`, ...); `exception`, the traceback, where there is one.
"""

import datetime as dt
import json
import logging
import math
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType, TracebackType
from typing import Any

JOB_ID = "PROBE_JOB_ID"  # in a rank's environment: the job that its log names
_NO_FIELDS: Mapping[str, Any] = MappingProxyType({})
_fields: ContextVar[Mapping[str, Any]] = ContextVar("log_fields", default=_NO_FIELDS)
_logger = logging.getLogger(__name__)
# What every record has; anything else was given with `extra`.
_ORDINARY = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


@contextmanager
def log_fields(**fields: Any) -> Iterator[None]:
    """Every JSON record made inside, in this task or thread, carries these fields too."""
    token = _fields.set({**_fields.get(), **fields})
    try:
        yield
    finally:
        _fields.reset(token)


class JsonFormatter(logging.Formatter):
    """Makes one line of JSON of a record; lines of its message are one string."""

    def __init__(self, **fields: Any) -> None:
        """Every record carries `fields`; those of `log_fields` and its own come before them."""
        super().__init__()
        self._constant = fields

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        found = {
            "time": dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(
                timespec="milliseconds"
            ),
            "level": record.levelname,
            "logger": record.name,
            "message": self.clean(record.getMessage()),
        }
        own = {name: value for name, value in vars(record).items() if name not in _ORDINARY}
        for name, value in {**self._constant, **_fields.get(), **own}.items():
            found.setdefault(name, self._plain(value))
        if record.exc_info:
            found["exception"] = self.clean(self.formatException(record.exc_info))
        if record.stack_info:
            found["stack"] = self.clean(record.stack_info)
        return json.dumps(found, ensure_ascii=False)

    def clean(self, text: str) -> str:
        """A text of the record as it is written; for those who leave something out."""
        return text

    def _plain(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        return self.clean(str(value))


def log_as_json(formatter: JsonFormatter, level: str | int = "INFO") -> None:
    """Send every record of this process to stderr through `formatter`, and no line past it.

    Warnings and the tracebacks of exceptions nobody catches become records too.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_of_thread


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    _logger.critical(
        "%s: %s", kind.__name__, error, exc_info=(kind, error, trace), extra={"event": "uncaught"}
    )


def _log_of_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
