"""Take secrets out of text before it is logged, stored with a job, or sent.

Two nets: values this process knows to be secret (its settings and its environment), and forms that
secrets have (API keys, hub tokens, passwords in addresses, Authorization headers).
"""

import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterable
from types import TracebackType
from urllib.parse import quote, quote_plus

from server.settings import Settings

_GONE = "[secret]"
_MIN_LENGTH = 6  # of a value; taking shorter ones out would take words out
_SECRET_NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|API_KEYS?|ACCESS_KEY|CREDENTIALS|OTLP_HEADERS)$"
)
_FORMS = (
    (re.compile(r"(spk_[a-z0-9]{4,32}_)[A-Za-z0-9_-]{8,}"), rf"\1{_GONE}"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), _GONE),
    (
        # A scheme of bounded length: unbounded, a long word takes time that goes by its square.
        re.compile(r"([a-z][a-z0-9+.-]{0,30}://[^\s/:@'\"]*):[^\s/@'\"]+@", re.IGNORECASE),
        rf"\1:{_GONE}@",
    ),
    (
        re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?\w+)\s+[^\s'\",]+", re.IGNORECASE),
        rf"\1 {_GONE}",
    ),
    (re.compile(r"\bBearer\s+[A-Za-z0-9._~+/=-]{8,}"), f"Bearer {_GONE}"),
    (re.compile(r"\b(password|passwd)=[^\s'\"&]+", re.IGNORECASE), rf"\1={_GONE}"),
)
# All that a terminal obeys, but tabs and line feeds.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_values: frozenset[str] = frozenset()
_known = re.compile(r"(?!)")  # the values, the longest first; nothing before `learn`


def redact(text: str) -> str:
    """The text without what is known or looks to be a secret."""
    text = _known.sub(_GONE, text)
    for form, replacement in _FORMS:
        text = form.sub(replacement, text)
    return text


def learn(values: Iterable[str]) -> None:
    """Take these values out from now on, however they are written in JSON or an address."""
    global _values, _known
    long_enough = {value for value in values if len(value) >= _MIN_LENGTH}
    forms = {
        form
        for value in long_enough
        for form in (
            *(value, json.dumps(value)[1:-1], repr(value)[1:-1]),
            *(quote(value), quote(value, safe=""), quote_plus(value)),
        )
    }
    _values |= forms
    longest_first = sorted(_values, key=len, reverse=True)
    _known = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def learn_settings(settings: Settings) -> None:
    """`learn` the secrets of the settings and of this process's environment."""
    from sqlalchemy import make_url  # a health check, which needs `redact` only, starts quicker

    secrets = [key.get_secret_value() for key in settings.api_keys]
    if settings.webhook_secret is not None:
        secrets.append(settings.webhook_secret.get_secret_value())
    password = make_url(settings.database_url).password
    if password is not None:
        secrets.append(str(password))
    secrets += [value for name, value in os.environ.items() if _SECRET_NAME.search(name)]
    learn(secrets)


class RedactingFormatter(logging.Formatter):
    """What another formatter makes of a record, tracebacks included, without secrets."""

    def __init__(self, inner: logging.Formatter) -> None:
        """Wrap `inner`."""
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """The line or lines of a record; those after the first are set in, so none looks like one.

        What it tells of may be a stranger's words: the end of a log, the name of a job.
        """
        text = _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", redact(self.inner.format(record)))
        return text.replace("\n", "\n    ")


def protect_output(settings: Settings) -> None:
    """Redact every log line and traceback of this process from now on.

    Call it once logging is set up; handlers added later are not covered.
    """
    learn_settings(settings)
    protect_tracebacks()
    for name in (None, "uvicorn", "uvicorn.error", "uvicorn.access", "dbos"):
        for handler in logging.getLogger(name).handlers:
            inner = handler.formatter or logging.Formatter()
            if not isinstance(inner, RedactingFormatter):
                handler.setFormatter(RedactingFormatter(inner))


def protect_tracebacks() -> None:
    """Redact what is printed of exceptions that nobody catches."""
    sys.excepthook = _print_redacted
    threading.excepthook = _print_of_thread


def _print_redacted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _print_of_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        _print_redacted(args.exc_type, args.exc_value, args.exc_traceback)
