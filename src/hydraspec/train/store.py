"""Tokenised conversations on disk, so that memory does not grow with the data."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hydraspec.errors import DataError, HydraspecError
from hydraspec.files import hash_file, is_disk_full, write_json
from hydraspec.text import TextCodec
from hydraspec.train.batch import Example
from hydraspec.train.conversations import read_conversations
from hydraspec.train.encoding import check_tokens, encode_all

logger = logging.getLogger(__name__)

FORMAT = 1
KINDS = {"tokens": np.dtype(np.uint32), "mask": np.dtype(np.bool_), "ends": np.dtype(np.int64)}  # files NAME.bin
CHUNK = 1 << 22  # bytes that are read at once to check a file
TOLD = 256  # conversations between two words to whoever watches


class TokenStore:
    """Conversations by number, in token ids; each is read from the disk when it is asked for.

    In memory are 16 bytes a conversation and 8 an entry of the vocabulary, whatever the conversations' length.

    Attributes:
        folder: with `tokens.bin` (uint32), `mask.bin` (bool), `ends.bin` (int64, where each conversation ends in
            both), `counts.bin` (int64) and `facts.json`.
        lengths: `[conversations]` int64.
        token_counts: `[V]` int64, how often the assistant writes each token.
        digest: a hash of tokens, masks and lengths.
        num_tokens, num_assistant_tokens: in all.

    Raises:
        DataError: the folder is not there, or was torn or changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, BinaryIO] = {}
        try:
            facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
            if facts["format"] != FORMAT:
                raise ValueError(f"its format is {facts['format']}, not {FORMAT}")
            self.num_tokens, self.num_assistant_tokens = int(facts["tokens"]), int(facts["assistant_tokens"])
            self._ends = np.fromfile(folder / "ends.bin", KINDS["ends"])
            self.token_counts = np.fromfile(folder / "counts.bin", np.int64)
            self.digest: str = facts["digest"]
            if self.digest != _join_hashes({name: hash_file(folder / f"{name}.bin") for name in KINDS}):
                raise ValueError("its files are not those that were written")
            if facts["counts"] != hash_file(folder / "counts.bin"):
                raise ValueError("counts.bin is not what was written")
            for name in ("tokens", "mask"):
                self._files[name] = (folder / f"{name}.bin").open("rb", buffering=0)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"the tokenised data in {folder} is damaged ({error}): remove that folder") from None
        self.lengths = np.diff(self._ends, prepend=0)

    @classmethod
    def build(cls, folder: Path, examples: Iterable[Example], vocab_size: int) -> TokenStore:
        """Write examples to `folder`, which is there once it is whole; what was there before is replaced.

        Raises:
            DataError: an example holds a token that is not below `vocab_size`.
            HydraspecError: the disk is full.
        """
        with write_folder(folder) as part, StoreWriter(part, vocab_size) as writer:
            for example in examples:
                writer.add(example)
        return cls(folder)

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids `[T]` uint32 and mask `[T]` bool of one conversation."""
        count = int(self.lengths[number])
        start = int(self._ends[number]) - count
        return self._read("tokens", start, count), self._read("mask", start, count)

    def _read(self, name: str, start: int, count: int) -> np.ndarray:
        # A memory map would count as this process's memory, and a file that became shorter would kill it.
        kind = KINDS[name]
        data = os.pread(self._files[name].fileno(), count * kind.itemsize, start * kind.itemsize)
        if len(data) != count * kind.itemsize:
            raise DataError(f"the tokenised data in {self.folder} became shorter while it was read: remove that folder")
        return np.frombuffer(data, kind)

    def __getitem__(self, number: int) -> Example:
        if not 0 <= number < len(self):
            raise IndexError(number)
        ids, mask = self.read(number)
        return Example(ids.tolist(), mask.tolist())


class StoreWriter:
    """Writes the files of a `TokenStore` into a folder, example by example; they are whole when the block ends."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder = folder
        self._counts = np.zeros(vocab_size, np.int64)
        self._hashes = {name: hashlib.sha256() for name in KINDS}
        self._tokens = self._conversations = 0

    def __enter__(self) -> StoreWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._files = {name: (self._folder / f"{name}.bin").open("wb") for name in KINDS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in self._files.values():
            file.close()
        if kind is None:
            self._counts.tofile(self._folder / "counts.bin")
            write_json(self._folder / "facts.json", self._describe())

    def add(self, example: Example) -> None:
        """Append one example."""
        check_tokens(example.ids, len(self._counts))
        ids, mask = np.array(example.ids, KINDS["tokens"]), np.array(example.mask, KINDS["mask"])
        self._tokens += len(ids)
        self._conversations += 1
        np.add.at(self._counts, ids[mask], 1)
        for name, array in (("tokens", ids), ("mask", mask), ("ends", np.array([self._tokens], KINDS["ends"]))):
            data = array.tobytes()
            self._hashes[name].update(data)
            self._files[name].write(data)

    def _describe(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "digest": _join_hashes({name: value.hexdigest() for name, value in self._hashes.items()}),
            "conversations": self._conversations,
            "tokens": self._tokens,
            "assistant_tokens": int(self._counts.sum()),
            "counts": hashlib.sha256(self._counts.tobytes()).hexdigest(),
        }


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes its place when the block ends well, and is removed if not.

    Raises:
        HydraspecError: the disk is full.
    """
    part = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    try:
        part.mkdir(parents=True)
        yield part
        for file in part.rglob("*.bin"):
            with file.open("rb") as written:
                os.fsync(written.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    except OSError as error:
        if is_disk_full(error):
            raise HydraspecError(f"no space is left on the disk for {folder}: free some and run this again") from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def is_held_out(name: str, share: float) -> bool:
    """Whether the conversation of this id is kept out of training: by its id alone, whatever else is in the data."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") < share * 2**64


