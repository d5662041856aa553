"""Text to tokens and back: chat templates, streaming detokenisation, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

    def encode(self, prompt: Any, raw: bool = False) -> list[int]:
        """Token ids of a prompt.

        Args:
            prompt: a string (one user message, where there is a chat template), messages, or token ids.
            raw: take a string as it is, without the chat template.

        Raises:
            RequestError: the prompt is empty.
        """
        if hasattr(prompt, "tolist"):  # a tensor or an array of token ids
            prompt = prompt.tolist()
        if isinstance(prompt, str):
            ids = self._encode_string(prompt, raw)
        elif isinstance(prompt, Sequence) and all(isinstance(token, int) for token in prompt):
            ids = list(prompt)
            if ids and not 0 <= min(ids) <= max(ids) < len(self.tokenizer):
                raise RequestError(f"the prompt holds token ids outside 0 … {len(self.tokenizer) - 1}")
        elif isinstance(prompt, Sequence) and all(isinstance(m, dict) and "content" in m for m in prompt):
            if not self.is_chat:
                raise RequestError("this model has no chat template: give the prompt as one string")
            text = self.render(prompt, answer_follows=True)
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        else:
            raise RequestError('a prompt is a string, a list of {"role", "content"} messages, or a list of token ids')
        if not ids:
            raise RequestError("the prompt is empty: it has no tokens")
        return ids

    def _encode_string(self, prompt: str, raw: bool) -> list[int]:
        if not prompt.strip():
            raise RequestError("the prompt is empty: write at least one word")
        if raw or not self.is_chat:
            return list(self.tokenizer(prompt)["input_ids"])
        return self.encode([{"role": "user", "content": prompt}])

    def render(self, messages: Sequence[dict[str, str]], answer_follows: bool = False) -> str:
        """Messages as the chat template writes them.

        Raises:
            RequestError: the template refuses them.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer_follows)
            )
        except Exception as error:  # templates raise what they like
            why = " ".join(str(error).split())
            raise RequestError(f"the chat template refuses these messages: {why}") from error

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of token ids, without special tokens unless they are asked for."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))


class StreamDecoder:
    """Turns tokens into text piece by piece, holding back what later tokens may still change.

    New tokens are decoded together with those of the piece before, because tokenizers look back (at a leading space,
    say), and the text that is new is the difference.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str] = ()) -> None:
        self._codec, self._stop = codec, tuple(stop)
        self._ids: list[int] = []
        self._context, self._read = 0, 0  # tokens decoded again as context, and tokens whose text is known
        self._held = ""  # known text that may be the beginning of a stop string
        self._stopped = False

    def push(self, tokens: Sequence[int], last: bool = False) -> str:
        """The text that `tokens` make certain; with `last`, all that is left."""
        self._ids.extend(tokens)
        before = self._codec.decode(self._ids[self._context : self._read])
        now = self._codec.decode(self._ids[self._context :])
        if last or not now.endswith("\ufffd"):  # else half of a character has come
            self._held += now[len(before) :]
            self._context, self._read = self._read, len(self._ids)
        return self._release(last)

    def _release(self, last: bool) -> str:
        if self._stopped:
            return ""
        end = min([len(self._held), *(self._held.find(stop) for stop in self._stop if stop in self._held)])
        self._stopped = end < len(self._held)
        if not self._stopped and not last:
            end -= max((_overlap(self._held, stop) for stop in self._stop), default=0)
        piece, self._held = self._held[:end], self._held[end:]
        return piece


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next((size for size in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def check_stop_strings(codec: TextCodec, stop: Sequence[str]) -> StopCheck | None:
    """A check that finds the first token at which the text, special tokens included, holds one of `stop`."""
    if not stop:
        return None
    longest = max(len(text.encode()) for text in stop)

    def holds(tokens: Sequence[int]) -> bool:
        written = codec.decode(tokens, special=True)
        return any(text in written for text in stop)

    def find(tokens: Sequence[int], new: int) -> int | None:
        start = max(0, len(tokens) - new - longest)  # a token writes at least one byte
        if not holds(tokens[start:]):
            return None
        return next(end for end in range(len(tokens) - new + 1, len(tokens) + 1) if holds(tokens[start:end]))

    return find


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the strings `stop`."""
    return text[: min([len(text), *(text.find(s) for s in stop if s in text)])]
