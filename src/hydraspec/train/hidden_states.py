"""Where the base model's hidden states come from while heads are trained: the model itself, or files of them."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hydraspec.base.attention import layout_packed
from hydraspec.base.model import BaseModel
from hydraspec.errors import CheckpointError
from hydraspec.train.batch import Batch
from hydraspec.train.states_index import TENSOR, Shard, check_shard, damaged_shard, fill_in, plan_shards, read_index
from hydraspec.train.store import TokenStore


class OnlineStates:
    """The base model itself, run on each batch."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base

    def read(self, batch: Batch) -> Tensor:
        """Hidden states `[B, T, d]` of a batch on the base model's device, in bfloat16."""
        layout = layout_packed(batch.segments, batch.positions, self._base.dtype, self._base.device)
        return self._base.read_hidden_states(batch.ids, layout).to(torch.bfloat16)


class HiddenStates:
    """Hidden states that were written once, read from their files as batches ask for them.

    In memory are 8 bytes a conversation; a shard is mapped only while a batch is read.
    """

    def __init__(self, folder: Path, shards: list[Shard], store: TokenStore, base: BaseModel) -> None:
        self._folder, self._shards, self._lengths = folder, shards, store.lengths
        self._starts = np.cumsum(store.lengths) - store.lengths  # the first token of each conversation
        self._firsts = np.array([shard.first_example for shard in shards], np.int64)
        self._width, self._device = base.hidden_size, base.device

    @classmethod
    def open(cls, folder: Path, base: BaseModel, store: TokenStore, verify: bool = True) -> HiddenStates:
        """Take up what `write_hidden_states` wrote to `folder`.

        Args:
            folder: with `index.json` and its shards.
            base: the model that they must be of.
            store: the conversations that they must be of.
            verify: compare the hash of every shard as well, which reads all of them; sizes and headers always are.

        Raises:
            CheckpointError: they are missing, incomplete, of another base model or other data, or a shard is missing,
                cut short or changed.
        """
        index = read_index(folder, base, store)
        if index is None:
            raise CheckpointError(f"{folder} holds no hidden states: it has no index.json; write them first")
        shards = [Shard(**entry) for entry in index["shards"]]
        planned = plan_shards(store.lengths, base.hidden_size, index["shard_bytes"])
        if len(shards) != len(planned) or shards != fill_in(planned, shards):
            raise CheckpointError(f"the hidden states in {folder} are not complete: write them to their end first")
        for shard in shards:
            check_shard(folder, shard, base.hidden_size, verify)
        return cls(folder, shards, store, base)

    def read(self, batch: Batch) -> Tensor:
        """Hidden states `[B, T, d]` of a batch on the base model's device, in bfloat16; zeros on padding.

        Raises:
            CheckpointError: a shard was removed or cut short since it was opened.
        """
        hidden = torch.zeros(*batch.ids.shape, self._width, dtype=torch.bfloat16)
        in_order = sorted(batch.places, key=lambda place: place.example)
        for number, places in groupby(in_order, key=lambda place: self._find_shard(place.example)):
            shard = self._shards[number]
            try:
                # Opened anew for each batch: that checks the file's size, and leaves no memory mapped.
                with safe_open(self._folder / shard.file, "pt") as file:
                    states = file.get_slice(TENSOR)
                    for place in places:
                        assert place.length == self._lengths[place.example]
                        start = int(self._starts[place.example]) - shard.first_token
                        row = hidden[place.row, place.start : place.start + place.length]
                        row.copy_(states[start : start + place.length])
            except (SafetensorError, OSError) as error:
                raise damaged_shard(self._folder, shard, str(error)) from None
        return hidden.to(self._device, non_blocking=True)

    def _find_shard(self, example: int) -> int:
        return int(np.searchsorted(self._firsts, example, side="right")) - 1
