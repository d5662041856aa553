"""Conversations to tokens, with a mask of what the assistant wrote."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

from hydraspec.errors import DataError, RequestError
from hydraspec.text import TextCodec
from hydraspec.train.batch import Example
from hydraspec.train.conversations import Conversation

AT_ONCE = 256  # conversations that the tokenizer is given together
SHOWN = 60  # characters of an example that a message shows


@dataclass(frozen=True)
class _Rendered:
    """A text with the spans of it, in characters, that are learned."""

    text: str
    spans: tuple[tuple[int, int], ...]
    where: str


def encode_all(
    codec: TextCodec, conversations: Iterable[Conversation], max_length: int, vocab_size: int | None = None
) -> Iterator[tuple[str, list[Example]]]:
    """The id of each conversation, and what is learned from it; the tokenizer reads many at a time.

    A conversation is one example, cut to `max_length` tokens. A plain text is cut into as many as it needs. Of what is
    too short to learn from, nothing is left: an empty list.

    Args:
        codec: the base model's tokenizer.
        conversations: read only as far as needed.
        max_length: tokens of an example at most.
        vocab_size: of the base model; None: whatever the tokenizer says is taken.

    Raises:
        DataError: see `encode_conversation`; or the tokenizer knows tokens that the base model does not.
    """
    source = iter(conversations)
    while batch := list(islice(source, AT_ONCE)):
        talks = [_render(codec, c) for c in batch if c.messages]
        texts = [c.text for c in batch if c.text is not None]
        marked = iter(_mark_all(codec, talks))
        plain = iter(codec.tokenizer(texts, verbose=False)["input_ids"] if texts else [])
        for conversation in batch:
            examples: list[Example] = []
            if conversation.messages:
                examples = [next(marked)]
                examples = [Example(examples[0].ids[:max_length], examples[0].mask[:max_length])]
            elif conversation.text is not None:
                examples = _cut(next(plain), max_length)
            if vocab_size is not None:
                for example in examples:
                    check_tokens(example.ids, vocab_size)
            yield conversation.id, [example for example in examples if _can_be_learned(example.mask)]


def encode_conversation(codec: TextCodec, conversation: Conversation, max_length: int) -> Example | None:
    """One conversation as tokens, with a mask of what the assistant wrote, its end token included.

    What is learned comes from the chat template itself: what it writes for an assistant's turn behind the generation
    prompt. That the mask holds exactly this is checked, see `_mark`. Of a plain text, or its first `max_length` tokens,
    everything but the first token is learned.

    Returns:
        None where, after the cut, the assistant does not write two tokens in a row: no head has a place to learn from.

    Raises:
        DataError: there is no chat template; it refuses the messages, or rewrites what they say; no turn is the
            assistant's; or a token holds both the assistant's words and others.
    """
    (_, examples), *_ = encode_all(codec, [conversation], max_length)
    return examples[0] if examples else None


def check_tokens(ids: Sequence[int], vocab_size: int) -> None:
    """Refuse token ids that the base model does not know.

    Raises:
        DataError: one of `ids` is not below `vocab_size`.
    """
    if ids and max(ids) >= vocab_size:
        raise DataError(
            f"the tokenizer says token {max(ids)}, but the base model knows only {vocab_size}: it belongs to another "
            "model; put the right one into the base model's folder"
        )


def _can_be_learned(mask: Sequence[bool]) -> bool:
    """Whether an anchor is there: a token with two of the assistant's right after it."""
    return any(mask[place] and mask[place + 1] for place in range(1, len(mask) - 1))


def _cut(ids: Sequence[int], max_length: int) -> list[Example]:
    """A plain text in pieces; the first token of each follows nothing, so that it is not learned."""
    pieces = [list(ids[start : start + max_length]) for start in range(0, len(ids), max_length)]
    return [Example(piece, [place > 0 for place in range(len(piece))]) for piece in pieces]


# -- what the template says --------------------------------------------------------------------------------------------


