"""How this process logs: as text or JSON, as `PROBE_LOG_FORMAT` says, and never a secret."""

import logging
import sys

from probe.json_log import JsonFormatter, log_as_json
from server.redaction import learn_settings, protect_output, protect_tracebacks, redact
from server.settings import Settings

_TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class RedactedJsonFormatter(JsonFormatter):
    """JSON whose texts are redacted before they are quoted: afterwards a quote may get lost."""

    def clean(self, text: str) -> str:
        """The text without secrets."""
        return redact(text)


def set_up_logging(settings: Settings, **fields: str) -> None:
    """Log to stderr; call it once, before anything is logged.

    Args:
        settings: Format, level, and what must not be shown.
        fields: What every JSON record of this process carries, its worker for example.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of every step of its own
    if settings.log_format == "json":
        learn_settings(settings)
        protect_tracebacks()
        log_as_json(RedactedJsonFormatter(**fields), settings.log_level)
        return
    logging.basicConfig(level=settings.log_level, format=_TEXT, stream=sys.stderr)
    protect_output(settings)
