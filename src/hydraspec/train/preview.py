"""Examples as training sees them: what is learned stands out from what is only read."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby, islice

from rich.console import Console
from rich.text import Text

from hydraspec.errors import DataError
from hydraspec.shipped import find_shipped
from hydraspec.text import TextCodec
from hydraspec.train.batch import Example
from hydraspec.train.conversations import read_conversations
from hydraspec.train.encoding import encode_all

LEARNED, READ = "bold green", "dim"


def preview_data(base: str, data: str, count: int, max_length: int, console: Console) -> None:
    """Print the first `count` examples of a data set as heads of the model `base` would learn from them.

    Raises:
        CheckpointError: the model has no tokenizer.
        DataError: the data cannot be read or tokenised, or has nothing to learn from.
    """
    codec = TextCodec.load(find_shipped(base))
    found = (example for _, part in encode_all(codec, read_conversations(data), max_length) for example in part)
    if not preview_examples(found, codec, count, console):
        raise DataError(f"{data} holds no conversation with an answer to learn from")


def preview_examples(examples: Iterable[Example], codec: TextCodec, count: int, console: Console) -> int:
    """Print the first `count` examples, special tokens included, with the tokens that are only read dimmed.

    Where there are no colours, brackets ⟦ ⟧ enclose what is learned.

    Returns:
        How many there were.
    """
    number = 0
    for number, example in enumerate(islice(examples, count), start=1):
        learned = sum(map(bool, example.mask))
        console.print(f"[b]example {number}[/b]: {len(example.ids):,} tokens, {learned:,} of them learned")
        console.print(mark_text(example, codec, brackets=console.color_system is None), soft_wrap=True)
        console.print()
    return number


def mark_text(example: Example, codec: TextCodec, brackets: bool = False) -> Text:
    """The text of an example in two styles; with `brackets`, they enclose what is learned."""
    text = Text()
    for learned, part in groupby(zip(example.mask, example.ids, strict=True), key=lambda pair: bool(pair[0])):
        piece = codec.decode([int(token) for _, token in part], special=True)
        text.append(f"⟦{piece}⟧" if learned and brackets else piece, LEARNED if learned else READ)
    return text
