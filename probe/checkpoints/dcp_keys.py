"""Which key of a DCP checkpoint is which parameter: prefixes differ from one trainer to the next.

`dcp.save` stores whatever nesting its caller chose: `model.<fqn>`, `app.model.<fqn>` or the bare
`<fqn>`, and `optim.state.<fqn>.exp_avg` or `optimizer.state.<fqn>.exp_avg`, with parameter groups
nested or flattened beside them. A Hugging Face fqn itself begins with `model.`, so prefixes are
found by matching the model's own names, never by cutting. Torch-free.
"""

import re
from collections.abc import Iterable, Mapping

from probe.checkpoints.dcp_index import DcpIndex, Place
from probe.checkpoints.layout import MOMENT_KINDS
from probe.errors import CheckpointError

_STATE = re.compile(r"(?:^|\.)state\.(?P<name>.+)\.(?P<kind>[a-z_0-9]+)$")
_GROUPS = re.compile(r"(?:^|\.)param_groups\.")
# torch.compile, activation checkpointing and FSDP1 put themselves into names
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def moment_keys(index: DcpIndex) -> dict[str, dict[str, str]]:
    """Stored parameter name -> kind -> key, for exp_avg, exp_avg_sq and step.

    Raises:
        CheckpointError: A parameter lacks one of the three or has it twice, or its two moments
            differ in shape.
    """
    found: dict[str, dict[str, str]] = {}
    for key in (*index.tensors, *index.objects):
        match = _STATE.search(key)
        if match is None or match["kind"] not in MOMENT_KINDS:
            continue
        kinds = found.setdefault(without_wrappers(match["name"]), {})
        if match["kind"] in kinds:
            raise CheckpointError(
                f"{index.directory}: keys {kinds[match['kind']]!r} and {key!r} are the same moment "
                "of the same parameter; which one is meant?"
            )
        kinds[match["kind"]] = key
    moments = {name: kinds for name, kinds in found.items() if kinds.keys() - {"step"}}
    for name, kinds in moments.items():
        _check_complete(index, name, kinds)
    return moments


def amsgrad_key(index: DcpIndex) -> str | None:
    """The first key of AMSGrad's running maximum; None where the optimizer kept none."""
    return next((key for key in index.tensors if key.endswith(".max_exp_avg_sq")), None)


def betas_keys(index: DcpIndex) -> dict[str, Place]:
    """Key -> place of every parameter group's decay rates, nested or flattened."""
    return {
        key: place
        for key, place in index.objects.items()
        if _GROUPS.search(key) and key.endswith(".betas")
    }


def weight_keys(index: DcpIndex) -> dict[str, str]:
    """Stored name -> key of every tensor that is no optimizer state, wrappers' names cut out."""
    return {
        without_wrappers(key): key
        for key in index.tensors
        if not _STATE.search(key) and not _GROUPS.search(key)
    }


def without_wrappers(name: str) -> str:
    """A parameter's name without the parts torch.compile and the like put into it."""
    return _WRAPPERS.sub("", name)


def find_prefix(stored: Iterable[str], names: Iterable[str], *, where: str) -> str:
    """The prefix under which every one of `names` is stored.

    Args:
        stored: Stored names.
        names: What the model calls its parameters, at least one.
        where: For messages: directory and what the names are.

    Raises:
        CheckpointError: No prefix fits (the nearest and the first missing name are named), or
            several do.
    """
    held, wanted = set(stored), list(names)
    prefixes: dict[str, int] = {}
    for anchor in (wanted[0], wanted[-1]):
        for name in held:
            if name == anchor or name.endswith(f".{anchor}"):
                prefix = name.removesuffix(anchor)
                prefixes[prefix] = sum(prefix + each in held for each in wanted)
    whole = sorted(prefix for prefix, count in prefixes.items() if count == len(wanted))
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise CheckpointError(
            f"{where}: the model's names are stored under several prefixes, "
            f"{', '.join(map(repr, whole))}; which one is meant?"
        )
    if prefixes:
        best = max(sorted(prefixes), key=lambda prefix: prefixes[prefix])
        missing = next(best + name for name in wanted if best + name not in held)
        raise CheckpointError(
            f"{where}: no key {missing!r}; found {prefixes[best]} of {len(wanted)} expected under "
            f"{best!r}. Is the config of another model?"
        )
    some = ", ".join(sorted(held)[:3]) or "none"
    raise CheckpointError(f"{where}: expected {wanted[0]!r} under some prefix; found {some}")


def superfluous(stored: Iterable[str], prefix: str, known: Iterable[str]) -> list[str]:
    """Stored names beside the model's own that the model has no place for, sorted."""
    names = set(known)
    roots = {name.partition(".")[0] for name in names}
    rest = (name.removeprefix(prefix) for name in stored if name.startswith(prefix))
    return sorted(prefix + n for n in rest if n.partition(".")[0] in roots and n not in names)


def _check_complete(index: DcpIndex, name: str, kinds: Mapping[str, str]) -> None:
    for kind in MOMENT_KINDS:
        if kind not in kinds:
            some = next(iter(kinds.values()))
            raise CheckpointError(
                f"{index.directory}: found {some!r} but no {kind} of {name!r}; the optimizer "
                "state is incomplete"
            )
    for kind in ("exp_avg", "exp_avg_sq"):
        if kinds[kind] not in index.tensors:
            raise CheckpointError(
                f"{index.directory}: key {kinds[kind]!r} is a pickled object, expected a tensor"
            )
    first, second = (index.tensors[kinds[kind]] for kind in ("exp_avg", "exp_avg_sq"))
    if first.shape != second.shape:
        raise CheckpointError(
            f"{index.directory}: key {second.key!r} has shape {list(second.shape)}, expected "
            f"{list(first.shape)} as {first.key!r}"
        )
