"""Prompts to measure on."""

from __future__ import annotations

from pathlib import Path

from hydraspec.errors import DataError
from hydraspec.text import TextCodec
from hydraspec.train.data import read_conversations

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


def read_prompts(file: Path, codec: TextCodec, count: int, max_tokens: int) -> list[list[int]]:
    """Prompts from held-out conversations: each up to a turn of the user's, with the answer to follow.

    The first prompt ends with the first user turn of its conversation, the next with the second of its own, and so on
    in a cycle of four, so that short and long histories both occur. Prompts over `max_tokens` tokens are left out.

    Raises:
        DataError: the file cannot be read, or holds too few.
    """
    prompts: list[list[int]] = []
    for _, messages in read_conversations(file):
        turns = [i for i, message in enumerate(messages) if message["role"] == "user" and i + 1 < len(messages)]
        if not turns:
            continue
        ids = codec.encode(messages[: turns[min(len(prompts) % 4, len(turns) - 1)] + 1])
        if len(ids) <= max_tokens:
            prompts.append(ids)
        if len(prompts) == count:
            return prompts
    raise DataError(f"{file} gives only {len(prompts)} prompts of at most {max_tokens} tokens, {count} are wanted")
