"""Checksums of a file as it arrives, and what a server says they should be (torch-free)."""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Mapping

_BLOCK = 1 << 20


class Digests:
    """sha256, md5 and size of bytes fed in order."""

    def __init__(self) -> None:
        """Of nothing yet."""
        self._sha256 = hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False)  # what object stores give as ETag
        self.num_bytes = 0

    def feed(self, block: bytes) -> None:
        """Add the next bytes."""
        self._sha256.update(block)
        self._md5.update(block)
        self.num_bytes += len(block)

    @property
    def sha256(self) -> str:
        """In hexadecimal."""
        return self._sha256.hexdigest()

    @property
    def md5(self) -> str:
        """In hexadecimal."""
        return self._md5.hexdigest()

    def of(self, algorithm: str) -> str:
        """`sha256` or `md5`, in hexadecimal."""
        return self.sha256 if algorithm == "sha256" else self.md5


def stated_checksums(headers: Mapping[str, str]) -> dict[str, str]:
    """Checksums a server vouches for in its answer: algorithm -> hexadecimal digest.

    Read from `Repr-Digest` and `Digest` (RFC 9530, RFC 3230), `Content-MD5` and `x-goog-hash`.
    ETag is left out: it may be an md5, or look like one. See `etag_md5`.
    """
    found: dict[str, str] = {}
    fields = [("md5", headers.get("content-md5", ""))]
    for name in ("repr-digest", "digest", "x-goog-hash"):
        for part in headers.get(name, "").split(","):
            algorithm, _, value = part.strip().partition("=")
            fields.append((algorithm.strip().lower().replace("-", ""), value.strip().strip(":")))
    for algorithm, value in fields:
        digest = _from_base64(value)
        if algorithm in ("md5", "sha256") and len(digest) == {"md5": 32, "sha256": 64}[algorithm]:
            found[algorithm] = digest
    return found


def etag_md5(etag: str | None) -> str | None:
    """The md5 an ETag may be: 32 hexadecimal digits, as object stores give for simple uploads."""
    match = re.fullmatch(r'"([0-9a-f]{32})"', etag or "")
    return match[1] if match else None


def sha256_in(text: str) -> str | None:
    """The digest in a `.sha256` file: the first word of 64 hexadecimal digits."""
    match = re.search(r"\b[0-9a-fA-F]{64}\b", text)
    return match[0].lower() if match else None


def feed_file(digests: Digests, blocks: Iterable[bytes]) -> None:
    """Feed every block."""
    for block in blocks:
        digests.feed(block)


def _from_base64(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).hex()
    except (binascii.Error, ValueError):
        return ""
