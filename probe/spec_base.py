"""What every job spec is made of: the strict model, and the fields that all kinds share."""

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

DEFAULT_PRIORITY = 100
# For people, filters and the queue: what a job measures does not depend on them.
NOT_MEASURED = ("name", "labels", "priority", "time_limit_s", "webhook")


class SpecModel(BaseModel):
    """Every part of a job spec: no unknown keys, no silent conversions, not changed once made."""

    # strict: `repeats: yes` or "4" is an error, not 1 or 4.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


JobName = Annotated[str, Field(min_length=1, max_length=200, description="For people.")]
Labels = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9._/-]{1,63}$")],
        Annotated[str, Field(max_length=255)],
    ],
    Field(max_length=32, description="For filters: project=demo."),
]


class JobFields(SpecModel):
    """Fields of every kind of job, beside what it measures."""

    kind: str
    name: JobName
    labels: Labels = Field(default_factory=dict)
    priority: int = Field(
        DEFAULT_PRIORITY,
        ge=1,
        le=10_000,
        description="Place in the queue: 1 first, 10000 last; equal ones in the order they came. "
        "Below 100 needs an admin key where keys are asked for. `probe run` has no queue.",
    )
    time_limit_s: float | None = Field(
        None,
        gt=0,
        le=10_000_000,
        description="Seconds after its first start at which an unfinished job fails with "
        "time_limit_exceeded, interruptions included. None: no limit.",
    )
    webhook: str | None = Field(
        None,
        exclude=True,  # its path may be a secret: kept out of what is shown, stored and hashed
        max_length=2000,
        description="http(s) address told when the job has ended, signed; its host must be one "
        "the server allows. Left out of every answer. `probe run` calls none.",
    )

    @field_validator("webhook")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None:
            _check_webhook(value)
        return value


def _check_webhook(value: str) -> None:
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port  # the port is checked when it is read
    except ValueError:
        raise ValueError("is not an address") from None
    if parts.fragment or not re.fullmatch(r"[!-~]+", value) or "\\" in value:
        raise ValueError("must be plain ASCII without spaces, backslashes or a fragment")
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError("must begin with https:// or http:// and name a host")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold a user name or a password; answers are signed instead")
