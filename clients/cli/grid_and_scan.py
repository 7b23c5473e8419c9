"""A mix scan drawn over a training grid: whether the two belong together.

Relative paths in results mean the current directory, as they do in job files: results that a
server measured hold absolute ones.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clients.cli.conventions import InputError
from probe.reports import mix_results, train_results
from probe.result import CheckpointRef
from probe.result_mix import MixUnitResult
from probe.result_train import MixTrainUnitResult
from probe.shares import source_shares
from probe.spec_mix import MixtureSources
from probe.unit_results import AnyUnitResult


def grid_and_scan(
    grid: Sequence[AnyUnitResult],
    scan: Sequence[AnyUnitResult],
    *,
    grid_name: str,
    scan_name: str,
) -> tuple[list[MixTrainUnitResult], list[MixUnitResult]]:
    """A grid's runs, and the units of the scan that are of the grid's checkpoints.

    Args:
        grid: Results of kind mix_train.
        scan: Results of kind mix_scan.
        grid_name: What the grid was called on the command line.
        scan_name: The same of the scan.

    Raises:
        InputError: One is of another kind or empty, or they have no checkpoint in common, other
            sources, or no task in common.
    """
    runs, units = train_results(grid), mix_results(scan)
    _check_kind(grid, len(runs), grid_name, "a scan is drawn over kind mix_train")
    _check_kind(scan, len(units), scan_name, "--scan takes kind mix_scan")
    matched = _of_checkpoints(units, [run.unit.checkpoint_ref for run in runs])
    if not matched:
        raise InputError(
            f"{grid_name} trains from {_listed(runs)}, {scan_name} scans {_listed(units)}: give a "
            "scan of a checkpoint that the grid trains from"
        )
    difference = _difference(runs[0].spec, matched[0].spec)
    if difference is not None:
        raise InputError(
            f"{grid_name} and {scan_name} do not belong together: {difference}. Measure both with "
            "the same mixture.sources and eval_tasks"
        )
    return runs, matched


def _check_kind(results: Sequence[AnyUnitResult], num_right: int, name: str, wanted: str) -> None:
    if not results:
        raise InputError(f"{name} has no results yet")
    if num_right < len(results):
        found = ", ".join(sorted({result.kind for result in results}))
        raise InputError(f"{name} holds results of kind {found}; {wanted}")


def _of_checkpoints(
    units: Sequence[MixUnitResult], checkpoints: Sequence[CheckpointRef]
) -> list[MixUnitResult]:
    """Those of these checkpoints, each with its checkpoint spelled as there."""
    known = {_place(ref): ref for ref in checkpoints}
    matched = []
    for result in units:
        ref = known.get(_place(result.unit.checkpoint_ref))
        if ref is not None:
            unit = result.unit.model_copy(update={"checkpoint": ref})
            matched.append(result.model_copy(update={"unit": unit}))
    return matched


def _place(ref: CheckpointRef) -> tuple[str, str, str | None, int | None]:
    location = ref.location if ref.source == "hub" else _absolute(ref.location)
    return ref.source, location, ref.revision, ref.step


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _listed(results: Sequence[MixTrainUnitResult] | Sequence[MixUnitResult]) -> str:
    refs = [result.unit.checkpoint_ref for result in results]
    return ", ".join(dict.fromkeys(f"{ref.label} of {ref.location}" for ref in refs))


def _difference(grid: Mapping[str, Any], scan: Mapping[str, Any]) -> str | None:
    """The first thing in which sources or tasks of two specs differ; None: they agree.

    A grid may know tasks that the scan does not, and the other way round.
    """
    sources = _sources(grid), _sources(scan)
    if sources[0].keys() != sources[1].keys():
        return f"sources {', '.join(sources[0])} against {', '.join(sources[1])}"
    tasks = _tasks(grid), _tasks(scan)
    common = [name for name in tasks[0] if name in tasks[1]]
    if not common:
        return f"tasks {', '.join(tasks[0])} against {', '.join(tasks[1])}, none in common"
    return _first_field("source", sources, sources[0]) or _first_field("task", tasks, common)


def _first_field(
    what: str, both: tuple[Mapping[str, Any], Mapping[str, Any]], names: Iterable[str]
) -> str | None:
    for name in names:
        left, right = both[0][name], both[1][name]
        for field in left | right:
            if left.get(field) != right.get(field):
                values = f"{left.get(field)!r} against {right.get(field)!r}"
                return f"{what} {name} has {field} {values}"
    return None


def _sources(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By name: what a source reads, whether it is varied, and its share of what that one leaves."""
    raw = spec["mixture"]
    mixture = MixtureSources(sources=raw["sources"], varied=raw["varied"])
    return {
        source.name: _reads(source.model_dump())
        | {"varied": index == mixture.varied_index, "share": round(share, 9)}
        for index, (source, share) in enumerate(
            zip(mixture.sources, source_shares(mixture, 0.0), strict=True)
        )
    }


def _tasks(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {task["data"]["name"]: _reads(task["data"]) for task in spec["eval_tasks"]}


def _reads(data: Mapping[str, Any]) -> dict[str, Any]:
    """A data source without its name and its share, its files' paths absolute."""
    found = {key: value for key, value in data.items() if key not in ("name", "share")}
    if "paths" in found:
        found["paths"] = [_absolute(path) for path in found["paths"]]
    return found
