"""For those who receive webhooks: is this one really from the server that shares our secret?

    from clients.webhooks import verify_webhook

    event = verify_webhook(secret, headers["X-Probe-Signature"], body)
    print(event["type"], event["job"]["id"])

A delivery can come more than once, always under the same `X-Probe-Delivery`: remember those seen.
"""

import hashlib
import hmac
import json
import re
import time
from typing import Any

from clients.errors import ClientError

SIGNATURE_HEADER = "X-Probe-Signature"
DELIVERY_HEADER = "X-Probe-Delivery"
_FORM = re.compile(r"t=(\d{1,12})((?:,v1=[0-9a-f]{64})+)", re.ASCII)


class WebhookSignatureError(ClientError):
    """A webhook is not signed with our secret, or is too old to be believed."""

    code = "webhook_signature"


def verify_webhook(
    secret: str,
    header: str,
    body: bytes,
    tolerance_s: float = 300.0,
    *,
    now: float | None = None,
) -> dict[str, Any]:
    """The content of a webhook, once its signature has been checked in constant time.

    Args:
        secret: `PROBE_WEBHOOK_SECRET` of the server.
        header: `X-Probe-Signature`: t=<seconds>,v1=<HMAC-SHA256 of "t.body", hex>.
        body: The request's body as it came, byte for byte, before any parsing.
        tolerance_s: How far its time may be from ours; keeps an old one from being played again.
        now: Seconds since the epoch; None: this machine's clock.

    Returns:
        type (job.succeeded, job.failed, job.cancelled), delivery, timestamp, and job as
        `GET /v1/jobs/{id}` shows it, without its spec.

    Raises:
        WebhookSignatureError: Not to be believed; answer 400.
    """
    match = _FORM.fullmatch(header)
    if match is None:
        raise WebhookSignatureError(
            f"{SIGNATURE_HEADER} must read t=...,v1=..., found another form"
        )
    expected = hmac.new(
        secret.encode(), match[1].encode() + b"." + body, hashlib.sha256
    ).hexdigest()
    given = match[2].removeprefix(",v1=").split(",v1=")
    if not any([hmac.compare_digest(expected, one) for one in given]):
        raise WebhookSignatureError("the webhook is signed with another secret, or was changed")
    age_s = (time.time() if now is None else now) - int(match[1])
    if abs(age_s) > tolerance_s:
        raise WebhookSignatureError(
            f"the webhook was signed {age_s:.0f} s ago, allowed are {tolerance_s:.0f} s: it is an "
            "old one sent again, or the clocks differ"
        )
    try:
        content = json.loads(body)
    except ValueError as error:
        raise WebhookSignatureError("the webhook's body is no JSON") from error
    if not isinstance(content, dict):
        raise WebhookSignatureError("the webhook's body is no JSON object")
    return content
