"""The checkpoints of one run, in order, found without loading any of them (torch-free).

The server, the planner and the command line list a series with this before anything is queued;
sizes and moments come from safetensors headers alone.
"""

import glob
import os
import re
import time
from collections.abc import Callable, Iterable
from itertools import islice, pairwise
from pathlib import Path

import regex  # type: ignore[import-untyped]  # as `re`, with a time limit

from probe.checkpoints.formats import format_of, looks_like_checkpoint
from probe.checkpoints.layout import read_json_object
from probe.checkpoints.olmo_config import is_run_config
from probe.checkpoints.revisions import matching_revisions
from probe.checkpoints.states_index import StatesIndex
from probe.errors import CheckpointError, ConfigError
from probe.known_models import known_revision
from probe.result import CheckpointRef
from probe.spec import Checkpoints, GgufCheckpoint, HubCheckpoints, LocalCheckpoints

_TOKENS = re.compile(r"tokens[-_]?(\d+(?:\.\d+)?)([KMBT]?)(?![A-Za-z0-9])", re.IGNORECASE)
_PATTERN_S = 2.0  # for all names of a series together; a sane pattern takes microseconds a name
_MAX_MATCHES = 100_000
_STATES = (  # file, key of the step, keys of the tokens seen
    ("training_state.json", "step", ("tokens", "num_tokens")),
    ("trainer_state.json", "global_step", ("num_input_tokens_seen",)),
)
_MAGNITUDE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def list_checkpoints(checkpoints_spec: Checkpoints) -> list[CheckpointRef]:
    """Every checkpoint a spec names, in order of training step.

    `first_step` and `last_step` choose the range first, then every k-th of it is taken,
    beginning with the first.

    Args:
        checkpoints_spec: Local directory or glob, hub revisions, or a GGUF file.

    Returns:
        At least one reference; local locations are absolute. A single checkpoint may have no
        step; of several each has one.

    Raises:
        CheckpointError: Nothing matches (the message lists what is near), a checkpoint is
            broken, has no step in its name, shares its step with another, or contradicts its
            own training_state.json.
        CheckpointUnavailableError: A revision pattern needs the hub, and it cannot be reached.
        ConfigError: `step_pattern` is no regular expression with one group.

    Cost: header reads per local checkpoint; one request for hub patterns, none for full names.
    """
    if isinstance(checkpoints_spec, LocalCheckpoints):
        return _choose(_local(checkpoints_spec), checkpoints_spec)
    if isinstance(checkpoints_spec, HubCheckpoints):
        return _choose(_hub(checkpoints_spec), checkpoints_spec)
    return [_gguf(checkpoints_spec)]


def tokens_in_name(name: str) -> int | None:
    """Tokens seen, from a name such as `stage1-step928646-tokens3896B`: 3,896,000,000,000."""
    match = _TOKENS.search(name)
    if match is None:
        return None
    return round(float(match.group(1)) * _MAGNITUDE[match.group(2).upper()])


def _local(spec: LocalCheckpoints) -> list[CheckpointRef]:
    expanded = os.path.abspath(os.path.expanduser(spec.path))
    if os.path.isdir(expanded):
        directories = [Path(expanded)]
    else:
        matches = list(islice(glob.iglob(expanded, recursive=True), _MAX_MATCHES + 1))
        if len(matches) > _MAX_MATCHES:
            raise CheckpointError(
                f"{spec.path}: matches over {_MAX_MATCHES} files and directories; narrow it"
            )
        directories = [Path(match) for match in matches if looks_like_checkpoint(Path(match))]
    if not directories:
        raise CheckpointError(f"{spec.path}: no checkpoint directory there; {_near(expanded)}")
    search = _searcher(spec.step_pattern)
    config = None if spec.config is None else os.path.abspath(os.path.expanduser(spec.config))
    if config is not None and not os.path.exists(config):
        raise CheckpointError(f"checkpoints.config: {spec.config}: no such file; {_near(config)}")
    return [_local_ref(directory, search, config) for directory in directories]


def _local_ref(directory: Path, search: "_Search", config: str | None) -> CheckpointRef:
    found = format_of(directory).describe(directory)
    step = _step_of(search, directory.name)
    step = found.step if step is None else step
    num_tokens = tokens_in_name(directory.name)
    rounded = num_tokens is not None
    in_config = None if step is None else _tokens_by_config(directory, step)
    if in_config is not None:
        num_tokens, rounded = in_config, False
    for file, step_key, token_keys in _STATES:
        if not (directory / file).is_file():
            continue
        state = read_json_object(directory / file)
        stated = state.get(step_key)
        if step is not None and stated is not None and stated != step:
            raise CheckpointError(
                f"{directory}: its name says step {step}, {file} says {stated!r}; "
                "rename it or correct the file"
            )
        tokens = next((state[key] for key in token_keys if key in state), None)
        counted = tokens != 0 or file == "training_state.json"  # Trainer writes 0 for not counted
        if isinstance(tokens, int) and not isinstance(tokens, bool) and counted:
            num_tokens, rounded = tokens, False
    return CheckpointRef(
        source="local",
        location=str(directory),
        step=step,
        num_tokens=num_tokens,
        num_tokens_rounded=rounded,
        format=found.format,
        has_moments=found.has_moments,
        size_bytes=found.size_bytes,
        config=config,
    )


