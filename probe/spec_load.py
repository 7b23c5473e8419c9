"""Read, check, resolve and hash job specs: YAML files, presets, HTTP bodies, `--set` (torch-free).

What pydantic reports is turned into messages a person can act on: the dotted field, what was
found, and for an unknown key the nearest valid one.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from probe.errors import ConfigError
from probe.kinds import KINDS, JobSpec
from probe.spec_base import NOT_MEASURED, SpecModel

# Discriminator tags that pydantic puts into error locations; they are not keys of the spec.
_TAGS = frozenset({"local", "hub", "gguf", "adamw", "sgd", "files", "text", "question_answer"})
_TAGS |= frozenset({"idx", "npz", "packaged", "adam", "l2", "wasserstein"})
# Tags of `mixture.ratios`, one of whose forms is no model: they never are keys.
_FORMS = frozenset({"ratio_list", "ratio_grid"})
# ValueError: what looks like a date and is none, as 2026-13-01.
_NOT_YAML = (yaml.YAMLError, RecursionError, ValueError)
_MOST_PROBLEMS = 100  # explaining one takes a while; nobody reads more
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class SpecError(ConfigError):
    """A job spec is wrong; `problems` lists every field with what is wrong and what to do."""

    def __init__(self, problems: Sequence[dict[str, str]]) -> None:
        """Join the problems into one message, a line each."""
        self.problems = list(problems)
        super().__init__("\n".join(f"{p['field']}: {p['message']}" for p in self.problems))


class _SpecLoader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text and lets a repeated key win silently; here neither happens."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool) and key in seen:
                line = key_node.start_mark.line + 1
                raise SpecError([{"field": str(key), "message": f"given twice (line {line})"}])
            if isinstance(key, str | int | float | bool):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


_SpecLoader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def load_spec(
    path: str | Path, overrides: Iterable[str] = (), preset: str | None = None
) -> JobSpec:
    """A checked job spec from a YAML (or JSON) file, one of its presets and `a.b=c` on top.

    Args:
        path: The file. Relative checkpoint and data paths in it mean the current directory.
        overrides: `dotted.key=value`; the value is read as YAML, a number indexes a list. They
            come after the preset.
        preset: Name of an entry of the file's `presets`, a partial spec that is merged into the
            file: mappings key by key, everything else, lists too, as a whole. None: the file as
            it stands. The section `presets` itself is no part of the spec.

    Raises:
        SpecError: A field is unknown, missing or out of range, or `presets` is malformed.
        ConfigError: The file cannot be read or is not YAML, it has no such preset, or an override
            is not `key=value`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read job file {str(path)!r}: {error}") from error
    try:
        raw = yaml.load(text, _SpecLoader)  # SafeLoader underneath: builds plain values only
    except _NOT_YAML as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping with `kind:`, found {type(raw).__name__}")
    presets = _presets_of(raw)
    raw.pop("presets", None)
    if preset is not None:
        if preset not in presets:
            raise ConfigError(_no_such_preset(str(path), preset, presets))
        raw = _merged(KINDS.get(str(raw.get("kind"))), [], raw, presets[preset])
    for override in overrides:
        _apply_override(raw, override)
    return parse_spec(raw)


def parse_spec(raw: Any) -> JobSpec:
    """A checked job spec from plain values, as JSON or YAML gives them.

    Raises:
        SpecError: Every problem found, each with its field.
    """
    if not isinstance(raw, Mapping):
        raise SpecError(
            [{"field": "(spec)", "message": f"must be a mapping, found {type(raw).__name__}"}]
        )
    if "presets" in raw:
        message = (
            "is for job files, where `--preset NAME` merges one of them; send the merged spec "
            "without this section"
        )
        raise SpecError([{"field": "presets", "message": message}])
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        found = "missing" if kind is None else f"unknown kind {kind!r}"
        hint = _nearest(str(kind), KINDS)
        choices = ", ".join(sorted(KINDS))
        raise SpecError([{"field": "kind", "message": f"{found}{hint}; choose from: {choices}"}])
    try:
        return KINDS[kind].model_validate(raw)
    except ValidationError as error:
        faults = error.errors(include_url=False)[:_MOST_PROBLEMS]
        raise SpecError([_problem(KINDS[kind], fault) for fault in faults]) from None


def resolved(spec: SpecModel) -> dict[str, Any]:
    """The spec with every default filled in, as plain JSON values."""
    return spec.model_dump(mode="json")


def spec_sha256(spec: SpecModel) -> str:
    """Hash of the resolved spec: equal for two files that mean the same measurement.

    What is for people and for the queue (`NOT_MEASURED`) is left out, and so is on how many
    machines the ranks are: numbers do not depend on it.
    """
    values = resolved(spec)
    for field in NOT_MEASURED:
        values.pop(field, None)
    values.get("parallel", {}).pop("nodes", None)
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _problem(model: type[BaseModel], error: Any) -> dict[str, str]:
    path = _without_tags(model, error["loc"])
    field = ".".join(str(part) for part in path) or "(spec)"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        siblings = _keys_beside(model, path)
        message = f"unknown key{_nearest(str(path[-1]), siblings)}"
        if siblings:
            message += f"; valid keys: {', '.join(sorted(siblings))}"
    elif error["type"] == "union_tag_not_found":
        message = _missing_tag(model, path, str(error["ctx"]["discriminator"]).strip("'"))
    elif error["type"] == "missing":
        message = "is required"
    elif field != "webhook" and not isinstance(error["input"], dict | list):
        shown = repr(error["input"])
        message += f" (found {shown if len(shown) <= 80 else shown[:77] + '...'})"
    return {"field": field, "message": message}


