"""Conversations and plain texts to learn from, read one by one from files or data sets."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any, TextIO

from hydraspec.errors import DataError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
DATASETS = "datasets:"  # before the id of a data set
CHUNK = 1 << 20  # characters of a JSON list that are read at once, at least


@dataclass(frozen=True)
class Conversation:
    """Messages, or a plain text in their place.

    Attributes:
        id: its own in the data, else a hash of its content.
        messages: `role` (user, assistant, system) and `content` of each; empty: a plain text, or nothing is left.
        text: the plain text, or None.
        where: the place that it came from, for messages to the user.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    text: str | None
    where: str

    def __post_init__(self) -> None:
        assert self.text is None or not self.messages


def read_conversations(source: str | Path, limit: int | None = None) -> Iterator[Conversation]:
    """The conversations of a file or a data set, one at a time: none is kept in memory.

    What a file holds is told by its content. All of these may be gzipped (`.gz`):

    - JSON lines, or one JSON list, of objects with `conversations` (ShareGPT: `from`, `value`), with `messages`
      (OpenAI: `role`, `content`) or with `text`, a plain text;
    - `.txt`: plain text, in which empty lines separate one document from the next.

    `datasets:ORG/NAME`, `datasets:ORG/NAME:SPLIT` and `datasets:ORG/NAME:CONFIG:SPLIT` stream a data set of the
    `datasets` library, whose rows are such objects; a folder is one on the disk. Without a split it is `train`.

    Answers that a conversation begins with are left out, for there is nothing that they answer; no message may be left.

    Args:
        source: the file, folder or data set.
        limit: conversations at most; None: all.

    Raises:
        DataError: the source cannot be read, or a place in it (named by its line) is no such conversation.
    """
    return islice(_read_all(str(source)), limit)


def count_conversations(source: str | Path, limit: int = 0) -> int | None:
    """How many there are, or `limit` if there are more; None: a data set, which would have to be fetched to be counted.

    Raises:
        DataError: see `read_conversations`.
    """
    if str(source).startswith(DATASETS) or Path(source).is_dir():
        return limit or None
    return sum(1 for _ in read_conversations(source, limit or None))


def _read_all(source: str) -> Iterator[Conversation]:
    file = Path(source)
    if source.startswith(DATASETS) or file.is_dir():
        for number, content in enumerate(_stream_dataset(source.removeprefix(DATASETS)), start=1):
            yield _parse(content, f"{source}, row {number}")
    elif file.name.removesuffix(".gz").endswith(".txt"):
        for number, text in _read_documents(file):
            yield Conversation(_hash(text), (), text, f"{file}, line {number}")
    elif _holds_list(file):
        for number, content in _read_list(file):
            yield _parse(content, f"{file}, entry {number}")
    else:
        for number, content in read_objects(file):
            yield _parse(content, f"{file}, line {number}")


# -- from files to objects ---------------------------------------------------------------------------------------------


