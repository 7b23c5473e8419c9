"""What a receiver believes: computed here by hand from the documented form."""

import hashlib
import hmac
import json
import re

import pytest

from clients.webhooks import WebhookSignatureError, verify_webhook

SECRET = "a secret of the receiver's"
BODY = json.dumps({"type": "job.succeeded", "job": {"id": "x"}}).encode()
NOW = 1_700_000_000


def signed(secret: str = SECRET, body: bytes = BODY, at: int = NOW) -> str:
    digest = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256)
    return f"t={at},v1={digest.hexdigest()}"


def test_what_is_signed_is_believed() -> None:
    assert verify_webhook(SECRET, signed(), BODY, now=NOW) == json.loads(BODY)
    for age in (-300, 300):
        verify_webhook(SECRET, signed(), BODY, now=NOW + age)
    # While a secret is changed a sender may sign with both.
    both = signed("the old secret") + "," + signed().partition(",")[2]
    verify_webhook(SECRET, both, BODY, now=NOW)


@pytest.mark.parametrize(
    ("header", "body", "now", "reason"),
    [
        (signed("another"), BODY, NOW, "another secret"),
        (signed(), BODY + b" ", NOW, "changed"),
        (signed().replace(f"t={NOW}", f"t={NOW + 1}"), BODY, NOW, "changed"),
        (signed(), BODY, NOW + 301, "301 s ago"),
        (signed(), BODY, NOW - 301, "-301 s ago"),
        (signed(body=b"[]"), b"[]", NOW, "no JSON object"),
        (signed(body=b"{"), b"{", NOW, "no JSON"),
        ("", BODY, NOW, "another form"),
        (f"t={NOW}", BODY, NOW, "another form"),
        (f"t={NOW},v1=", BODY, NOW, "another form"),
        ("t=\u0661,v1=" + "0" * 64, BODY, NOW, "another form"),
        (f"t={NOW},v1={'0' * 64}", BODY, NOW, "another secret"),
    ],
)
def test_anything_else_is_not(header: str, body: bytes, now: int, reason: str) -> None:
    with pytest.raises(WebhookSignatureError, match=re.escape(reason)) as caught:
        verify_webhook(SECRET, header, body, now=now)
    assert SECRET not in str(caught.value)
    assert (caught.value.code, caught.value.retryable) == ("webhook_signature", False)


def test_a_real_delivery_would_be_believed() -> None:
    from server.webhooks import signature

    assert signature(SECRET, NOW, BODY.decode()) == signed()
