"""Where the base model's hidden states come from while heads are trained: the model itself, or files of them."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hydraspec.base.attention import layout_packed
from hydraspec.base.model import BaseModel
from hydraspec.errors import CheckpointError, HydraspecError
from hydraspec.files import hash_file, write_json, write_whole
from hydraspec.train.batch import Batch
from hydraspec.train.packing import load_batch
from hydraspec.train.store import TokenStore

logger = logging.getLogger(__name__)

FORMAT = 1
TENSOR = "hidden"  # its name in a shard
ITEM_BYTES = 2  # bfloat16
SHARD_BYTES = 256 << 20  # of hidden states in one file, which is also what writing holds in memory
BATCH_TOKENS = 4096  # in one forward pass, padding included


class OnlineStates:
    """The base model itself, run on each batch."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base

    def read(self, batch: Batch) -> Tensor:
        """Hidden states `[B, T, d]` of a batch on the base model's device, in bfloat16."""
        layout = layout_packed(batch.segments, batch.positions, self._base.dtype, self._base.device)
        return self._base.read_hidden_states(batch.ids, layout).to(torch.bfloat16)


@dataclass(frozen=True)
class Shard:
    """One file: the hidden states `[tokens, d]` of conversations that follow each other, without padding."""

    file: str
    first_example: int  # by number in the token store
    examples: int
    first_token: int  # of all tokens of the store
    tokens: int
    bytes: int = 0  # of the file
    sha256: str = ""  # of the file


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
        index = _read_index(folder, base, store)
        if index is None:
            raise CheckpointError(f"{folder} holds no hidden states: it has no index.json; write them first")
        shards = [Shard(**entry) for entry in index["shards"]]
        planned = _plan(store.lengths, base.hidden_size, index["shard_bytes"])
        if len(shards) != len(planned) or shards != _fill_in(planned, shards):
            raise CheckpointError(f"the hidden states in {folder} are not complete: write them to their end first")
        for shard in shards:
            _check_shard(folder, shard, base.hidden_size, verify)
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
                raise _damaged(self._folder, shard, str(error)) from None
        return hidden.to(self._device, non_blocking=True)

    def _find_shard(self, example: int) -> int:
        return int(np.searchsorted(self._firsts, example, side="right")) - 1


# -- writing -----------------------------------------------------------------------------------------------------------


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
    index = _read_index(folder, base, store)
    if index is None:
        _refuse_other_things(folder)
        index = _describe(base, store, shard_bytes)
    for torn in folder.glob(".states-*"):  # of a run that was killed
        torn.unlink()
    planned = _plan(store.lengths, base.hidden_size, index["shard_bytes"])
    done = [shard for shard in map(_parse_shard, index["shards"]) if _is_whole(folder, shard)]
    _need_room(folder, store, base.hidden_size, sum(shard.tokens for shard in done))
    folder.mkdir(parents=True, exist_ok=True)
    kept = {shard.first_example: shard for shard in done}
    finished, written = 0, 0
    for number, shard in enumerate(planned):
        if shard.first_example not in kept:
            if not written:  # from here on the folder is known as ours
                _write_index(folder, index, kept)
            states = _read_states(base, store, shard, batch_tokens, watch, finished)
            kept[shard.first_example] = _write_shard(folder, shard, states)
            _write_index(folder, index, kept)
            written += shard.tokens
            logger.info("shard %d of %d: %d tokens", number + 1, len(planned), shard.tokens)
        finished += shard.tokens
        watch(finished)
    if not planned:
        _write_index(folder, index, kept)
    return written


