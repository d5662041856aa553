"""Text to tokens and back: chat templates, streaming detokenisation, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hydraspec.errors import CheckpointError, RequestError
from hydraspec.hub import fetch
from hydraspec.types import StopCheck


class TextCodec:
    """A tokenizer with its chat template.

    Attributes:
        tokenizer: the transformers tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, name: str) -> TextCodec:
        """Load the tokenizer of a model folder or hub id.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        folder = fetch(name, "model")
        try:
            return cls(AutoTokenizer.from_pretrained(folder))
        except Exception as error:  # transformers raises many kinds for one reason
            missing = not any(Path(folder).glob("tokenizer*"))
            why = "it holds no tokenizer files" if missing else str(error).splitlines()[0]
            raise CheckpointError(f"the tokenizer of {name} cannot be read: {why}") from error

    @property
    def is_chat(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.tokenizer.chat_template is not None

    def encode(self, prompt: str | Sequence[Any], raw: bool = False) -> list[int]:
        """Token ids of a prompt.

        Args:
            prompt: a string (one user message, where there is a chat template), messages, or token ids.
            raw: take a string as it is, without the chat template.

        Raises:
            RequestError: the prompt is empty.
        """
        if isinstance(prompt, str):
            if not prompt.strip():
                raise RequestError("the prompt is empty: write at least one word")
            if raw or not self.is_chat:
                ids = list(self.tokenizer(prompt)["input_ids"])
            else:
                return self.encode([{"role": "user", "content": prompt}])
        elif prompt and isinstance(prompt[0], dict):
            if not self.is_chat:
                raise RequestError("this model has no chat template: give the prompt as one string")
            text = self.render(cast("Sequence[dict[str, str]]", prompt), answer_follows=True)
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        else:
            ids = [int(token) for token in prompt]
            if ids and not 0 <= min(ids) <= max(ids) < len(self.tokenizer):
                raise RequestError(f"the prompt holds token ids outside 0 … {len(self.tokenizer) - 1}")
        if not ids:
            raise RequestError("the prompt is empty: it has no tokens")
        return ids

    def render(self, messages: Sequence[dict[str, str]], answer_follows: bool = False) -> str:
        """Messages as the chat template writes them."""
        return str(
            self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer_follows)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


class StreamDecoder:
    """Turns tokens into text piece by piece, holding back what later tokens may still change."""

    def __init__(self, codec: TextCodec, stop: Sequence[str] = ()) -> None:
        self._codec, self._stop = codec, tuple(stop)
        self._ids: list[int] = []
        self._start = 0  # tokens before it are done with
        self._sent = ""  # text given out of the tokens from `_start` on

    def push(self, tokens: Sequence[int], last: bool = False) -> str:
        """The text that `tokens` make certain; with `last`, all that is left."""
        self._ids.extend(tokens)
        text = self._codec.decode(self._ids[self._start :])
        ready = len(text) if last else self._certain(text)
        if last:
            ready = min([ready, *(text.find(stop) for stop in self._stop if stop in text)])
        piece = text[len(self._sent) : ready]
        self._sent += piece
        # Decode anew only from the last line on: tokenizers look back across words, not across lines.
        if self._sent == text and text.endswith("\n"):
            self._start, self._sent = len(self._ids), ""
        return piece

    def _certain(self, text: str) -> int:
        """How much of `text` no later token can change: no half of a character, and no beginning of a stop string."""
        end = len(text)
        while end and text[end - 1] == "�":
            end -= 1
        for stop in self._stop:
            found = text.find(stop)
            if found >= 0:
                end = min(end, found)
            for size in range(min(len(stop) - 1, end), 0, -1):
                if text.endswith(stop[:size], 0, end):
                    end -= size
                    break
        return max(end, len(self._sent))


def check_stop_strings(codec: TextCodec, stop: Sequence[str]) -> StopCheck | None:
    """A check that finds the first token at which the text holds one of the strings `stop`."""
    if not stop:
        return None
    longest = max(len(text.encode()) for text in stop)

    def find(tokens: Sequence[int], new: int) -> int | None:
        # A token holds at least one byte, or none that could complete a stop string.
        window = tokens[-(longest + new + 8) :]
        offset = len(tokens) - len(window)
        if not any(text in codec.decode(window) for text in stop):
            return None
        for count in range(max(len(window) - new, 0) + 1, len(window) + 1):
            if any(text in codec.decode(window[:count]) for text in stop):
                return offset + count
        return None

    return find


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the strings `stop`."""
    return text[: min([len(text), *(text.find(s) for s in stop if s in text)])]
