"""Fixed batches of tokens from text and question/answer data, the same on every run.

A new file format is one function in `readers.py`; a new task is one in `tasks.py`.
"""

from probe.batches.batch import Batch as Batch
from probe.batches.batch_set import BatchSet as BatchSet

__all__ = ["Batch", "BatchSet"]