def _tokens_by_config(directory: Path, step: int) -> int | None:
    """Steps times the batch of an OLMo-core run, whose config.json counts it in tokens."""
    config = directory / "config.json"
    content = read_json_object(config) if config.is_file() else {}
    loader = content.get("data_loader")
    size = loader.get("global_batch_size") if isinstance(loader, dict) else None
    if not is_run_config(content) or type(size) is not int:
        return None
    return step * size


def _hub(spec: HubCheckpoints) -> list[CheckpointRef]:
    search = _searcher(spec.step_pattern)
    names = matching_revisions(spec.repo, spec.revisions)
    stages = {name[: found.start()] for name in names if (found := search(name))}
    if len(stages) > 1:
        raise CheckpointError(
            f"{spec.repo}: the revisions belong to several stages ({', '.join(sorted(stages))}), "
            "each of which counts its steps from its own start; make one job of each"
        )
    states = StatesIndex(spec)
    return [_hub_ref(spec, states, name, _step_of(search, name)) for name in names]


def _hub_ref(
    spec: HubCheckpoints, states: StatesIndex, name: str, step: int | None
) -> CheckpointRef:
    """Tokens are exact where the run is known; a name such as `tokens3896B` rounds them."""
    known = known_revision(spec.repo, name)
    in_name = tokens_in_name(name)
    return CheckpointRef(
        source="hub",
        location=spec.repo,
        revision=name,
        step=step,
        num_tokens=in_name if known is None else known.num_tokens,
        num_tokens_rounded=known is None and in_name is not None,
        moments_url=states.url(name, step),
    )


def _gguf(spec: GgufCheckpoint) -> CheckpointRef:
    path = Path(os.path.abspath(os.path.expanduser(spec.path)))
    if not os.path.isfile(path):  # False, not an error, for a name too long
        raise CheckpointError(f"{spec.path}: no such file; {_near(str(path))}")
    if not path.name.lower().endswith((".gguf", ".gguf.gz")):
        raise CheckpointError(f"{spec.path}: expected a .gguf or .gguf.gz file")
    return CheckpointRef(
        source="gguf",
        location=str(path),
        step=spec.step,
        format="gguf",
        has_moments=False,
        size_bytes=path.stat().st_size,
    )


def _choose(
    refs: list[CheckpointRef], spec: LocalCheckpoints | HubCheckpoints
) -> list[CheckpointRef]:
    """Order by step, check that the order means something, cut the range, take every k-th."""
    if len(refs) > 1:
        nameless = [_name(ref) for ref in refs if ref.step is None]
        if nameless:
            raise CheckpointError(
                f"no training step in {_list(nameless)}, found by step_pattern "
                f"{spec.step_pattern!r}; change the pattern, or leave them out"
            )
    ordered = sorted(refs, key=lambda ref: (ref.step or 0, _name(ref)))
    for one, other in pairwise(ordered):
        if one.step == other.step:
            raise CheckpointError(
                f"{_name(one)} and {_name(other)} both are step {one.step}; a series is one run, "
                "so narrow the pattern"
            )
    first = 0 if spec.first_step is None else spec.first_step
    last = float("inf") if spec.last_step is None else spec.last_step
    chosen = [ref for ref in ordered if ref.step is None or first <= ref.step <= last]
    if not chosen:
        raise CheckpointError(
            f"no checkpoint between first_step {spec.first_step} and last_step {spec.last_step}; "
            f"found steps {_list(str(ref.step) for ref in ordered)}"
        )
    return chosen[:: spec.every]


_Search = Callable[[str], "regex.Match[str] | None"]


def _searcher(pattern: str) -> _Search:
    """Search names for the step. The server runs patterns of strangers, so it has a time limit."""
    try:
        compiled = regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise ConfigError(f"step_pattern {pattern!r} is no regular expression: {error}") from error
    if compiled.groups != 1:
        raise ConfigError(f"step_pattern {pattern!r} has {compiled.groups} groups, expected one")
    left_s = _PATTERN_S

    def search(name: str) -> "regex.Match[str] | None":
        nonlocal left_s
        begin = time.monotonic()
        try:
            # concurrent: other threads of the server go on meanwhile.
            return compiled.search(name, timeout=max(left_s, 1e-3), concurrent=True)
        except TimeoutError:
            raise ConfigError(
                f"step_pattern {pattern!r} takes over {_PATTERN_S:g} s on names such as {name!r}; "
                "it backtracks: do not repeat what holds a repetition, as (a+)+ does"
            ) from None
        finally:
            left_s -= time.monotonic() - begin

    return search


def _step_of(search: _Search, name: str) -> int | None:
    match = search(name)
    if match is None or match.group(1) is None:
        return None
    if not match.group(1).isdecimal():
        raise ConfigError(
            f"step_pattern {match.re.pattern!r} gives {match.group(1)!r} for {name!r}"
        )
    return int(match.group(1))


def _name(ref: CheckpointRef) -> str:
    return ref.revision or ref.location


def _list(names: Iterable[str], limit: int = 8) -> str:
    found = list(names)
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(found[:limit]) + more


def _near(path: str) -> str:
    """The nearest existing directory above a path that matched nothing, and what it holds."""
    parent = Path(path).absolute().parent
    while not os.path.isdir(parent):
        parent = parent.parent
    try:
        names = sorted(entry.name for entry in parent.iterdir())
    except OSError as error:
        return f"{parent} cannot be listed: {error.strerror}"
    return f"{parent} holds {_list(names) or 'nothing'}"
