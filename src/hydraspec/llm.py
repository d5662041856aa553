"""The public surface: load a model with its heads, generate, stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hydraspec.base.model import BaseModel
from hydraspec.config import DecodingConfig
from hydraspec.decode.engine import PLAIN, Engine
from hydraspec.errors import CheckpointError, RequestError
from hydraspec.heads.checkpoint import load_heads
from hydraspec.heads.protocol import DraftHeads
from hydraspec.hub import fetch
from hydraspec.shipped import find_shipped, find_shipped_heads
from hydraspec.text import StreamDecoder, TextCodec, check_stop_strings, cut_at_stop
from hydraspec.tree import Tree, find_tree
from hydraspec.types import Output, Request, StepRecord

DEFAULT_NEW_TOKENS = 128


def load(
    model: str,
    heads: str | None = None,
    tree: str | Tree | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    allow_other_base: bool = False,
) -> LLM:
    """Load a base model, and draft heads for it.

    Args:
        model: a folder, a hub id, or the short name of a shipped model (`tiny-assistant`).
        heads: likewise; or the kind of the heads shipped with the model (`hydra++`). None: plain decoding.
        tree: a preset's name, `chain-K`, a JSON file or a `Tree`. None: one that suits the device.
        device: `cpu`, `cuda`, …; None: a GPU where there is one.
        dtype: `float32`, `bfloat16`, …; None: float32 on a CPU, the checkpoint's own on a GPU.
        allow_other_base: accept heads that were trained on another model of the same shape.

    Raises:
        CheckpointError, UnsupportedModel, TreeError: see `BaseModel.load`, `load_heads` and `find_tree`.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen_tree = find_tree(tree) if tree is not None else None
    path = fetch(find_shipped(model), "model")
    base = BaseModel.load(path, device, _parse_dtype(dtype))
    codec = TextCodec.load(path)
    draft_heads = load_heads(find_shipped_heads(heads, path), base, allow_other_base) if heads is not None else None
    return LLM(base, codec, draft_heads, chosen_tree)


class LLM:
    """A base model with its tokenizer, and heads that draft for it.

    Attributes:
        base: the frozen base model.
        codec: text to tokens and back.
        heads: the draft heads, or None: plain decoding.
        tree: the tree that is used unless a call names another.
    """

    def __init__(self, base: BaseModel, codec: TextCodec, heads: DraftHeads | None, tree: Tree | None = None) -> None:
        self.base, self.codec, self.heads = base, codec, heads
        self.tree = tree if tree is not None else pick_tree(base, heads)

    def generate(
        self,
        prompts: str | Sequence[Any],
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] | None = (),
        ignore_eos: bool = False,
        tree: str | Tree | None = None,
        raw: bool = False,
    ) -> list[Output]:
        """Continue prompts together, as one batch.

        Args:
            prompts: one prompt or a list: strings, lists of chat messages, or lists of token ids.
            max_new_tokens: for each; None: 128, or what the model's context leaves.
            stop: strings that end a text; the text is cut before them, `token_ids` after the completing token.
            ignore_eos: go on past the end-of-text token.
            tree: instead of `self.tree`.
            raw: take strings as they are, without the chat template.

        Returns:
            An output for each prompt, in order.

        Raises:
            RequestError: a prompt is empty or does not fit; none has started then.
        """
        prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts  # tensors and arrays of token ids
        batch = [prompts] if _is_one_prompt(prompts) else list(prompts)
        requests = [self.make_request(p, max_new_tokens, stop, ignore_eos, raw) for p in batch]
        outputs = [Output() for _ in requests]
        for _ in self.run(requests, outputs, tree):
            pass
        stops = _as_tuple(stop)
        for output in outputs:
            output.text = cut_at_stop(self.codec.decode(output.token_ids), stops)
        return outputs

    def stream(
        self,
        prompt: str | Sequence[Any],
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] | None = (),
        ignore_eos: bool = False,
        tree: str | Tree | None = None,
        raw: bool = False,
    ) -> Iterator[str]:
        """Continue one prompt, a piece of text at a time; arguments and errors as in `generate`."""
        request = self.make_request(prompt, max_new_tokens, stop, ignore_eos, raw)
        for _, piece in self.stream_steps(request, Output(), stop, tree):
            if piece:
                yield piece

    def stream_steps(
        self, request: Request, output: Output, stop: str | Sequence[str] | None = (), tree: str | Tree | None = None
    ) -> Iterator[tuple[StepRecord, str]]:
        """Decode one request; each step's record and the text that it made certain. Fills `output`."""
        decoder = StreamDecoder(self.codec, _as_tuple(stop))
        for record in self.run([request], [output], tree):
            yield record, decoder.push(record.emitted[0], last=output.finish_reason is not None)

    def run(
        self, requests: Sequence[Request], outputs: Sequence[Output], tree: str | Tree | None = None
    ) -> Iterator[StepRecord]:
        """Decode requests in token ids, step by step; see `Engine.run`."""
        chosen = self.tree if tree is None else find_tree(tree)
        yield from Engine(self.base, self.heads, chosen).run(requests, outputs)

    def make_request(
        self,
        prompt: str | Sequence[Any],
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] | None = (),
        ignore_eos: bool = False,
        raw: bool = False,
    ) -> Request:
        """A prompt in token ids, with its limits; arguments as in `generate`.

        Raises:
            RequestError: the prompt is empty, or longer than the model's context.
        """
        config = DecodingConfig(max_new_tokens, _as_tuple(stop), ignore_eos)
        ids = self.codec.encode(prompt, raw)
        limit = self.base.max_length
        room = limit - len(ids) if limit is not None else DEFAULT_NEW_TOKENS
        if room < 1:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, but the model's context holds {limit}: shorten the prompt"
            )
        return Request(
            prompt=tuple(ids),
            max_new_tokens=config.max_new_tokens or min(room, DEFAULT_NEW_TOKENS),
            eos_token_ids=frozenset() if config.ignore_eos else self.base.eos_token_ids,
            stop_check=check_stop_strings(self.codec, config.stop),
        )


def pick_tree(base: BaseModel, heads: DraftHeads | None) -> Tree:
    """The tree to start from: small on a CPU, where each node costs time, the published one on a GPU."""
    if heads is None:
        return PLAIN
    return find_tree("small-16" if base.device.type == "cpu" else "published-63").cut(heads.num_heads)


def _is_one_prompt(prompts: str | Sequence[Any]) -> bool:
    """Whether this is a string, a list of messages or of token ids, rather than a list of such."""
    return isinstance(prompts, str | dict) or (len(prompts) > 0 and isinstance(prompts[0], dict | int))


def _as_tuple(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if not isinstance(dtype, str):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise CheckpointError(f"no dtype is called {dtype!r}: choose {', '.join(known)}")
    return known[dtype]