def _plan(lengths: np.ndarray, hidden_size: int, shard_bytes: int) -> list[Shard]:
    """Which conversations go into which file: in order, as many as fit."""
    most = max(1, shard_bytes // (hidden_size * ITEM_BYTES))
    ends = np.cumsum(lengths)
    firsts, token = [0], 0
    while len(ends) and token < ends[-1]:
        # All that end within this shard, and one at least.
        after = max(firsts[-1] + 1, int(np.searchsorted(ends, token + most, side="right")))
        firsts.append(after)
        token = int(ends[after - 1])
    shards, token = [], 0
    for number, (first, after) in enumerate(pairwise(firsts), start=1):
        tokens = int(ends[after - 1]) - token
        name = f"states-{number:05d}-of-{len(firsts) - 1:05d}.safetensors"
        shards.append(Shard(name, first, after - first, token, tokens))
        token += tokens
    return shards


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


# -- the index ---------------------------------------------------------------------------------------------------------


def _describe(base: BaseModel, store: TokenStore, shard_bytes: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "base": base.fingerprint(),
        "base_name": base.name,
        "computed_in": str(base.dtype).removeprefix("torch."),
        "data": store.digest,
        "conversations": len(store),
        "tokens": store.num_tokens,
        "hidden_size": base.hidden_size,
        "dtype": "bfloat16",
        "shard_bytes": shard_bytes,
        "shards": [],
    }


def _write_index(folder: Path, index: dict[str, Any], kept: dict[int, Shard]) -> None:
    entries = [dataclasses.asdict(kept[first]) for first in sorted(kept)]
    write_json(folder / "index.json", {**index, "shards": entries})


def _read_index(folder: Path, base: BaseModel, store: TokenStore) -> dict[str, Any] | None:
    """The index in `folder`, or None where there is none.

    Raises:
        CheckpointError: it is damaged, or of another base model, of other data or of a newer format.
    """
    file = folder / "index.json"
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        known = index["format"], index["base"], index["base_name"], index["data"], int(index["shard_bytes"])
        for entry in index["shards"]:
            _parse_shard(entry)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is no index of hidden states ({error}): remove {folder}, or name another"
        ) from None
    version, fingerprint, name, digest, _ = known
    if version != FORMAT:
        raise CheckpointError(f"the hidden states in {folder} are of format {version}, not {FORMAT}: write them anew")
    if fingerprint != base.fingerprint() or index.get("hidden_size") != base.hidden_size:
        raise CheckpointError(
            f"the hidden states in {folder} are of another base model ({name}), not of {base.name}: remove that "
            "folder, or name another"
        )
    if digest != store.digest:
        raise CheckpointError(
            f"the hidden states in {folder} are of other data ({index.get('conversations')} conversations), or of the "
            "same cut or split in another way: remove that folder, or name another"
        )
    return dict(index)


def _parse_shard(entry: dict[str, Any]) -> Shard:
    return Shard(**entry)


def _fill_in(planned: list[Shard], written: list[Shard]) -> list[Shard]:
    """The plan, with sizes and hashes of what was written."""
    found = {shard.first_example: shard for shard in written}
    return [
        dataclasses.replace(shard, bytes=kept.bytes, sha256=kept.sha256)
        for shard in planned
        if (kept := found.get(shard.first_example))
    ]


def _refuse_other_things(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: name a folder for the hidden states")
    if folder.is_dir() and any(not file.name.startswith(".index.json.") for file in folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty and holds no hidden states: name another folder")


# -- shards on the disk ------------------------------------------------------------------------------------------------


def _is_whole(folder: Path, shard: Shard) -> bool:
    file = folder / shard.file
    return file.is_file() and file.stat().st_size == shard.bytes


def _check_shard(folder: Path, shard: Shard, hidden_size: int, verify: bool) -> None:
    """Refuse a shard that is not what was written."""
    file = folder / shard.file
    try:
        size = file.stat().st_size
        if size != shard.bytes:
            raise _damaged(folder, shard, f"it has {size:,} bytes, not {shard.bytes:,}")
        with safe_open(file, "pt") as content:
            states = content.get_slice(TENSOR)
            found = states.get_dtype(), states.get_shape()
        if found != ("BF16", [shard.tokens, hidden_size]):
            raise _damaged(folder, shard, f"it holds {found[0]} {found[1]}")
        if verify and hash_file(file) != shard.sha256:
            raise _damaged(folder, shard, "its content is not what was written")
    except FileNotFoundError:
        raise _damaged(folder, shard, "it is missing") from None
    except (SafetensorError, OSError) as error:
        raise _damaged(folder, shard, str(error)) from None


def _damaged(folder: Path, shard: Shard, why: str) -> CheckpointError:
    return CheckpointError(f"{folder / shard.file} is damaged ({why}): remove that file, and it is written again")
