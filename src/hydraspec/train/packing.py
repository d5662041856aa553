"""Rows of conversations: which lie side by side, in which order, and batches of them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from hydraspec.train.batch import Batch, Place
from hydraspec.train.store import TokenStore

Row = tuple[int, ...]  # the numbers of the conversations that lie in a row

WINDOW = 4096  # conversations that are packed with each other: enough to fill rows, few enough to keep orders random


class RowPlan:
    """The rows of a whole run, in an order that depends on lengths and seed alone, so that it can be taken up anywhere.

    Attributes:
        num_rows: in all.
        num_tokens: in all, padding left out.
        row_length: slots of a row.
    """

    def __init__(
        self, lengths: np.ndarray, row_length: int, seed: int = 0, epochs: int = 1, max_tokens: int = 0
    ) -> None:
        """Count the rows, once through.

        Args:
            lengths: `[conversations]` int64, none above `row_length`.
            row_length: slots of a row.
            seed: each pass has an order of its own that follows from it.
            epochs: passes over the data.
            max_tokens: end with the row that reaches this many tokens, after as many passes as it takes; 0: by epochs.
        """
        self._lengths, self.row_length, self._seed = lengths, row_length, seed
        total = int(lengths.sum())
        self._epochs = epochs
        if max_tokens:
            self._epochs = math.ceil(max_tokens / total) if total else 0
        self.num_rows, self.num_tokens = 0, 0
        self._first_rows: list[int] = []  # the number of the first row of each window, of all passes
        for rows in self._walk():
            self._first_rows.append(self.num_rows)
            for row in rows:
                self.num_rows += 1
                self.num_tokens += int(lengths[list(row)].sum()) if max_tokens else 0
                if max_tokens and self.num_tokens >= max_tokens:
                    return
        self.num_tokens = total * self._epochs

    @property
    def fill(self) -> float:
        """The share of slots that hold a token."""
        return self.num_tokens / max(1, self.num_rows * self.row_length)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """The rows from number `start` on."""
        first = max(0, bisect_right(self._first_rows, start) - 1)
        number = self._first_rows[first] if self._first_rows else 0
        for rows in self._walk(first):
            for row in rows:
                if number == self.num_rows:
                    return
                if number >= start:
                    yield row
                number += 1

    def _walk(self, first: int = 0) -> Iterator[list[Row]]:
        """The windows of all passes from number `first` on, each as its rows."""
        windows = math.ceil(len(self._lengths) / WINDOW)
        for epoch in range(first // max(1, windows), self._epochs):
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._lengths))
            for window in range(first - epoch * windows if epoch * windows < first else 0, windows):
                members = order[window * WINDOW : (window + 1) * WINDOW]
                yield pack_window(self._lengths, members, self.row_length, (self._seed, epoch, window))


def pack_window(lengths: np.ndarray, members: np.ndarray, row_length: int, seed: tuple[int, ...]) -> list[Row]:
    """Conversations in rows of at most `row_length` tokens, in an order that `seed` decides.

    The longest come first, each into the fullest row that still holds it (best fit, decreasing). The rows are shuffled
    then, so that a step sees rows of all kinds.

    Args:
        lengths: `[conversations]` int64, of all of them.
        members: `[W]` int64, the numbers of those to pack.
        row_length: slots of a row.
        seed: of the order of the rows.
    """
    sizes = lengths[members]
    assert not len(sizes) or int(sizes.max()) <= row_length, "a conversation is longer than a row"
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # by free slots: the rows that have them
    rooms = 0  # bit n: there is a row with n free slots
    longest_first = np.argsort(-sizes, kind="stable")
    for member, size in zip(members[longest_first].tolist(), sizes[longest_first].tolist(), strict=True):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1  # the lowest bit: the fullest row
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
            rows[row].append(member)
        else:
            room, row = row_length, len(rows)
            rows.append([member])
        with_room[room - size].append(row)
        rooms |= 1 << (room - size)
    order = np.random.default_rng(seed).permutation(len(rows))
    return [tuple(rows[row]) for row in order.tolist()]


def load_batch(store: TokenStore, rows: Sequence[Row], row_length: int | None = None) -> Batch:
    """The conversations of some rows as a batch, as wide as its longest row or `row_length`; no rows: all padding."""
    lengths = [[int(store.lengths[example]) for example in row] for row in rows]
    width = row_length or max([2, *map(sum, lengths)])
    ids, positions = np.zeros((max(1, len(rows)), width), np.int64), np.zeros((max(1, len(rows)), width), np.int64)
    mask, segments = np.zeros(ids.shape, bool), np.full(ids.shape, -1, np.int64)
    places = []
    for number, row in enumerate(rows):
        start = 0
        for segment, (example, length) in enumerate(zip(row, lengths[number], strict=True)):
            span = slice(start, start + length)
            ids[number, span], mask[number, span] = store.read(example)
            segments[number, span], positions[number, span] = segment, np.arange(length)
            places.append(Place(number, start, length, example))
            start += length
    tokens, learned, segment_numbers, within = map(torch.from_numpy, (ids, mask, segments, positions))
    return Batch(tokens, learned, segment_numbers, within, tuple(places))
