"""A checkpoint directory on this machine, in whichever format it turns out to be."""

from importlib import import_module
from pathlib import Path

from probe.checkpoints.formats import format_of
from probe.checkpoints.source import Source
from probe.result import CheckpointRef


def open_source(ref: CheckpointRef) -> Source:
    """The directory `ref.location`; see `probe.checkpoints.open_checkpoint`."""
    module = import_module(format_of(Path(ref.location).expanduser()).opener)
    source: Source = module.open_source(ref)
    return source
