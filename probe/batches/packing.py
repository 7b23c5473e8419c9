"""Documents to token sequences of one length.

Text is packed as OLMo-2 was trained: documents one after the other with the tokenizer's EOS
after each (BOS before each where there is no EOS), cut every `sequence_length` tokens;
attention runs across documents, and every token but the first of a sequence is a target. What
the tokenizer itself adds to a text (a BOS, say) stays. A question and its answer make one
sequence of their own, padded on the right; the answer's tokens are the targets, no EOS is added.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from probe.batches.documents import Tally
from probe.batches.tasks import Document
from probe.errors import BatchError

Tokens = npt.NDArray[np.uint32]
CHUNK_DOCUMENTS = 64  # one call of the tokenizer; it spreads a call over the cores
CHUNK_CHARS = 1 << 18


@dataclass(frozen=True, slots=True)
class Encoded:
    """One document as tokens; targets are tokens first_target .. end."""

    tokens: Tokens
    first_target: int
    end: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Sequence:
    """One row of a batch before padding; targets are tokens first_target .. end."""

    tokens: Tokens
    first_target: int
    end: int


def encode(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[Encoded]:
    """Tokens of each document, in order, a chunk of documents per tokenizer call.

    Prompt and body are tokenised together, as a model would see them, and a token counts as
    body when any of its characters does; tokenizers without offsets take them apart instead.

    Raises:
        BatchError: The tokenizer fails on a text.
    """
    for chunk in _chunks(documents):
        if any(document.prompt for document in chunk):
            yield from _encode_questions(chunk, tokenizer)
            continue
        texts = [document.body for document in chunk]
        for document, ids in zip(chunk, _tokenize(tokenizer, texts)["input_ids"], strict=True):
            tokens = np.asarray(ids, dtype=np.uint32)
            yield Encoded(tokens, 0, len(tokens), document.digest)


def _encode_questions(
    chunk: list[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Encoded]:
    if not tokenizer.is_fast:
        prompts = _tokenize(tokenizer, [document.prompt for document in chunk])["input_ids"]
        bodies = _tokenize(tokenizer, [d.body for d in chunk], special=False)["input_ids"]
        for document, prompt, body in zip(chunk, prompts, bodies, strict=True):
            if prompt and prompt[-1] == tokenizer.eos_token_id:
                prompt = prompt[:-1]
            tokens = np.asarray([*prompt, *body], dtype=np.uint32)
            yield Encoded(tokens, len(prompt), len(tokens), document.digest)
        return
    texts = [document.prompt + document.body for document in chunk]
    output = _tokenize(tokenizer, texts, offsets=True)
    for document, ids, offsets in zip(
        chunk, output["input_ids"], output["offset_mapping"], strict=True
    ):
        boundary = len(document.prompt)
        body = [i for i, (start, stop) in enumerate(offsets) if stop > boundary and stop > start]
        first, end = (body[0], body[-1] + 1) if body else (0, 0)
        yield Encoded(np.asarray(ids, dtype=np.uint32), first, end, document.digest)


def pack(
    documents: Iterable[Encoded],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    tally: Tally,
) -> Iterator[Sequence]:
    """Text packed without gaps; the incomplete rest at the end is not used.

    Raises:
        BatchError: The tokenizer has neither EOS nor BOS to part documents with.
    """
    before, after = separators(tokenizer)
    pending: list[Tokens] = []
    num_pending = 0
    for document in documents:
        parts = [document.tokens]
        if after is not None and (not len(parts[0]) or parts[0][-1] != after):
            parts.append(np.asarray([after], dtype=np.uint32))
        if before is not None and (not len(parts[0]) or parts[0][0] != before):
            parts.insert(0, np.asarray([before], dtype=np.uint32))
        pending.extend(parts)
        num_new = sum(len(part) for part in parts)
        num_pending += num_new
        tally.num_tokens += num_new
        if num_pending < sequence_length:
            continue
        tokens = np.concatenate(pending)
        num_used = num_pending - num_pending % sequence_length
        for start in range(0, num_used, sequence_length):
            yield Sequence(tokens[start : start + sequence_length].copy(), 1, sequence_length)
        pending, num_pending = [tokens[num_used:].copy()], num_pending - num_used


def one_each(
    documents: Iterable[Encoded], sequence_length: int, tally: Tally
) -> Iterator[Sequence]:
    """One sequence per question; those longer than a sequence are left out and counted."""
    for document in documents:
        if document.end > sequence_length:
            tally.num_too_long += 1
            continue
        first_target = max(document.first_target, 1)  # nothing predicts a sequence's first token
        if first_target >= document.end:
            tally.num_blank += 1
            continue
        tally.num_tokens += document.end
        yield Sequence(document.tokens[: document.end], first_target, document.end)


def separators(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """(token before each document, token after each document): EOS after, else BOS before.

    Raises:
        BatchError: The tokenizer has neither.
    """
    if tokenizer.eos_token_id is not None:
        return None, int(tokenizer.eos_token_id)
    if tokenizer.bos_token_id is not None:
        return int(tokenizer.bos_token_id), None
    raise BatchError(
        f"the tokenizer ({tokenizer.name_or_path or type(tokenizer).__name__}) has neither an EOS "
        "nor a BOS token to part documents with; set eos_token in its tokenizer_config.json"
    )


def _tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    special: bool = True,
    offsets: bool = False,
) -> Any:
    try:
        return tokenizer(
            texts,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            truncation=False,
            padding=False,
            verbose=False,
        )
    except Exception as error:  # tokenizers raises plain Exception
        raise BatchError(f"the tokenizer failed on a text: {error}") from error


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    num_chars = 0
    for document in documents:
        chunk.append(document)
        num_chars += document.num_chars
        if len(chunk) == CHUNK_DOCUMENTS or num_chars >= CHUNK_CHARS:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk
