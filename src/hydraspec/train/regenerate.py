"""Self-distillation: the base model answers a data set's prompts itself, for heads to learn what it will say.

Conversations are decoded side by side in one continuous batch and written in the order in which they came. Each answer
is the base model's own decoding of its prompt, whatever is decoded beside it: what was stopped goes on byte for byte.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hydraspec.config import RegenerationConfig, SamplingConfig
from hydraspec.errors import DataError, HydraspecError
from hydraspec.files import hash_file, is_disk_full, write_json, write_whole
from hydraspec.llm import LLM
from hydraspec.train.answering import Answering
from hydraspec.train.conversations import Conversation, read_conversations

FORMAT = 1


@dataclass(frozen=True)
class Regenerated:
    """How far the work has come."""

    conversations: int  # read and either written or left out
    written: int
    tokens: int  # decoded now
    steps: int  # verification steps of single sequences, now
    is_complete: bool

    @property
    def acceptance_length(self) -> float:
        """Tokens of a sequence for each forward pass of the base model."""
        return self.tokens / max(1, self.steps)


def regenerate(
    llm: LLM,
    data: str | Path,
    out: Path,
    config: RegenerationConfig,
    sampling: SamplingConfig,
    watch: Callable[[Regenerated], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Regenerated:
    """Write a data set's conversations anew, with the base model's answers in place of those given.

    Every answer, and a last message that has none, is answered from what the base model itself said before. A
    conversation ends where an answer is empty or cut, or where the context is full. Of a plain text the beginning is
    kept and continued. Neither the data nor the result is ever in memory as a whole.

    While it runs `OUT.part` grows, line by line; the same call goes on after its last whole line.

    Args:
        llm: the base model, with heads or without: they change the speed alone.
        data: what `read_conversations` reads.
        out: JSON lines of `messages` or `text`, gzipped if the name ends with .gz. What it was made of is written to
            `out` with `.json` behind its name.
        config: lengths and limits.
        sampling: of the answers; samples differ between conversations, also where their prompts are the same.
        watch: told after each step.
        stopped: asked before each step; if so, the part written so far stays.

    Raises:
        DataError: the data cannot be read, or the model has no chat template for them.
        HydraspecError: `out` is there already, or holds what was begun with other data or options; the disk is full.
    """
    if sampling.acceptance != "exact":
        raise HydraspecError("only exact acceptance writes what the base model itself says: leave --acceptance out")
    sampling = dataclasses.replace(sampling, seed=sampling.seed or 0)  # one that can be named again
    part, notes = out.with_name(out.name + ".part"), out.with_name(out.name + ".json")
    facts = describe(llm, data, config, sampling)
    number, written = resume(out, part, notes, facts)
    limit = min(config.max_length, llm.base.max_length or config.max_length)
    engine = llm.new_engine(config=dataclasses.replace(llm.engine_config, max_length=limit))
    answering = Answering(llm, engine, config, sampling, _read_from(data, number, config.limit), number)
    progress = Regenerated(number, written, 0, 0, False)
    try:
        with part.open("a", encoding="utf-8") as file:
            while not answering.is_done and not stopped():
                tokens, steps = answering.advance()
                for dialogue in answering.take_finished():
                    line = dialogue.to_line()
                    number, written = dialogue.number + 1, written + (line is not None)
                    if line is not None:
                        file.write(line + "\n")
                file.flush()
                tokens, steps = progress.tokens + tokens, progress.steps + steps
                progress = Regenerated(number, written, tokens, steps, answering.is_done)
                watch(progress)
            os.fsync(file.fileno())
    except OSError as error:
        if is_disk_full(error):
            raise HydraspecError(f"no space is left on the disk for {part}: free some and run this again") from error
        raise
    if not answering.is_done:
        return progress
    if not written:
        part.unlink()
        notes.unlink()
        raise DataError(f"{data} holds no conversation that {llm.base.name} has an answer to")
    publish(part, out)
    write_json(notes, {**facts, "conversations": number, "written": written})
    return dataclasses.replace(progress, is_complete=True)


def _read_from(data: str | Path, number: int, limit: int) -> Iterator[Conversation]:
    return islice(read_conversations(data, limit or None), number, None)


# -- files -------------------------------------------------------------------------------------------------------------


def describe(llm: LLM, data: str | Path, config: RegenerationConfig, sampling: SamplingConfig) -> dict[str, Any]:
    """What decides about every byte that is written."""
    file = Path(data)
    facts = {
        "format": FORMAT,
        "base": Path(llm.base.name).name,
        "base_fingerprint": llm.base.fingerprint(),
        "dtype": str(llm.base.dtype).removeprefix("torch."),
        "data": hash_file(file) if file.is_file() else str(data),
        "config": dataclasses.asdict(config),
        "sampling": dataclasses.asdict(sampling),
    }
    return dict(json.loads(json.dumps(facts)))  # as it will be read again: lists for tuples


def resume(out: Path, part: Path, notes: Path, facts: dict[str, Any]) -> tuple[int, int]:
    """How many conversations are done, and how many of them are written in `part`, cut after its last whole line.

    Raises:
        HydraspecError: `out` is there, or `part` was begun in another way.
    """
    if out.exists():
        raise HydraspecError(f"{out} is there already: name another file, or remove it")
    if not part.exists():
        try:
            write_json(notes, facts)
        except OSError as error:
            raise HydraspecError(f"{out} cannot be written: {error.strerror}; name another file") from None
        return 0, 0
    try:
        before = json.loads(notes.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise HydraspecError(f"{notes} is missing or damaged: remove {part} and begin again") from None
    for key in facts:
        if before.get(key) != facts[key]:
            raise HydraspecError(
                f"{part} was begun with another {key}: run the command that began it, or remove {part} to begin again"
            )
    done, written, end = 0, 0, 0
    with part.open("rb") as lines:
        for line in lines:
            try:
                number = int(json.loads(line)["number"])
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            done, written, end = number + 1, written + 1, end + len(line)
    os.truncate(part, end)
    return done, written


def publish(part: Path, out: Path) -> None:
    """Give the finished part its name, gzipped where the name says so."""
    if out.suffix != ".gz":
        os.replace(part, out)
        return

    def compress(file: Path) -> None:
        # Without a time and a name in its header: the same lines make the same file.
        with part.open("rb") as lines, file.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed:
            shutil.copyfileobj(lines, packed, 1 << 20)

    write_whole(out, compress)
    part.unlink()
