"""Write docs/jobs.md, the job file's fields, from `probe.spec`; `--check`: is it up to date?

python -m docs.make_jobs_page
python -m docs.make_jobs_page --check
"""

import argparse
import sys
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from probe.kinds import KINDS

PAGE = Path(__file__).parent / "jobs.md"
_CONFIGS = Path(__file__).parents[1] / "configs"
_EXAMPLES = {
    "checkpoint_series": ("The demo's job:", _CONFIGS / "demo-series.yaml"),
    "mix_scan": ("The demo's second job:", _CONFIGS / "demo-mix-scan.yaml"),
}
_INTRODUCTION = """\
# The job file

Written by `make docs` from `probe/spec.py` and the like: change the text there.

A job is YAML for `probe run` and `probe submit`, JSON for `POST /v1/jobs`, the same fields in both.
Unknown keys are refused with the nearest valid one. `--set a.b=c` changes one field from the
command line, `--plan` prints the job with every default filled in.

A file may hold partial jobs beside the whole one, in a section `presets`:

```yaml
presets:
  quick:                       # probe run FILE --preset quick
    measurement: {repeats: 1}
```

The chosen one is merged into the file before `--set`: mappings key by key, lists and single values
as a whole. Where it chooses another `type` (or `source`, or an optimizer's `name`) than the file,
that mapping is replaced as a whole. Without `--preset` the section is dropped. It is no part of the
job: over HTTP only the merged job is accepted.
"""


def jobs_page() -> str:
    """The whole page as Markdown."""
    parts = [_INTRODUCTION]
    written: dict[tuple[str, type[BaseModel]], str] = {}
    for kind, model in KINDS.items():
        parts.append(f"\n## `kind: {kind}`\n\n{_first_line(model)}\n")
        if kind in _EXAMPLES:
            says, file = _EXAMPLES[kind]
            parts.append(f"\n{says}\n\n```yaml\n{file.read_text(encoding='utf-8')}```\n")
        # Parts that several kinds share are described once.
        suffix = f" of {kind}" if written else ""
        parts += _sections(model, "", suffix, written)
    return "".join(parts)


def _sections(
    model: type[BaseModel], path: str, suffix: str, written: dict[tuple[str, type[BaseModel]], str]
) -> list[str]:
    """The table of one model's fields, then a section for every model below it.

    Args:
        model: Whose fields.
        path: Dotted, ends with a dot unless empty.
        suffix: Of the titles, so that no two on the page are alike.
        written: Title of every section so far, by path and model; added to.
    """
    rows = ["\n| field | type | default | |\n|---|---|---|---|\n"]
    below = []
    for name, field in model.model_fields.items():
        inner = _models_in(field.annotation)
        for m in inner:
            if (path + name, m) not in written:
                written[path + name, m] = f"`{path}{name}`{_tag(m)}{suffix}"
                below.append((path + name, m))
        links = [f"[below](#{_anchor(written[path + name, m])})" for m in inner]
        kind = " or ".join([*_plain_forms(field.annotation), *links])
        kind = kind or _type_text(field.annotation).replace("|", "\\|")
        default = _default_text(field, inner)
        text = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{name}` | {kind} | {default} | {text} |\n")
    for where, inner_model in below:
        title = f"\n### {written[where, inner_model]}\n\n{_first_line(inner_model)}\n"
        rows += [title, *_sections(inner_model, f"{where}.", suffix, written)]
    return rows


def _plain_forms(annotation: Any) -> list[str]:
    """The alternatives of a field that are no mapping, where others are: `ratios` as a list."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    is_union = get_origin(annotation) is Union or get_origin(annotation) is UnionType
    forms = [part for part in get_args(annotation) if not _models_in(part)] if is_union else []
    named = [_type_text(part) for part in forms if part is not type(None)]
    return named if _models_in(annotation) else []


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


def _tag(model: type[BaseModel]) -> str:
    """What tells this model from its alternatives, as text: with `source: hub`."""
    for name, field in model.model_fields.items():
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
            return f" with `{name}: {get_args(field.annotation)[0]}`"
    return ""


def _anchor(title: str) -> str:
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [inner for part in get_args(annotation) for inner in _models_in(part)]


def _type_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin is Union or str(origin) == "<class 'types.UnionType'>":
        return " or ".join(_type_text(a) for a in arguments if a is not type(None))
    if origin in (list, tuple):
        return "list of " + _type_text(arguments[0])
    if origin is dict:
        return "mapping"
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return names.get(annotation, str(annotation))


def _default_text(field: Any, inner: list[type[BaseModel]]) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if inner or value is PydanticUndefined:
        return "its defaults"
    shown = repr(value) if isinstance(value, str) and "\n" in value else str(value)
    return "" if value is None else f"`{shown}`".replace("|", "\\|")


def main() -> int:
    """Write or check the page; 1 when it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    page = jobs_page()
    if not parser.parse_args().check:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        print(f"{PAGE} is out of date: run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