def prepare_stores(
    data: str,
    eval_data: str | None,
    codec: TextCodec,
    folder: Path,
    max_length: int,
    held_out: float,
    vocab_size: int,
    watch: Callable[[int], None] = lambda _: None,
) -> tuple[TokenStore, TokenStore]:
    """The conversations to train on and those to measure on, tokenised; what `folder` holds of them already is used.

    Args:
        data: see `read_conversations`.
        eval_data: the same; None: a share of `data` is held out, by id.
        codec: the base model's tokenizer.
        folder: for the stores.
        max_length: conversations are cut to this many tokens.
        held_out: that share.
        vocab_size: of the base model.
        watch: told the number of conversations read so far.

    Raises:
        DataError: the data cannot be read or tokenised.
        HydraspecError: the disk is full.
    """
    source = _describe_source(data, eval_data, codec, [max_length, held_out, vocab_size])
    if _read_json(folder / "source.json") == source:
        try:
            return TokenStore(folder / "train"), TokenStore(folder / "held_out")
        except DataError as error:
            logger.warning("%s; it is made anew", error)
    with (
        write_folder(folder) as part,
        StoreWriter(part / "train", vocab_size) as train,
        StoreWriter(part / "held_out", vocab_size) as apart,
    ):
        read = left_out = 0
        for place, share in ((data, 0.0 if eval_data else held_out), (eval_data, 1.0)):
            for name, examples in encode_all(codec, read_conversations(place), max_length) if place else ():
                for example in examples:
                    (apart if is_held_out(name, share) else train).add(example)
                read, left_out = read + 1, left_out + (not examples)
                if read % TOLD == 0:
                    watch(read)
        watch(read)
        write_json(part / "source.json", source)
    if left_out:
        logger.info(
            "%d of %d conversations are left out: in their first %d tokens is no answer to learn from",
            left_out,
            read,
            max_length,
        )
    return TokenStore(folder / "train"), TokenStore(folder / "held_out")


def _describe_source(data: str, eval_data: str | None, codec: TextCodec, numbers: list[float]) -> dict[str, Any]:
    """What the stores are made from, to tell whether they can be used again."""

    def describe(place: str | None) -> Any:
        file = Path(place) if place else None
        if file is None or not file.exists():
            return place
        files = sorted(path for path in file.rglob("*") if path.is_file()) if file.is_dir() else [file]
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]

    tokenizer = codec.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    known = hashlib.sha256(f"{rules}\n{tokenizer.chat_template}".encode("utf-8", "surrogatepass")).hexdigest()
    return {"data": describe(data), "eval": describe(eval_data), "tokenizer": known, "numbers": numbers}


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _join_hashes(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256(" ".join(hashes[name] for name in KINDS).encode()).hexdigest()[:32]
