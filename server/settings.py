"""Settings of the HTTP server and the worker: `PROBE_*` environment variables, with defaults.

Lists are written `a:b` (paths), `a,b` (the others) or as JSON.
"""

import json
import os
import re
import socket
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

Queue = Literal["gpu", "cpu"]
_WEBHOOK_HOST = re.compile(
    r"((\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?"
)


def _split(value: Any, separator: str) -> Any:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [part.strip() for part in value.split(separator) if part.strip()]


def _default_data_dir() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "sharpness-probe"


class Settings(BaseSettings):
    """One object for both processes; each reads the part it needs."""

    model_config = SettingsConfigDict(
        env_prefix="PROBE_",
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,  # it may be a secret
    )

    data_dir: Path = Field(
        default_factory=_default_data_dir,
        description="Database, logs and locks; a local disk, never a network share.",
    )
    database_url: str = Field(
        default_factory=lambda data: f"sqlite:///{data['data_dir'] / 'probe.db'}",
        pattern=r"^(sqlite:///.|postgresql\+psycopg://)",
        description="sqlite:///path (default: probe.db in data_dir) or postgresql://...",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Of our own records; the queue's are never below WARNING."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="json: one object per line, with job, unit, rank and worker."
    )

    host: str = Field("127.0.0.1", description="Address the HTTP server listens on.")
    port: int = Field(8765, ge=0, le=65535, description="0: any free port.")
    roots: Annotated[list[Path], NoDecode] = Field(
        default_factory=list,
        description="Directories jobs may read. Empty: any, accepted on loopback only.",
    )
    api_keys: Annotated[list[Annotated[SecretStr, Field(min_length=1)]], NoDecode] = Field(
        default_factory=list,
        description="Accepted bearer keys. Empty: no key asked, accepted on loopback only.",
    )

    hub_repos: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        description="Patterns of hub repositories jobs may name, models and data sets: allenai/*. "
        "One with :// is for optimizer states: https://host/*. Empty: any.",
    )
    rate_limit_per_s: float = Field(
        50.0, gt=0, description="Requests a second of one API key, without keys of one address."
    )
    rate_limit_burst: int = Field(200, ge=1, description="So many at once before that counts.")
    max_event_streams: int = Field(
        500, ge=1, description="Event streams open at once of one API key or address."
    )
    max_body_bytes: int = Field(
        1 << 20, ge=1024, le=1 << 30, description="Of a request's body, sent in chunks or not."
    )
    max_import_bytes: int = Field(
        64 << 20, ge=1024, le=1 << 32, description="Of an exported job that is imported."
    )
    webhook_secret: SecretStr | None = Field(
        None,
        min_length=16,
        description="Signs what jobs' webhooks are sent. None: jobs with a webhook are refused.",
    )
    webhook_hosts: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        description="Hosts a webhook may name: host, *.suffix, either with :port. Empty: none.",
    )

    worker_name: str = Field(
        default_factory=lambda: f"{socket.gethostname()}-0",
        pattern=r"^[A-Za-z0-9._-]{1,100}$",
        description="Stable over restarts: a restarted worker picks up the jobs under its name.",
    )
    queues: Annotated[tuple[Queue, ...], NoDecode] = Field(
        ("gpu", "cpu"),
        min_length=1,
        description="gpu takes jobs with model.device auto or cuda, one at a time per worker; "
        "cpu takes those with model.device cpu.",
    )
    cpu_slots: int = Field(1, ge=1, le=256, description="Jobs of queue cpu at once per worker.")
    queue_poll_s: float = Field(0.5, gt=0, le=60, description="How often a queue is looked at.")
    heartbeat_s: float = Field(10.0, gt=0, le=600, description="Time between heartbeats.")
    worker_stale_s: float = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        validate_default=True,  # it has to fit the heartbeat
        description="How long a worker may be silent before it counts as dead and its jobs go to "
        "others; the same for every worker of a database, at least 4 heartbeats.",
    )
    unit_max_attempts: int = Field(
        3, ge=1, le=100, description="Tries of one unit before its job fails."
    )
    unit_retry_interval_s: float = Field(
        10.0, ge=0, le=3600, description="Wait before the second try."
    )
    unit_retry_backoff: float = Field(
        2.0, ge=1, le=10, description="Factor on the wait for each further try."
    )
    unit_no_progress_s: float = Field(
        1800.0,
        gt=0,
        description="A gang that reports nothing for longer is ended, the unit retried.",
    )
    collective_timeout_s: float = Field(
        600.0,
        gt=0,
        description="A rank that waits longer for the others fails, and its unit is retried.",
    )
    gang_start_s: float = Field(
        300.0, gt=0, description="Time a gang has from its start until it reports ready."
    )
    max_dispatches: int = Field(
        20,
        ge=1,
        description="A job whose worker dies this often without finishing a unit fails.",
    )
    rank_command: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Instead of torchrun with as many ranks of `probe.rank` as the job needs, JSON "
        "list; `{socket}` and `{ranks}` are filled in. Launcher ray: instead of one `probe.rank`.",
    )
    launcher: Literal["local", "ray"] = Field(
        "local",
        description="local: ranks on this machine; ray: on the nodes of a Ray cluster this machine "
        "belongs to, which jobs with parallel.nodes above 1 need.",
    )
    ray_address: str = Field(
        "auto",
        pattern=r"^(auto|[^\s/:]+:[0-9]{1,5})$",
        description="HOST:PORT of the cluster's head; auto: the cluster running on this machine.",
    )
    ray_listen_host: str | None = Field(
        None,
        description="Address of this machine that the cluster's nodes reach, for the ranks' "
        "reports; None: the one on the way to the cluster's head.",
    )
    ray_wait_s: float = Field(
        300.0, gt=0, description="How long a gang waits for free nodes before its try fails."
    )

    worker_metrics_port: int | None = Field(
        None, ge=0, le=65535, description="Of the worker's own /metrics; None: there is none."
    )
    worker_metrics_host: str = Field(
        "127.0.0.1", description="Address of the worker's /metrics, which asks for no key."
    )

    @field_validator("worker_stale_s")
    @classmethod
    def _several_heartbeats(cls, value: float, info: ValidationInfo) -> float:
        heartbeat_s = info.data.get("heartbeat_s", value)
        if value < 4 * heartbeat_s:
            raise ValueError(
                f"{value:g} s is less than 4 heartbeats of {heartbeat_s:g} s: a worker would count "
                "as dead for one heartbeat that came late; raise it, or lower heartbeat_s"
            )
        return value

    @field_validator("database_url", mode="before")
    @classmethod
    def _with_driver(cls, value: Any) -> Any:
        if isinstance(value, str) and not re.match(r"(sqlite:///.|postgres)", value):
            raise ValueError("must be sqlite:///PATH or postgresql://USER@HOST/NAME")
        return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", value, count=1)

    @field_validator("roots", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        return _split(value, os.pathsep)

    @field_validator(
        *("api_keys", "hub_repos", "webhook_hosts", "queues", "rank_command"), mode="before"
    )
    @classmethod
    def _names(cls, value: Any) -> Any:
        return _split(value, ",")

    @field_validator("webhook_hosts", mode="after")
    @classmethod
    def _are_hosts(cls, value: list[str]) -> list[str]:
        for entry in value:
            if not _WEBHOOK_HOST.fullmatch(entry):
                raise ValueError(f"{entry!r} is no host: write host, *.suffix, host:port or [::1]")
        return [entry.lower() for entry in value]

    @field_validator("roots", mode="after")
    @classmethod
    def _absolute(cls, value: list[Path]) -> list[Path]:
        return [path.expanduser().resolve() for path in value]

    @field_validator("data_dir", mode="after")
    @classmethod
    def _expanded(cls, value: Path) -> Path:
        return value.expanduser().absolute()
