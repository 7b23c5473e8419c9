"""Webhooks: which addresses a job may name, and what is queued to be sent when it ends.

An address must name a host of the operator's list, by https; http goes to this machine only.
What its name resolves to is checked before every delivery (`server.webhook_sender`).
"""

import hashlib
import hmac
import ipaddress
import json
import socket
import uuid
from collections.abc import Iterable
from typing import Literal
from urllib.parse import urlsplit

import sqlalchemy as sa

from server.job_views import time_of
from server.tables import webhook_deliveries
from server.wire import JobView

SIGNATURE = "X-Probe-Signature"
DELIVERY = "X-Probe-Delivery"
_DEFAULT_PORT = {"https": 443, "http": 80}
Listing = Literal["address", "host", "suffix"]  # how the allow-list names a host
IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
# Where clouds tell a machine its own credentials; link-local ones are refused as such.
_METADATA = frozenset(
    ipaddress.ip_address(a) for a in ("fd00:ec2::254", "100.100.100.200", "168.63.129.16")
)


def fault_of_webhook(url: str, hosts: Iterable[str], *, has_secret: bool) -> str | None:
    """What keeps a job from having this webhook, in words for whoever submits it; None: nothing.

    Args:
        url: As `probe.spec_base` let it pass.
        hosts: The allow-list: `host`, `*.suffix`, either with `:port`.
        has_secret: Whether deliveries can be signed.
    """
    if not has_secret:
        return "this server sends no webhooks: its operator has to set PROBE_WEBHOOK_SECRET"
    parts = urlsplit(url)
    host, port = _host_and_port(url)
    if parts.scheme == "http" and not is_own_host(host):
        return "must begin with https://: http is for this machine's own addresses"
    if listing_of(host, port, parts.scheme, hosts) is None:
        named = f"{host}:{port}" if port != _DEFAULT_PORT[parts.scheme] else host
        return f"{named[:200]} is none of the hosts its operator allows (PROBE_WEBHOOK_HOSTS)"
    return None


def listing_of(host: str, port: int, scheme: str, hosts: Iterable[str]) -> Listing | None:
    """How the allow-list names this host; None where it does not. The nearest entry counts.

    An entry without a port stands for the scheme's own.
    """
    found: set[Listing] = set()
    for entry in hosts:
        name, given = _split_entry(entry)
        if (_DEFAULT_PORT[scheme] if given is None else given) != port:
            continue
        if name == host:
            found.add("address" if _parsed(host) else "host")
        elif name.startswith("*.") and host.endswith(name[1:]) and not _parsed(host):
            found.add("suffix")
    return next((kind for kind in ("address", "host", "suffix") if kind in found), None)


def fault_of_address(address: str, host: str, listing: Listing) -> str | None:
    """What keeps a delivery from going to this address, which a host's name resolved to.

    Names resolve to what others say. So metadata, link-local and multicast addresses are refused,
    and loopback but for `localhost`; private ones where only the host's suffix is listed.
    """
    found = _parsed(address)
    if found is None:
        return "its name resolved to no address"
    if listing == "address":
        return None
    if found.is_loopback and host == "localhost":
        return None
    refused = (
        found in _METADATA
        or found.is_loopback
        or found.is_link_local
        or found.is_multicast
        or found.is_unspecified
        or (found.is_reserved and not found.is_global)
    )
    if refused or (listing == "suffix" and not found.is_global):
        return f"its name resolved to {found}, where nothing is sent"
    return None


def is_own_host(host: str) -> bool:
    """Whether the name can only mean this machine."""
    found = _parsed(host)
    return host == "localhost" if found is None else found.is_loopback


def queue_delivery(
    connection: sa.Connection, *, url: str, type: str, view: JobView, at_ms: int
) -> None:
    """Leave a delivery for `server.webhook_sender`, in the transaction that ends the job."""
    delivery = str(uuid.uuid4())
    body = {
        "type": type,
        "delivery": delivery,
        "timestamp": time_of(at_ms).isoformat(),
        "job": view.model_dump(mode="json", exclude={"spec"}),
    }
    connection.execute(
        sa.insert(webhook_deliveries).values(
            id=delivery,
            job_id=view.id,
            url=url,
            body=json.dumps(body, separators=(",", ":")),
            created_at=at_ms,
            num_attempts=0,
            next_attempt_at=at_ms,
        )
    )


def signature(secret: str, timestamp: int, body: str) -> str:
    """The signature header of a body sent at this second: `t=...,v1=<HMAC-SHA256 of t.body>`."""
    signed = hmac.new(secret.encode(), f"{timestamp}.{body}".encode(), hashlib.sha256)
    return f"t={timestamp},v1={signed.hexdigest()}"


def _host_and_port(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or _DEFAULT_PORT[parts.scheme]


def _split_entry(entry: str) -> tuple[str, int | None]:
    if entry.startswith("["):
        name, _, rest = entry[1:].partition("]")
        port = rest.removeprefix(":")
    else:
        name, _, port = entry.partition(":")
    return name, int(port) if port else None


def _parsed(text: str) -> IpAddress | None:
    """The address a text is, an IPv4 one inside an IPv6 one unwrapped; None where it is a name."""
    try:
        found: IpAddress = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return _old_form(text)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or _nat64(found)
        return found if inner is None else inner
    return found


def _old_form(text: str) -> IpAddress | None:
    # 127.1, 0x7f000001 and 2130706433 are 127.0.0.1 to every resolver.
    try:
        return ipaddress.IPv4Address(socket.inet_aton(text)) if text[:1].isdigit() else None
    except (OSError, ValueError):
        return None


def _nat64(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address not in ipaddress.ip_network("64:ff9b::/96"):
        return None
    return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
