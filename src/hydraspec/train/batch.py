"""Batches for teacher-forced training: conversations side by side in rows, and where each head learns from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One tokenised conversation."""

    ids: list[int]
    mask: list[bool]  # True: the assistant wrote this token

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.mask)


@dataclass(frozen=True)
class Place:
    """Where a conversation lies in a batch."""

    row: int
    start: int  # of its first token in the row
    length: int
    example: int  # its number in the token store


@dataclass(frozen=True)
class Batch:
    """Rows `[B, T]` of conversations side by side; none sees another. Padding lies at the end of a row."""

    ids: Tensor  # int64, 0 on padding
    mask: Tensor  # bool: the assistant wrote this token; False on padding
    segments: Tensor  # int64: which conversation of its row a token belongs to, from 0; -1 on padding
    positions: Tensor  # int64: within the conversation, from 0; 0 on padding
    places: tuple[Place, ...]

    def __post_init__(self) -> None:
        assert self.ids.shape == self.mask.shape == self.segments.shape == self.positions.shape

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(place.length for place in self.places)

    @cached_property
    def reach(self) -> Tensor:
        """`[B, T]` int64: how many tokens right after this one the assistant wrote in one go, in this conversation.

        Example: the mask `0 1 1 0 1` of one conversation has the reach `2 1 0 1 0`.
        """
        width = self.ids.shape[1]
        goes_on = torch.zeros_like(self.mask)  # from the token before
        goes_on[:, 1:] = self.mask[:, 1:] & (self.segments[:, 1:] == self.segments[:, :-1])
        # The first token after t that does not go on; a flipped running minimum finds it for all t at once.
        stops = torch.arange(width).masked_fill(goes_on, width)
        nearest = stops.flip(1).cummin(1).values.flip(1)  # at or after each token
        after = torch.cat([nearest[:, 1:], nearest.new_full((len(nearest), 1), width)], 1)
        return after - torch.arange(1, width + 1)

    def find_anchors(self, head: int) -> Tensor:
        """Where head `head` is trained: flat indices `row * T + t` `[R]` int64.

        There the root x_{t+1} and all the tokens up to the target x_{t+2+head} are the assistant's, so that the path is
        one that decoding could meet.
        """
        return (self.reach >= head + 2).flatten().nonzero().flatten()

    def token_lengths(self) -> Tensor:
        """`[B, T]` int64: for each token the length of its conversation; 0 on padding."""
        lengths = torch.zeros_like(self.ids)
        for place in self.places:
            lengths[place.row, place.start : place.start + place.length] = place.length
        return lengths

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        tensors = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if name in _TENSORS}
        return replace(self, **tensors)


_TENSORS = ("ids", "mask", "segments", "positions")
