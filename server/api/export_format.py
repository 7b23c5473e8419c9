"""Read an exported job from a tar archive: nothing in it is believed, nothing is written to disk.

The archive holds the manifest and the files an import needs, as plain files at its top. Names are
compared with the known ones and never used as paths.
"""

import hashlib
import tarfile
from typing import IO, Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from probe.unit_results import AnyUnitResult
from server.api.bodies import parse_json
from server.api.problems import ProblemError
from server.errors import ExportHashError, ExportIncompleteError, InvalidExportError
from server.transfer import JobRecord, check_record
from server.wire import IMPORTED_FILES, MANIFEST, Event, ExportedJob, ExportManifest

Model = TypeVar("Model", bound=BaseModel)
Value = TypeVar("Value")

_NAMES = (MANIFEST, *IMPORTED_FILES)
_RESULT: TypeAdapter[AnyUnitResult] = TypeAdapter(AnyUnitResult)


def read_archive(file: IO[bytes]) -> JobRecord:
    """The job in an archive, checked.

    Raises:
        ExportHashError: A file is not the one the manifest lists.
        ExportIncompleteError: The job had not ended when it was exported.
        InvalidExportError: Anything else is wrong; the message names the file.
        SpecError: The job's spec is none that this program knows.
    """
    found = _members(file)
    manifest = _model(ExportManifest, MANIFEST, found[MANIFEST])
    if not manifest.complete:
        raise ExportIncompleteError(
            f"job {manifest.job_id} had not ended when it was exported: export it again"
        )
    for name in IMPORTED_FILES:
        _check_hash(manifest, name, found[name])
    record = _record(found, manifest.job_id)
    check_record(record)
    return record


def _members(file: IO[bytes]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                # A sparse file would unfold to whatever size it states.
                if member.name not in _NAMES or not member.isreg() or member.issparse():
                    raise InvalidExportError(
                        f"the archive holds {member.name[:100]!r}; it must hold the plain files "
                        f"{', '.join(_NAMES)} and nothing else"
                    )
                if member.name in found:
                    raise InvalidExportError(f"the archive holds {member.name} twice")
                content = archive.extractfile(member)
                assert content is not None  # of a regular file
                found[member.name] = content.read()
    except (tarfile.TarError, ValueError, OverflowError, OSError, EOFError) as error:
        raise InvalidExportError(f"the body is no tar archive: {str(error)[:200]}") from error
    missing = [name for name in _NAMES if name not in found]
    if missing:
        raise InvalidExportError(f"the archive lacks {', '.join(missing)}")
    return found


def _check_hash(manifest: ExportManifest, name: str, content: bytes) -> None:
    listed = manifest.files.get(name)
    if listed is None:
        raise ExportHashError(f"the manifest does not list {name}")
    sha256 = hashlib.sha256(content).hexdigest()
    if (sha256, len(content)) != (listed.sha256, listed.num_bytes):
        raise ExportHashError(
            f"{name} has sha256 {sha256} and {len(content)} bytes, the manifest lists "
            f"{listed.sha256} and {listed.num_bytes}: the export was changed, or cut off"
        )


def _record(found: dict[str, bytes], job_id: str) -> JobRecord:
    job = _model(ExportedJob, "job.json", found["job.json"])
    if job.view.id != job_id:
        raise InvalidExportError(f"job.json is of job {job.view.id[:60]!r}, not of {job_id}")
    listed = _parsed("results.json", found["results.json"])
    if not isinstance(listed, dict) or not isinstance(listed.get("data"), list):
        raise InvalidExportError("results.json: must be an object with a list `data`")
    results = [_validated(_RESULT, "results.json", result) for result in listed["data"]]
    for field, expected in (("job_id", job.view.id), ("status", job.view.status)):
        if listed.get(field) != expected:
            raise InvalidExportError(f"results.json: {field} must be {expected!r}, as in job.json")
    lines = found["events.jsonl"].splitlines()
    events = [_model(Event, f"events.jsonl line {n}", line) for n, line in enumerate(lines, 1)]
    return JobRecord(job.view, job.plan, results, events)


def _model(model: type[Model], name: str, content: bytes) -> Model:
    return _validated(TypeAdapter(model), name, _parsed(name, content))


def _parsed(name: str, content: bytes) -> Any:
    try:
        return parse_json(content)
    except ProblemError as error:
        raise InvalidExportError(f"{name}: {error.detail[:300]}") from error


def _validated(adapter: TypeAdapter[Value], name: str, value: Any) -> Value:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:60] for part in first["loc"]) or "(whole)"
        raise InvalidExportError(f"{name}: {where}: {first['msg'][:200]}") from error
