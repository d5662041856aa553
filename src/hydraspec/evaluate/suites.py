"""Prompts to measure on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from hydraspec.errors import DataError
from hydraspec.text import TextCodec
from hydraspec.train.conversations import read_conversations, read_objects

# Written for the shipped model, which books tables, rooms, seats and coffee and imitates school arithmetic.
DEMO_PROMPTS = (
    "I am looking for a hotel in Seattle for two nights.",
    "Can you find me an Italian restaurant in San Francisco?",
    "I would like a large latte with oat milk, please.",
    "What movies are playing in Berkeley tonight?",
    "A baker makes 12 trays with 8 rolls each and sells 70 rolls. How many rolls are left?",
    "I need to rent a car in Los Angeles from the 3rd of March.",
    "Is there a concert this weekend in Vancouver?",
    "Sara reads 15 pages a day. How many pages does she read in 3 weeks?",
    "Please transfer 200 dollars to my savings account.",
    "What will the weather be like in Portland on Friday?",
    "Book a table for four at 7 pm at an Indian place in Oakland.",
    "I want to see a doctor in San Jose, a dentist if possible.",
)


def find_prompts(
    file: Path | None, codec: TextCodec, count: int | None, most: int, max_tokens: int | None
) -> list[list[int]]:
    """The first `count` prompts of a file, or of `DEMO_PROMPTS` where there is none.

    Args:
        file: see `iterate_prompts`.
        codec: for the prompts.
        count: None: as many as there are, of a file at most `most`.
        most: see `count`.
        max_tokens: longer prompts are left out.

    Raises:
        DataError: the file cannot be read, or there are too few prompts.
    """
    if file is None:
        found = [codec.encode(prompt) for prompt in DEMO_PROMPTS][:count]
    else:
        found = list(islice(iterate_prompts(file, codec, max_tokens), count or most))
    if len(found) < (count or 1):
        limit = f" of at most {max_tokens} tokens" if file is not None and max_tokens is not None else ""
        raise DataError(f"{file or 'the demo'} gives only {len(found)} prompts{limit}, {count or 1} are wanted")
    return found


def read_prompts(file: Path, codec: TextCodec, count: int, max_tokens: int) -> list[list[int]]:
    """The first `count` prompts of a file; errors as in `find_prompts`."""
    return find_prompts(file, codec, count, count, max_tokens)


def iterate_prompts(file: Path, codec: TextCodec, max_tokens: int | None) -> Iterator[list[int]]:
    """Prompts in token ids from a JSON-lines file, plain or gzipped; those over `max_tokens` tokens are left out.

    A line is a string, an object with a string under `prompt`, or one with a list of strings under `turns`, as in
    MT-Bench; of those the first is taken. Or all lines are conversations: the first prompt ends with the first user
    turn of its conversation, the next with the second of its own, and so on in a cycle of four, so that short and long
    histories both occur.

    Raises:
        DataError: the file cannot be read, or a line (named by its number) holds no prompt.
    """
    taken = 0
    if _holds_conversations(file):
        for messages in (conversation.messages for conversation in read_conversations(file)):
            turns = [i for i, message in enumerate(messages) if message["role"] == "user" and i + 1 < len(messages)]
            if turns:
                ids = codec.encode(messages[: turns[min(taken % 4, len(turns) - 1)] + 1])
                if max_tokens is None or len(ids) <= max_tokens:
                    taken += 1
                    yield ids
        return
    for number, content in read_objects(file):
        ids = codec.encode(_find_text(content, f"{file}, line {number}"))
        if max_tokens is None or len(ids) <= max_tokens:
            yield ids


def _holds_conversations(file: Path) -> bool:
    """Whether the first line of a file is a conversation."""
    first = next(read_objects(file), (0, None))[1]
    return isinstance(first, dict) and ("conversations" in first or "messages" in first)


def _find_text(content: Any, where: str) -> str:
    """The prompt that a line holds."""
    text = content
    if isinstance(content, dict):
        turns = content.get("turns")
        text = turns[0] if isinstance(turns, list) and turns else content.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f'{where} holds no prompt: give a string, {{"prompt": …}}, {{"turns": […]}} or {{"conversations": […]}}'
        )
    return text
