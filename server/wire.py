"""Wire types of `/v1`: what the server sends and the client reads. Only ever added to."""

import datetime as dt
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from probe.continual_summary import summarise_continual
from probe.mix_summary import summarise_scans
from probe.result import CheckpointRef, Plan
from probe.result_continual import ContinualUnitResult
from probe.result_curves import ContinualSummary
from probe.result_mix import MixScan, MixUnitResult
from probe.result_train import MixTrainUnitResult, TrainTable
from probe.train_summary import summarise_training
from probe.unit_results import AnyUnitResult

# What an import reads; the other files of an export are made from these.
IMPORTED_FILES = ("job.json", "results.json", "events.jsonl")
MANIFEST = "manifest.json"
ARCHIVE_TYPE = "application/x-tar"
JobId = Annotated[str, Field(pattern=r"^job_[0-9a-z]{26}$")]
ExportedName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,60}(\.[a-z0-9-]{1,20}){1,2}$")]

JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
TERMINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})

EventType = Literal[
    "job.queued",
    "job.running",
    "unit.started",
    "unit.progress",
    "unit.retrying",
    "unit.finished",
    "job.succeeded",
    "job.failed",
    "job.cancelled",
]


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True)


class FieldProblem(_Wire):
    """One thing wrong with the input."""

    field: str = Field(description="Dotted path: batches.sources.0.paths.")
    message: str


class Problem(_Wire):
    """An error, as RFC 9457 problem+json."""

    type: str = Field("about:blank", description="URI of the problem type.")
    title: str
    status: int
    detail: str = Field(description="What was wrong, what was found, what to do.")
    code: str = Field(description="Stable, for programs: `ProbeError.code` or `not_found`, ...")
    errors: list[FieldProblem] = Field(default_factory=list)


class JobError(_Wire):
    """Why a job failed."""

    code: str
    message: str
    unit_id: str | None = None


class JobView(_Wire):
    """One job as it stands now."""

    object: Literal["job"] = "job"
    id: str
    kind: str
    name: str
    labels: dict[str, str]
    status: JobStatus
    created_at: dt.datetime
    started_at: dt.datetime | None = None
    finished_at: dt.datetime | None = None
    num_units: int
    num_units_finished: int
    num_units_without_answer: int = Field(
        description="Finished units in which some measurement has no eta_c, or some run diverged."
    )
    num_forward_passes: int = Field(description="Spent so far by finished units.")
    expected_forward_passes: int = Field(description="Of the whole job, from its plan.")
    error: JobError | None = None
    queue: str | None = Field(None, description="gpu or cpu.")
    priority: int = Field(100, description="Place in the queue: 1 first, 10000 last.")
    time_limit_s: float | None = Field(None, description="Seconds from the first start; or none.")
    submitted_by: str | None = Field(None, description="Name of the API key it came with.")
    worker: str | None = Field(None, description="Name of the worker that runs it, while it does.")
    queue_position: int | None = Field(
        None, description="While queued: 1 is the next one taken from its queue."
    )
    estimated_start: dt.datetime | None = Field(
        None,
        description="While queued: about when it starts. None: no live worker takes from its "
        "queue, or no job of that queue has finished yet to tell how long one takes.",
    )
    imported_at: dt.datetime | None = Field(
        None, description="When it was brought here from another server, with its results."
    )
    spec: dict[str, Any]
    spec_sha256: str


class JobList(_Wire):
    """A page of jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[JobView]
    has_more: bool


class ResultList(_Wire):
    """Results of a job's finished units, in unit order."""

    object: Literal["list"] = "list"
    job_id: str
    status: JobStatus
    data: list[AnyUnitResult]
    scans: list[MixScan] = Field(
        default_factory=list,
        description="What a mix scan's units come to, per checkpoint: every point, the sweet spot "
        "and the crossings. Empty for other kinds.",
    )
    trainings: list[TrainTable] = Field(
        default_factory=list,
        description="What a training grid's runs come to, per checkpoint: every task's change, and "
        "up to which learning rate it was unharmed. Empty for other kinds.",
    )
    continual: ContinualSummary | None = Field(
        None,
        description="What the runs of continual learning come to: accuracy over tasks and seeds "
        "per method and control, and how well each bound predicts it. None for other kinds.",
    )

    @classmethod
    def of(cls, job_id: str, status: JobStatus, results: Sequence[AnyUnitResult]) -> Self:
        """The list of these results, with what they come to."""
        scans = summarise_scans(r for r in results if isinstance(r, MixUnitResult))
        runs = summarise_training(r for r in results if isinstance(r, MixTrainUnitResult))
        learned = [r for r in results if isinstance(r, ContinualUnitResult)]
        return cls(
            job_id=job_id,
            status=status,
            data=list(results),
            scans=scans,
            trainings=runs,
            continual=summarise_continual(learned),
        )


class Event(_Wire):
    """Something that happened to a job. `id` counts from 1 within the job, without gaps."""

    id: int
    type: EventType
    at: dt.datetime
    data: dict[str, Any] = Field(
        description="unit.*: unit_id, index. unit.progress also: phase (load, moments, gradient, "
        "search, train, score), done, total, num_forward_passes; of continual learning done and "
        "total are the unit's gradient steps. unit.finished: summary rows, or `scan` for a mix "
        "scan, `run` for a training grid, `stretch` for continual learning. unit.retrying, "
        "job.failed: code, message."
    )


class CheckpointList(_Wire):
    """Checkpoints a series spec stands for, in order."""

    object: Literal["list"] = "list"
    data: list[CheckpointRef]


class GpuView(_Wire):
    """Memory of one GPU of a worker's machine, whoever uses it."""

    index: int
    name: str
    memory_used_bytes: int
    memory_total_bytes: int


class WorkerView(_Wire):
    """A worker process that has reported to this database."""

    name: str
    hostname: str
    pid: int
    queues: list[str]
    device: str
    slots: dict[str, int] = Field(
        default_factory=dict, description="Queue -> how many of its jobs run at once."
    )
    started_at: dt.datetime
    last_heartbeat: dt.datetime
    alive: bool
    current_job_ids: list[str] = Field(default_factory=list)
    gpus: list[GpuView] = Field(
        default_factory=list, description="As nvidia-smi says; empty where there is none."
    )


class WorkerList(_Wire):
    """Workers, most recent heartbeat first."""

    object: Literal["list"] = "list"
    data: list[WorkerView]


class ExportedJob(_Wire):
    """`job.json` of an exported job: everything about it but results and events."""

    view: JobView
    plan: Plan


class ExportedFile(_Wire):
    """One file of an exported job."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    num_bytes: int = Field(ge=0)


class ExportManifest(_Wire):
    """`manifest.json` of an exported job."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    object: Literal["sharpness-probe export"] = "sharpness-probe export"
    format_version: Literal[1] = 1
    job_id: JobId
    complete: bool = Field(description="False: the job had not ended; it cannot be imported.")
    exported_at: dt.datetime
    program_version: str = Field(max_length=100)
    files: dict[ExportedName, ExportedFile] = Field(max_length=100)


class DatabaseState(_Wire):
    """Whether the database answers."""

    ok: bool
    dialect: str = Field(description="sqlite or postgresql.")
    latency_ms: float | None = Field(None, description="Of the three reads that readiness takes.")


class MigrationState(_Wire):
    """Whether the database has the tables this program needs."""

    ok: bool
    found: str | None = Field(None, description="The database's schema revision, where known.")
    needed: str


class Readiness(_Wire):
    """Whether jobs can be taken, and what stands in the way."""

    status: Literal["ok", "not_ready"]
    database: DatabaseState
    migrations: MigrationState