def _without_tags(model: type[BaseModel], location: Sequence[str | int]) -> list[str | int]:
    """The keys of an error location; a tag stands only where one of several models was chosen."""
    path: list[str | int] = []
    tag_may_follow = False
    for part in location:
        if part in _FORMS:
            continue
        if tag_may_follow and part in _TAGS:
            tag_may_follow = False
            continue
        path.append(part)
        tag_may_follow = len(_models_at(model, path)) > 1
    return path


def _nearest(word: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _missing_tag(model: type[BaseModel], path: Sequence[str | int], tag: str) -> str:
    choices = {
        choice
        for m in _models_at(model, path)
        if tag in m.model_fields
        for choice in get_args(m.model_fields[tag].annotation)
    }
    return f"needs {tag!r}; choose from: {', '.join(sorted(choices))}"


def _keys_beside(model: type[BaseModel], path: Sequence[str | int]) -> set[str]:
    """Valid keys of the mapping that holds the last element of `path`."""
    return {name for m in _models_at(model, path[:-1]) for name in m.model_fields}


def _models_at(model: type[BaseModel], path: Sequence[str | int]) -> set[type[BaseModel]]:
    models = {model}
    for part in path:
        if not isinstance(part, int):
            fields = [m.model_fields[part] for m in models if part in m.model_fields]
            models = {inner for field in fields for inner in _models_in(field.annotation)}
    return models


def _models_in(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {inner for part in get_args(annotation) for inner in _models_in(part)}


def _presets_of(raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The section `presets` of a file, checked as far as its form goes."""
    presets = raw.get("presets", {})
    if not isinstance(presets, dict):
        message = f"must be a mapping of names to changes, found {type(presets).__name__}"
        raise SpecError([{"field": "presets", "message": message}])
    problems = []
    for name, changes in presets.items():
        problem = None
        if not isinstance(name, str):
            problem = f"the name must be text, found {type(name).__name__}; put it in quotes"
        elif not isinstance(changes, dict):
            problem = f"must be a mapping of fields, found {type(changes).__name__}"
        elif "presets" in changes:
            problem = "must not hold presets of its own"
        if problem is not None:
            problems.append({"field": f"presets.{name}", "message": problem})
    if problems:
        raise SpecError(problems)
    return presets


def _no_such_preset(path: str, preset: str, presets: Iterable[str]) -> str:
    names = sorted(presets)
    there = f"choose from: {', '.join(names)}" if names else "the file has none"
    return f"{path} has no preset {preset!r}{_nearest(preset, names)}; {there}"


def _merged(
    model: type[BaseModel] | None, path: list[str | int], base: dict[str, Any], changes: Any
) -> dict[str, Any]:
    """`base` with `changes` merged in by presence, in new mappings.

    Where one of several models may stand (data of a type, an optimizer of a name) and `changes`
    choose another one than `base` has, they replace it whole: its fields mean other things there.

    Args:
        model: Of the whole spec; None where the kind is unknown.
        path: Keys that lead to `base`.
        base: A mapping of the file.
        changes: What the preset puts in its place.
    """
    if model is not None:
        tag = _tag_of(_models_at(model, path))
        if tag in changes and tag in base and changes[tag] != base[tag]:
            return dict(changes)
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            value = _merged(model, [*path, key], below, value)
        merged[key] = value
    return merged


def _tag_of(models: set[type[BaseModel]]) -> str | None:
    """The field whose value tells these models apart; None: no such field, or one model."""
    if len(models) < 2:
        return None
    shared = set.intersection(*({*m.model_fields} for m in models))
    tags = {
        name
        for name in shared
        if all(get_origin(m.model_fields[name].annotation) is Literal for m in models)
    }
    return min(tags, default=None)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set needs key=value, got {override!r}; for example a.b=1e-3")
    try:
        value = yaml.load(text, _SpecLoader)
    except _NOT_YAML as error:
        raise ConfigError(f"--set {key}: {text!r} is not a YAML value: {error}") from error
    *parents, last = key.split(".")
    place: Any = raw
    for depth, part in enumerate(parents):
        if isinstance(place, list):
            place = place[_list_index(place, part, key)]
        else:
            place = place.setdefault(part, {})
        if not isinstance(place, dict | list):
            where = ".".join(parents[: depth + 1])
            raise ConfigError(f"--set {key}: {where} is {place!r}, not a mapping or list")
    if isinstance(place, list):
        place[_list_index(place, last, key)] = value
    else:
        place[last] = value


def _list_index(values: list[Any], part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(values):
        raise ConfigError(f"--set {key}: {part!r} is not an index into a list of {len(values)}")
    return int(part)
