"""Rows of a Hugging Face hub data set, through `datasets`, which is imported only here."""

from collections.abc import Iterator

from probe.batches.readers import Row
from probe.errors import BatchError, BatchUnavailableError
from probe.spec import HubData
from probe.transport import is_transport_failure


def read_hub_rows(source: HubData) -> Iterator[Row]:
    """The rows of one split, in its order.

    Args:
        source: Which data set, configuration, split and revision; streamed or downloaded.

    Yields:
        One row per record.

    Raises:
        BatchUnavailableError: The hub cannot be reached now, or the stream broke off.
        BatchError: There is no such data set, configuration or split, or it needs code.
    """
    # here, because it takes seconds to import and most jobs read files
    from datasets import load_dataset  # type: ignore[import-untyped]

    what = f"data set {source.dataset!r}" + (f", config {source.config!r}" if source.config else "")
    number = 0
    try:
        rows = load_dataset(
            source.dataset,
            name=source.config,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
        for number, fields in enumerate(rows, start=1):
            yield Row(dict(fields), f"{what}, split {source.split!r}, row {number}")
    except (BatchError, GeneratorExit):
        raise
    except Exception as error:  # datasets raises what each of its layers happens to raise
        message = f"{what}, split {source.split!r}, after row {number}: {error}"
        if is_transport_failure(error):
            raise BatchUnavailableError(message) from error
        raise BatchError(message) from error
