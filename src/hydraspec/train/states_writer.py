"""Writing the base model's hidden states to files, once for many runs."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hydraspec.base.model import BaseModel
from hydraspec.errors import CheckpointError, HydraspecError
from hydraspec.files import hash_file, write_whole
from hydraspec.train.hidden_states import OnlineStates
from hydraspec.train.packing import load_batch
from hydraspec.train.states_index import (
    ITEM_BYTES,
    TENSOR,
    Shard,
    describe_states,
    is_whole,
    parse_shard,
    plan_shards,
    read_index,
    write_index,
)
from hydraspec.train.store import TokenStore

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 << 20  # of hidden states in one file, which is also what writing holds in memory
BATCH_TOKENS = 4096  # in one forward pass, padding included


def count_bytes(store: TokenStore, hidden_size: int) -> int:
    """Bytes that the hidden states of all conversations of a store take on the disk, headers aside."""
    return store.num_tokens * hidden_size * ITEM_BYTES


def write_hidden_states(
    base: BaseModel,
    store: TokenStore,
    folder: Path,
    watch: Callable[[int], None] = lambda _: None,
    batch_tokens: int = BATCH_TOKENS,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write the hidden states of all conversations of a store, unpadded, in bfloat16, for `HiddenStates.open`.

    Shards that `folder` holds already are kept: what was killed goes on after its last whole shard, and where nothing
    is missing nothing is done.

    Args:
        base: the model to read them from.
        store: the conversations.
        folder: for `index.json` and `states-00001-of-000NN.safetensors`, …; must be empty but for these.
        watch: told the number of tokens done so far, those of kept shards included.
        batch_tokens: tokens of a forward pass, padding included; conversations of like length are read together.
        shard_bytes: hidden states of one file; a longer conversation has a file of its own.

    Returns:
        The number of tokens whose states were written now.

    Raises:
        CheckpointError: `folder` holds those of another base model or other data, or other things.
        HydraspecError: the disk has not the room, before the first byte; or it is full, and finished shards stay.
    """
    index = read_index(folder, base, store)
    if index is None:
        _refuse_other_things(folder)
        index = describe_states(base, store, shard_bytes)
    for torn in folder.glob(".states-*"):  # of a run that was killed
        torn.unlink()
    planned = plan_shards(store.lengths, base.hidden_size, index["shard_bytes"])
    done = [shard for shard in map(parse_shard, index["shards"]) if is_whole(folder, shard)]
    _need_room(folder, store, base.hidden_size, sum(shard.tokens for shard in done))
    folder.mkdir(parents=True, exist_ok=True)
    kept = {shard.first_example: shard for shard in done}
    finished, written = 0, 0
    for number, shard in enumerate(planned):
        if shard.first_example not in kept:
            if not written:  # from here on the folder is known as ours
                write_index(folder, index, kept)
            states = _read_states(base, store, shard, batch_tokens, watch, finished)
            kept[shard.first_example] = _write_shard(folder, shard, states)
            write_index(folder, index, kept)
            written += shard.tokens
            logger.info("shard %d of %d: %d tokens", number + 1, len(planned), shard.tokens)
        finished += shard.tokens
        watch(finished)
    if not planned:
        write_index(folder, index, kept)
    return written


def _read_states(
    base: BaseModel, store: TokenStore, shard: Shard, batch_tokens: int, watch: Callable[[int], None], before: int
) -> Tensor:
    """Hidden states `[tokens, d]` of one shard, in bfloat16, on the host."""
    states = torch.empty(shard.tokens, base.hidden_size, dtype=torch.bfloat16)
    starts = np.cumsum(store.lengths[: shard.first_example + shard.examples]) - shard.first_token
    online, done = OnlineStates(base), before
    for examples in _group_by_length(store.lengths, shard, batch_tokens):
        batch = load_batch(store, [(example,) for example in examples])
        hidden = online.read(batch.to(base.device)).cpu()
        for place in batch.places:
            end = int(starts[place.example])
            states[end - place.length : end] = hidden[place.row, : place.length]
        done += batch.num_tokens
        watch(done)
    return states


def _group_by_length(lengths: np.ndarray, shard: Shard, batch_tokens: int) -> Iterator[list[int]]:
    """The conversations of a shard, the longest first, as many together as `batch_tokens` holds."""
    own = lengths[shard.first_example : shard.first_example + shard.examples]
    order = (np.argsort(-own, kind="stable") + shard.first_example).tolist()
    while order:
        count = max(1, batch_tokens // int(lengths[order[0]]))
        yield order[:count]
        order = order[count:]


def _write_shard(folder: Path, shard: Shard, states: Tensor) -> Shard:
    """Write one file whole; the shard with its size and hash."""
    file = folder / shard.file
    write_whole(file, lambda part: save_file({TENSOR: states}, part))
    return dataclasses.replace(shard, bytes=file.stat().st_size, sha256=hash_file(file))


def _need_room(folder: Path, store: TokenStore, hidden_size: int, tokens_done: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    need, free = count_bytes(store, hidden_size) - tokens_done * hidden_size * ITEM_BYTES, shutil.disk_usage(there).free
    if free < need:
        raise HydraspecError(
            f"the hidden states of {store.num_tokens - tokens_done:,} tokens need {need / 1e6:,.0f} MB, but the disk "
            f"of {folder} has {free / 1e6:,.0f} MB free: free some, name another disk, or train without them"
        )


def _refuse_other_things(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: name a folder for the hidden states")
    if folder.is_dir() and any(not file.name.startswith(".index.json.") for file in folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty and holds no hidden states: name another folder")
