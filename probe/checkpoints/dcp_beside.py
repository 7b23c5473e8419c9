"""Hugging Face weights with the optimizer's state in a torch DCP directory beside them.

So accelerate and transformers save under FSDP: `model.safetensors` and `optimizer_0/.metadata`.
"""

from pathlib import Path

from probe.checkpoints.assemble import read_model_config
from probe.checkpoints.beside import WithMoments
from probe.checkpoints.dcp import DcpSource
from probe.checkpoints.dcp_index import dcp_parts, read_dcp_index
from probe.checkpoints.huggingface import HuggingFaceSource
from probe.result import CheckpointRef

FORMAT = "safetensors+dcp"


def open_source(ref: CheckpointRef) -> WithMoments:
    """The directory `ref.location`; see `probe.checkpoints.open_checkpoint`."""
    directory = Path(ref.location).expanduser()
    weights = HuggingFaceSource(ref, directory)
    index = read_dcp_index(directory, dcp_parts(directory))
    moments = DcpSource(ref, index, lambda: read_model_config(directory / "config.json"))
    return WithMoments(weights, moments, format_name=FORMAT, size_bytes=index.size_bytes)
