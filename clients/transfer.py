"""A job as a folder: written from one server, read into another.

    JOB_ID/
      manifest.json    format version, and sha256 and size of every other file
      job.json         the job as it stood, and its plan
      results.json     every unit's result; what else is below is made from it
      results.parquet  one row per search (of other kinds see `probe results --help`)
      events.jsonl     one event a line
      chart.svg, chart.png, chart.vl.json

The hashes tell accidents, not forgeries: whoever can change a file can change the manifest.
"""

import datetime as dt
import hashlib
import io
import os
import re
import shutil
import tarfile
from pathlib import Path

from pydantic import ValidationError

from clients.http import ProbeClient
from probe import __version__
from probe.errors import ConfigError
from server.wire import (
    IMPORTED_FILES,
    MANIFEST,
    TERMINAL,
    ExportedFile,
    ExportedJob,
    ExportManifest,
    JobView,
)

_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
_CHARTS = {"chart.svg": "svg", "chart.png": "png", "chart.vl.json": "vega"}


class ExportError(ConfigError):
    """A job cannot be exported, or a folder is no whole export."""

    code = "export_invalid"


def export_job(
    client: ProbeClient, job_id: str, parent: Path, *, partial: bool = False
) -> tuple[Path, ExportManifest]:
    """Write one job as a folder named after it; appears whole or not at all.

    Args:
        client: Of the server that has the job.
        job_id: The job.
        parent: Where the folder goes; made if need be.
        partial: Also a job that has not ended, as far as it is; it cannot be imported.

    Raises:
        ExportError: It has not ended and `partial` is not set, or the folder is there already.
        NotFoundError: There is no such job.
    """
    view = client.job(job_id)
    if not _ID.fullmatch(view.id):  # it becomes a path here
        raise ExportError(f"the server tells of a job {view.id[:60]!r}, which is no job's id")
    if view.status not in TERMINAL and not partial:
        raise ExportError(
            f"job {view.id} is {view.status}: wait for its end, or export what there is with "
            "--partial, which cannot be imported"
        )
    target, unfinished = parent / view.id, parent / f".{view.id}.{os.getpid()}"
    if target.exists():
        raise ExportError(f"{target} is there already: remove it, or choose another --out")
    try:
        unfinished.mkdir(parents=True)
        manifest = _write(unfinished, view, _contents(client, view))
        unfinished.rename(target)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target, manifest


def _contents(client: ProbeClient, view: JobView) -> dict[str, bytes]:
    job = ExportedJob(view=view, plan=client.job_plan(view.id))
    files = {
        "job.json": job.model_dump_json(indent=2).encode() + b"\n",
        "results.json": client.results_file(view.id, "json"),
        "events.jsonl": client.event_log(view.id),
    }
    if view.num_units_finished:
        files["results.parquet"] = client.results_file(view.id, "parquet")
        for name, format in _CHARTS.items():
            files[name] = client.chart(view.id, format)  # type: ignore[arg-type]
    return files


def _write(directory: Path, view: JobView, files: dict[str, bytes]) -> ExportManifest:
    for name, content in files.items():
        (directory / name).write_bytes(content)
    manifest = ExportManifest(
        job_id=view.id,
        complete=view.status in TERMINAL,
        exported_at=dt.datetime.now(dt.UTC),
        program_version=__version__,
        files={name: _described(content) for name, content in sorted(files.items())},
    )
    (directory / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    return manifest


def _described(content: bytes) -> ExportedFile:
    return ExportedFile(sha256=hashlib.sha256(content).hexdigest(), num_bytes=len(content))


def exports_in(directory: Path) -> list[Path]:
    """The exported jobs of a folder: itself, or those in it.

    Raises:
        ExportError: There is none.
    """
    if (directory / MANIFEST).is_file():
        return [directory]
    found = sorted(path.parent for path in directory.glob(f"*/{MANIFEST}"))
    if not found:
        raise ExportError(f"{directory} holds no exported job: none has a {MANIFEST}")
    return found


def import_job(client: ProbeClient, directory: Path) -> tuple[JobView, bool]:
    """Bring an exported job to a server; the job, and False where it was there already.

    Raises:
        ExportError: A file is missing or changed, or the job had not ended.
        ApiError: The server refuses it.
    """
    return client.import_archive(_archive(directory, read_manifest(directory)))


def read_manifest(directory: Path) -> ExportManifest:
    """The manifest of an exported job, every file of it compared.

    Raises:
        ExportError: It is none, or a file is missing or changed.
    """
    try:
        manifest = ExportManifest.model_validate_json((directory / MANIFEST).read_bytes())
        for name, listed in manifest.files.items():
            if _described((directory / name).read_bytes()) != listed:
                raise ExportError(f"{directory / name} is not the file that {MANIFEST} lists")
    except OSError as error:
        raise ExportError(f"cannot read {error.filename}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(whole)"
        raise ExportError(f"{directory / MANIFEST}: {where}: {first['msg']}") from error
    if not manifest.complete:
        raise ExportError(f"{directory}: the job had not ended when it was exported")
    return manifest


def _archive(directory: Path, manifest: ExportManifest) -> bytes:
    """What is sent: the manifest and the files that the others are made from."""
    missing = [name for name in IMPORTED_FILES if name not in manifest.files]
    if missing:
        raise ExportError(f"{directory / MANIFEST} does not list {', '.join(missing)}")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in (MANIFEST, *IMPORTED_FILES):
            content = (directory / name).read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()
