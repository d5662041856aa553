"""Conversations for training: ShareGPT-form JSONL, tokenised with a mask of the assistant's tokens."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydraspec.errors import DataError, RequestError
from hydraspec.text import TextCodec

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Example:
    """One tokenised conversation."""

    ids: list[int]
    mask: list[bool]  # True: the assistant wrote this token

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.mask)


@dataclass(frozen=True)
class Batch:
    """Right-padded examples: `ids` `[B, T]` int64, `mask` `[B, T]` bool (False on padding), real tokens in all."""

    ids: Tensor
    mask: Tensor
    num_tokens: int


def read_conversations(file: Path) -> Iterator[tuple[int, list[dict[str, str]]]]:
    """Line numbers and messages (`role`, `content`) of a ShareGPT-form JSONL file, plain or gzipped.

    Raises:
        DataError: the file cannot be read, or a line (named by its number) is not such a conversation.
    """
    for number, content in read_objects(file):
        yield number, _parse_conversation(content, f"{file}, line {number}")


def read_objects(file: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and values of a JSON-lines file, plain or gzipped.

    Raises:
        DataError: the file cannot be read, or a line (named by its number) is not JSON.
    """
    opener = gzip.open if file.suffix == ".gz" else open
    number = 0
    try:
        with opener(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except FileNotFoundError:
        raise DataError(f"data file {file} does not exist") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {number} is not JSON ({error}); mend or remove it") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{file} cannot be read after line {number}: {error}") from None


def _parse_conversation(content: Any, where: str) -> list[dict[str, str]]:
    turns = content.get("conversations") if isinstance(content, dict) else None
    if not isinstance(turns, list) or not turns:
        raise DataError(f'{where} has no list of turns under "conversations"')
    messages = []
    for turn in turns:
        role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise DataError(f'{where}: a turn needs "from" (human, gpt or system) and "value" (text), not {turn!r:.80}')
        messages.append({"role": role, "content": turn["value"]})
    # A conversation that was cut out of a longer one may begin with an answer to nothing.
    return list(dropwhile(lambda message: message["role"] == "assistant", messages))


def encode_conversation(codec: TextCodec, messages: Sequence[dict[str, str]], where: str) -> Example:
    """Tokenise a conversation with the chat template; mark what the assistant wrote, its end token included.

    The spans come from the template itself: what it adds for an assistant's turn after the generation prompt.

    Raises:
        DataError: the template does not extend its own prefix, so that the spans cannot be told.
    """
    try:
        text = codec.render(messages)
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                before = codec.render(messages[:turn], answer_follows=True)
                after = text if turn == len(messages) - 1 else codec.render(messages[: turn + 1])
                if not (after.startswith(before) and text.startswith(after)):
                    raise DataError(
                        f"{where}: the chat template rewrites earlier turns; the assistant's cannot be told"
                    )
                spans.append((len(before), len(after)))
    except RequestError as error:
        raise DataError(f"{where}: {error}") from None
    encoded = codec.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask, span = [], 0
    for start, end in encoded["offset_mapping"]:
        while span < len(spans) and start >= spans[span][1]:
            span += 1
        mask.append(span < len(spans) and start >= spans[span][0] and end > start)
    return Example(list(encoded["input_ids"]), mask)


def read_examples(file: Path, codec: TextCodec, max_length: int, limit: int | None = None) -> Iterator[Example]:
    """Examples of a file, cut to `max_length` tokens; those without an assistant's token are left out.

    Raises:
        DataError: see `read_conversations` and `encode_conversation`.
    """
    if not codec.is_chat:
        raise DataError("the base model's tokenizer has no chat template, which tells the assistant's tokens")
    given = 0
    for number, messages in read_conversations(file):
        if given == limit:
            return
        if not messages:
            continue
        example = encode_conversation(codec, messages, f"{file}, line {number}")
        example = Example(example.ids[:max_length], example.mask[:max_length])
        if sum(example.mask) > 1:
            yield example
            given += 1


def make_batches(examples: Sequence[Example], batch_tokens: int, seed: int) -> list[Batch]:
    """Batches of at most `batch_tokens` tokens, padding included, of examples of like length, in shuffled order."""
    order = list(range(len(examples)))
    rng = random.Random(seed)
    rng.shuffle(order)
    batches: list[Batch] = []
    # Sorted within a pool of many batches only: little padding, and yet mixed batches.
    pool_size = max(1, 64 * batch_tokens // max(1, sum(len(e.ids) for e in examples) // max(1, len(examples))))
    for start in range(0, len(order), pool_size):
        pool = sorted(order[start : start + pool_size], key=lambda i: len(examples[i].ids))
        row: list[Example] = []
        for index in pool:
            example = examples[index]
            if row and (len(row) + 1) * len(example.ids) > batch_tokens:
                batches.append(pad(row))
                row = []
            row.append(example)
        batches.append(pad(row))
    rng.shuffle(batches)
    return batches


def pad(examples: Sequence[Example]) -> Batch:
    """Right-pad examples to one length."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.ids)] = torch.tensor(example.mask)
    return Batch(ids, mask, sum(len(example.ids) for example in examples))


def iterate_epochs(examples: Sequence[Example], batch_tokens: int, seed: int, epochs: int) -> Iterable[Batch]:
    """Batches of `epochs` passes, each in an order of its own."""
    for epoch in range(epochs):
        yield from make_batches(examples, batch_tokens, seed + epoch)


def count_assistant_tokens(examples: Iterable[Example], vocab_size: int) -> Tensor:
    """How often the assistant writes each token, `[V]` int64."""
    tokens = [token for example in examples for token, mine in zip(example.ids, example.mask, strict=True) if mine]
    return torch.bincount(torch.tensor(tokens), minlength=vocab_size)


def describe(file: Path, examples: Sequence[Example]) -> dict[str, Any]:
    """What a model card says of the data."""
    return {
        "file": file.name,
        "conversations": len(examples),
        "tokens": sum(len(e.ids) for e in examples),
        "assistant_tokens": sum(sum(e.mask) for e in examples),
    }