def _render(codec: TextCodec, conversation: Conversation) -> _Rendered:
    """The conversation as its template writes it, and where the assistant's turns lie."""
    messages, where = conversation.messages, conversation.where
    if not codec.is_chat:
        raise DataError(
            f"{where} is a conversation, but the base model's tokenizer has no chat template to write it with: give "
            "plain text, or put a chat template into the base model's folder"
        )
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise DataError(f"{where} has no answer of the assistant to learn from ({_show(messages)}); remove it")
    try:
        text = codec.render(messages)
        spans = tuple(_find_span(codec, messages, turn, text, where) for turn in answers)
    except RequestError as error:
        raise DataError(f"{where}: {error}") from None
    for (_, end), (start, _) in pairwise(spans):
        if start < end:
            raise DataError(f"{where}: the chat template writes one turn into another ({_show(messages)})")
    return _Rendered(text, spans, where)


def _find_span(
    codec: TextCodec, messages: Sequence[dict[str, str]], turn: int, text: str, where: str
) -> tuple[int, int]:
    """Where the assistant's turn number `turn` lies in `text`, from behind the generation prompt to its end."""
    before = codec.render(messages[:turn], answer_follows=True)
    if text.startswith(before):
        after = text if turn == len(messages) - 1 else codec.render(messages[: turn + 1])
        if text.startswith(after) and len(after) > len(before):
            return len(before), len(after)
        # Some templates write the last turn in another way than the same turn with others behind it, with an empty
        # thought for instance: then it ends with its own words and the special token behind them.
        said, start = messages[turn]["content"].strip(), len(before)
        start += len(text[start:]) - len(text[start:].lstrip())
        if text.startswith(said, start):
            end = start + len(said)
            ending = [token for token in codec.tokenizer.all_special_tokens if token and text.startswith(token, end)]
            return len(before), end + max(map(len, ending), default=0)
    raise DataError(
        f"{where}: the chat template rewrites earlier turns, so that the assistant's cannot be told "
        f"({_show([messages[turn]])}); use another template, or conversations of one answer"
    )


# -- from the text's spans to the tokens' mask -------------------------------------------------------------------------


def _mark_all(codec: TextCodec, talks: Sequence[_Rendered]) -> list[Example]:
    if not talks:
        return []
    fast = codec.tokenizer.is_fast
    encoded = codec.tokenizer(
        [talk.text for talk in talks], add_special_tokens=False, return_offsets_mapping=fast, verbose=False
    )
    offsets = encoded["offset_mapping"] if fast else [None] * len(talks)
    return [_mark(codec, *part) for part in zip(talks, encoded["input_ids"], offsets, strict=True)]


def _mark(codec: TextCodec, talk: _Rendered, ids: list[int], offsets: Any) -> Example:
    """The mask of the tokens in the spans; each border is checked to lie between two tokens.

    Raises:
        DataError: a border lies in a token, or a span has none.
    """
    borders = [border for span in talk.spans for border in span]
    places = [_find_place(codec, talk.text, ids, offsets, border) for border in borders]
    mask = [False] * len(ids)
    for (start, end), first, last in zip(talk.spans, places[::2], places[1::2], strict=True):
        if first is None or last is None or first >= last:
            border = start if first is None else end
            around = talk.text[max(0, border - SHOWN // 2) : border], talk.text[border : border + SHOWN // 2]
            raise DataError(
                f"{talk.where}: the assistant's turn does not begin and end between tokens: one holds what lies on "
                f"both sides of {around[0]!r} | {around[1]!r}; use a chat template with special tokens there"
            )
        mask[first:last] = [True] * (last - first)
    return Example(list(ids), mask)


def _find_place(codec: TextCodec, text: str, ids: list[int], offsets: Any, border: int) -> int | None:
    """How many tokens lie before the character `border`, or None where one lies on both sides.

    Offsets tell it where tokens meet at the border. Where they do not (some leave spaces out, slow tokenizers give
    none), the beginning of the text up to the border must have the same tokens alone as in the whole text.
    """
    if offsets is not None:
        place = bisect_left(offsets, border, key=lambda offset: offset[0])
        meets_before = place == 0 if border == 0 else place > 0 and offsets[place - 1][1] == border
        meets_after = place == len(ids) or (offsets[place][0] == border and offsets[place][1] > border)
        if meets_before and meets_after:
            return place
    alone = codec.tokenizer(text[:border], add_special_tokens=False, verbose=False)["input_ids"]
    return len(alone) if list(alone) == list(ids[: len(alone)]) else None


def _show(messages: Sequence[dict[str, str]]) -> str:
    """The beginning of messages, on one line."""
    said = " ".join(f"{message['role']}: {message['content']}" for message in messages)
    return repr(" ".join(said.split())[:SHOWN])
