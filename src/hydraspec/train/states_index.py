"""Files of hidden states: which conversations are in which, of what base and data they are, and if they are whole."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from hydraspec.base.model import BaseModel
from hydraspec.errors import CheckpointError
from hydraspec.files import hash_file, write_json
from hydraspec.train.store import TokenStore

FORMAT = 1
TENSOR = "hidden"  # its name in a shard
ITEM_BYTES = 2  # bfloat16


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


def plan_shards(lengths: np.ndarray, hidden_size: int, shard_bytes: int) -> list[Shard]:
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


# -- the index ---------------------------------------------------------------------------------------------------------


def describe_states(base: BaseModel, store: TokenStore, shard_bytes: int) -> dict[str, Any]:
    """The index of a folder to come: what its hidden states are of."""
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


def write_index(folder: Path, index: dict[str, Any], kept: dict[int, Shard]) -> None:
    """Write the index with the shards that there are, by their first conversation."""
    entries = [dataclasses.asdict(kept[first]) for first in sorted(kept)]
    write_json(folder / "index.json", {**index, "shards": entries})


def read_index(folder: Path, base: BaseModel, store: TokenStore) -> dict[str, Any] | None:
    """The index in `folder`, or None where there is none.

    Raises:
        CheckpointError: it is damaged, or of another base model, of other data or of a newer format.
    """
    file = folder / "index.json"
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        known = index["format"], index["base"], index["base_name"], index["data"], int(index["shard_bytes"])
        for entry in index["shards"]:
            parse_shard(entry)
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


def parse_shard(entry: dict[str, Any]) -> Shard:
    """A shard as the index holds it."""
    return Shard(**entry)


def fill_in(planned: list[Shard], written: list[Shard]) -> list[Shard]:
    """The plan, with sizes and hashes of what was written."""
    found = {shard.first_example: shard for shard in written}
    return [
        dataclasses.replace(shard, bytes=kept.bytes, sha256=kept.sha256)
        for shard in planned
        if (kept := found.get(shard.first_example))
    ]


# -- shards on the disk ------------------------------------------------------------------------------------------------


def is_whole(folder: Path, shard: Shard) -> bool:
    """Whether its file is there in full length."""
    file = folder / shard.file
    return file.is_file() and file.stat().st_size == shard.bytes


def check_shard(folder: Path, shard: Shard, hidden_size: int, verify: bool) -> None:
    """Refuse a shard that is not what was written."""
    file = folder / shard.file
    try:
        size = file.stat().st_size
        if size != shard.bytes:
            raise damaged_shard(folder, shard, f"it has {size:,} bytes, not {shard.bytes:,}")
        with safe_open(file, "pt") as content:
            states = content.get_slice(TENSOR)
            found = states.get_dtype(), states.get_shape()
        if found != ("BF16", [shard.tokens, hidden_size]):
            raise damaged_shard(folder, shard, f"it holds {found[0]} {found[1]}")
        if verify and hash_file(file) != shard.sha256:
            raise damaged_shard(folder, shard, "its content is not what was written")
    except FileNotFoundError:
        raise damaged_shard(folder, shard, "it is missing") from None
    except (SafetensorError, OSError) as error:
        raise damaged_shard(folder, shard, str(error)) from None


def damaged_shard(folder: Path, shard: Shard, why: str) -> CheckpointError:
    """The error for a shard that cannot be used."""
    return CheckpointError(f"{folder / shard.file} is damaged ({why}): remove that file, and it is written again")
