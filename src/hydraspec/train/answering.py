"""Conversations answered anew, side by side in one continuous batch."""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hydraspec.config import RegenerationConfig, SamplingConfig
from hydraspec.decode.batch import Job
from hydraspec.decode.engine import Engine
from hydraspec.errors import DataError, RequestError
from hydraspec.llm import LLM
from hydraspec.train.conversations import Conversation

AHEAD = 4  # conversations at hand for each row of the batch: those that are done wait for the ones before them


@dataclass
class Dialogue:
    """A conversation that is being answered anew."""

    number: int  # in the data, from 0
    source: Conversation
    messages: list[dict[str, str]] = field(default_factory=list)  # so far
    passed: int = 0  # messages of the source that have been taken over or replaced
    text: str | None = None  # a plain text with its continuation
    job: Job | None = None  # the answer that is being decoded
    finish_reason: str | None = None  # of the last answer
    is_done: bool = False

    def to_line(self) -> str | None:
        """What is written of it; None where the base model had nothing to say."""
        if self.finish_reason is None:
            return None
        said: dict[str, Any] = {"text": self.text}
        if self.source.text is None:
            last = max(place for place, message in enumerate(self.messages) if message["role"] == "assistant")
            said = {"messages": self.messages[: last + 1]}
        line = {"id": self.source.id, "number": self.number, **said, "finish_reason": self.finish_reason}
        return json.dumps(line, ensure_ascii=False)


class Answering:
    """Conversations in a running batch, in the order in which they came."""

    def __init__(
        self,
        llm: LLM,
        engine: Engine,
        config: RegenerationConfig,
        sampling: SamplingConfig,
        conversations: Iterator[Conversation],
        first: int,
    ) -> None:
        self._llm, self._engine, self._config, self._sampling = llm, engine, config, sampling
        self._conversations, self._next = conversations, first
        self._open: deque[Dialogue] = deque()
        self._running: list[Dialogue] = []
        self._is_read = False

    @property
    def is_done(self) -> bool:
        """Whether every conversation has been read, answered and taken."""
        return self._is_read and not self._open

    def advance(self) -> tuple[int, int]:
        """One step of the engine, with as many conversations as it has room for.

        Returns:
            The tokens that it emitted, and the number of sequences that it verified.
        """
        self._fill()
        if self._engine.is_idle:
            return 0, 0
        records = self._engine.step()
        for dialogue in list(self._running):
            assert dialogue.job is not None
            if dialogue.job.output.finish_reason is not None:
                self._running.remove(dialogue)
                self._take_answer(dialogue)
                self._ask(dialogue)
        decoded = [record for record in records if record.nodes]  # not the reading of prompts
        tokens = sum(len(emitted) for record in decoded for emitted in record.emitted)
        return tokens, sum(len(record.sequences) for record in decoded)

    def take_finished(self) -> Iterator[Dialogue]:
        """The conversations that are done, and all before them."""
        while self._open and self._open[0].is_done:
            yield self._open.popleft()

    def _fill(self) -> None:
        rows = self._engine.plan.max_batch
        while not self._is_read and len(self._running) < 2 * rows and len(self._open) < AHEAD * rows:
            source = next(self._conversations, None)
            if source is None:
                self._is_read = True
                return
            dialogue = Dialogue(self._next, source)
            self._next += 1
            self._open.append(dialogue)
            self._ask(dialogue)

    def _ask(self, dialogue: Dialogue) -> None:
        """Submit the next prompt of a conversation; where there is none, it is done."""
        prompt = None if dialogue.is_done else self._find_prompt(dialogue)
        room = self._engine.plan.max_length - len(prompt or ())
        if prompt is None or room < 1:
            dialogue.is_done = True
            return
        options = dataclasses.asdict(self._sampling)
        request = self._llm.make_request(prompt, min(self._config.max_new_tokens, room), **options)
        dialogue.job = self._engine.submit(dataclasses.replace(request, sequence=dialogue.number))
        self._running.append(dialogue)

    def _find_prompt(self, dialogue: Dialogue) -> list[int] | None:
        """Token ids up to the next answer; None: nothing is left to be answered."""
        source, codec, said = dialogue.source, self._llm.codec, dialogue.messages
        try:
            if source.text is not None:
                return codec.encode(source.text, raw=True)[: self._config.text_tokens] if not dialogue.text else None
            while dialogue.passed < len(source.messages):
                message = source.messages[dialogue.passed]
                dialogue.passed += 1
                if message["role"] != "assistant":
                    said.append(message)
                elif said and said[-1]["role"] == "user":  # a second answer in a row answers nothing
                    return codec.encode(said)
            return codec.encode(said) if said and said[-1]["role"] == "user" else None
        except RequestError as error:
            raise DataError(f"{source.where}: {error}") from None

    def _take_answer(self, dialogue: Dialogue) -> None:
        assert dialogue.job is not None
        output, codec = dialogue.job.output, self._llm.codec
        answer = codec.decode(output.token_ids)
        # Nothing can be learned from an empty answer, nor be asked after one that was cut.
        dialogue.is_done = not answer.strip() or output.finish_reason == "length"
        if not answer.strip():
            return
        dialogue.finish_reason = output.finish_reason
        if dialogue.source.text is not None:
            dialogue.text = codec.decode([*dialogue.job.request.prompt, *output.token_ids])
        else:
            dialogue.messages.append({"role": "assistant", "content": answer})