def read_objects(file: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and values of a JSON-lines file, plain or gzipped.

    Raises:
        DataError: the file cannot be read, or a line (named by its number) is not JSON.
    """
    for number, line in _read_lines(file):
        if line.strip():
            try:
                content = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{file}, line {number} is not JSON ({error}); mend or remove it") from None
            yield number, content


def _read_lines(file: Path) -> Iterator[tuple[int, str]]:
    number = 0
    with _open(file) as (lines, place):
        for number, line in enumerate(lines, start=1):
            place[0] = f"line {number}"
            yield number, line


@contextmanager
def _open(file: Path) -> Iterator[tuple[TextIO, list[str]]]:
    """The file's text, and a list whose one entry tells how far it was read, for the message if that fails."""
    place = ["line 0"]
    opener: Any = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig") as text:
            yield text, place
    except FileNotFoundError:
        raise DataError(f"data file {file} does not exist") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{file} cannot be read after {place[0]}: {error}") from None


def _holds_list(file: Path) -> bool:
    """Whether the file is one JSON list, as its first character tells."""
    with _open(file) as (text, _):
        while character := text.read(1):
            if not character.isspace():
                return character == "["
    return False


def _read_list(file: Path) -> Iterator[tuple[int, Any]]:
    """Numbers, from 1, and values of a JSON list; only a piece of the file is in memory at a time."""
    decoder, rest, number, line, ended = json.JSONDecoder(), "", 0, 1, False
    with _open(file) as (text, place):
        while not ended:
            # Twice as much after a piece that holds no whole entry, so that long ones are not parsed time and again.
            piece = text.read(max(CHUNK, len(rest)))
            ended, rest, at = not piece, rest + piece, 0
            while True:
                at = _skip(rest, at, " \t\r\n[" if number == 0 else " \t\r\n,")
                if at == len(rest) or rest[at] == "]":
                    break
                try:
                    value, end = decoder.raw_decode(rest, at)
                except (json.JSONDecodeError, RecursionError) as error:
                    if not ended:
                        break  # the entry may go on in the next piece
                    broken = line + rest.count("\n", 0, getattr(error, "pos", at))
                    why = getattr(error, "msg", "too deeply nested")
                    raise DataError(
                        f"{file}, line {broken} (entry {number + 1}) is not JSON ({why}); mend or remove it"
                    ) from None
                if end == len(rest) and not ended:
                    break  # a number may go on in the next piece
                at, number = end, number + 1
                place[0] = f"entry {number}"
                yield number, value
            if rest[at : at + 1] == "]":
                return
            line += rest.count("\n", 0, at)
            rest = rest[at:]
    raise DataError(f"{file} ends after entry {number} without a closing bracket: it is cut short; copy it again")


def _skip(text: str, at: int, characters: str) -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    return at


def _read_documents(file: Path) -> Iterator[tuple[int, str]]:
    """The number of its first line, and the text, of each document of a plain text."""
    first = 0
    lines: list[str] = []
    for number, line in _read_lines(file):
        if line.strip():
            first = first if lines else number
            lines.append(line)
        elif lines:
            yield first, "".join(lines).rstrip()
            lines = []
    if lines:
        yield first, "".join(lines).rstrip()


def _stream_dataset(name: str) -> Iterator[Any]:
    """The rows of a data set, `NAME[[:CONFIG]:SPLIT]`, through the `datasets` library."""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            f"reading the data set {name} needs the datasets library: pip install hydraspec[train]"
        ) from None
    path, *rest = [name] if Path(name).is_dir() else name.split(":")
    if not path or len(rest) > 2:
        raise DataError(
            f"{DATASETS}{name} names no data set: write {DATASETS}ORG/NAME, :SPLIT or :CONFIG:SPLIT after it"
        )
    config, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else "train")
    number = 0
    try:
        for number, row in enumerate(datasets.load_dataset(path, config, split=split, streaming=True), start=1):  # noqa: B007
            yield row
    except DataError:
        raise
    except Exception as error:  # of the network, of the hub, of any file format
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"the data set {name}, split {split}, cannot be read after row {number}: {why}") from error


# -- from objects to conversations -------------------------------------------------------------------------------------


def _parse(content: Any, where: str) -> Conversation:
    if not isinstance(content, dict):
        raise DataError(f"{where} has no list of turns: {_show(content)} is no object; mend or remove it")
    own = content.get("id")
    name = str(own) if isinstance(own, (str, int)) and own != "" else _hash(content)
    for key, role, value in (("conversations", "from", "value"), ("messages", "role", "content")):
        if content.get(key) is not None:
            turns = content[key]
            if not isinstance(turns, list) or not turns:
                raise DataError(f'{where} has no list of turns under "{key}"; mend or remove it')
            messages = [_parse_turn(turn, role, value, where) for turn in turns]
            # A conversation that was cut out of a longer one may begin with an answer to nothing.
            begun = dropwhile(lambda message: message["role"] == "assistant", messages)
            return Conversation(name, tuple(begun), None, where)
    if content.get("text") is not None:
        text = content["text"]
        if not isinstance(text, str) or not text.strip():
            raise DataError(f'{where} has no words under "text"; remove it')
        return Conversation(name, (), text, where)
    keys = ", ".join(map(str, content)) or "nothing"
    raise DataError(f'{where} needs "conversations", "messages" or "text", and has {keys:.80}; mend or remove it')


def _parse_turn(turn: Any, role: str, value: str, where: str) -> dict[str, str]:
    form = f'a turn needs "{role}" (user, assistant or system; human and gpt are names for them) and "{value}" (a text)'
    if not isinstance(turn, dict) or not isinstance(turn.get(role), str):
        raise DataError(f"{where}: {form}, not {_show(turn)}")
    if turn[role] not in ROLES:
        raise DataError(
            f'{where}: turns of the role "{turn[role]:.30}" cannot be learned from, only those of user (human), '
            "assistant (gpt) and system; mend or remove it"
        )
    if not isinstance(turn.get(value), str):
        raise DataError(f"{where}: {form}, not {_show(turn)}")
    if not turn[value].strip():
        raise DataError(f"{where}: a turn of {turn[role]} is empty; mend or remove it")
    return {"role": ROLES[turn[role]], "content": turn[value]}


def _show(value: Any) -> str:
    return f"{value!r:.80}"


def _hash(content: Any) -> str:
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]
