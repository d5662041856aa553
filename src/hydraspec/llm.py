"""The public surface: load a model with its heads, generate, stream."""

from __future__ import annotations

import dataclasses
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

from hydraspec.base.model import BaseModel
from hydraspec.config import DecodingConfig, EngineConfig, SamplingConfig
from hydraspec.decode.engine import PLAIN, Engine
from hydraspec.decode.memory import MemoryPlan
from hydraspec.errors import CheckpointError, RequestError
from hydraspec.heads.checkpoint import load_heads
from hydraspec.heads.protocol import DraftHeads
from hydraspec.hub import fetch
from hydraspec.shipped import find_shipped, find_shipped_heads
from hydraspec.text import StreamDecoder, TextCodec, check_stop_strings, cut_at_stop
from hydraspec.tree import Tree, TreeTable, find_trees
from hydraspec.types import Output, Request, StepRecord

DEFAULT_NEW_TOKENS = 128
# Measured with the shipped model on two cores: from six sequences on, plain decoding fills the processor as well.
CPU_TREES = "1:small-16,5:small-8,6:root"
LEAST_LENGTH = 512  # tokens of a sequence in the caches of a kept engine


def load(
    model: str,
    heads: str | None = None,
    tree: str | Tree | TreeTable | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    allow_other_base: bool = False,
    engine_config: EngineConfig | None = None,
) -> LLM:
    """Load a base model, and draft heads for it.

    Args:
        model: a folder, a hub id, or the short name of a shipped model (`tiny-assistant`).
        heads: likewise; or the kind of the heads shipped with the model (`hydra++`). None: plain decoding.
        tree: a preset's name, `chain-K`, a JSON file, a table such as `4:small-16,16:root`, or such an object. None:
            one that suits the device.
        device: `cpu`, `cuda`, …; None: a GPU where there is one.
        dtype: `float32`, `bfloat16`, …; None: float32 on a CPU, the checkpoint's own on a GPU.
        allow_other_base: accept heads that were trained on another model of the same shape.
        engine_config: limits on batch, length and memory.

    Raises:
        CheckpointError, UnsupportedModel, TreeError: see `BaseModel.load`, `load_heads` and `find_trees`.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = find_trees(tree) if tree is not None else None
    path = fetch(find_shipped(model), "model")
    base = BaseModel.load(path, device, _parse_dtype(dtype))
    codec = TextCodec.load(path)
    draft_heads = load_heads(find_shipped_heads(heads, path), base, allow_other_base) if heads is not None else None
    return LLM(base, codec, draft_heads, chosen, engine_config)


class LLM:
    """A base model with its tokenizer, and heads that draft for it.

    Attributes:
        base: the frozen base model.
        codec: text to tokens and back.
        heads: the draft heads, or None: plain decoding.
        tree: the trees by batch size that are used unless a call names others.
        engine_config: limits on batch, length and memory.
    """

    def __init__(
        self,
        base: BaseModel,
        codec: TextCodec,
        heads: DraftHeads | None,
        tree: Tree | TreeTable | None = None,
        engine_config: EngineConfig | None = None,
    ) -> None:
        self.base, self.codec, self.heads = base, codec, heads
        self.tree = find_trees(tree) if tree is not None else pick_trees(base, heads)
        self.engine_config = engine_config or EngineConfig()
        self._engine: Engine | None = None  # kept for the next call: its caches hold what a prompt may begin with

    def generate(
        self,
        prompts: str | Sequence[Any],
        max_new_tokens: int | None = None,
        *,
        stop: str | Sequence[str] | None = (),
        ignore_eos: bool = False,
        tree: str | Tree | TreeTable | None = None,
        raw: bool = False,
        processors: Sequence[LogitsProcessor] = (),
        **sampling: Any,
    ) -> list[Output]:
        """Continue prompts, as many at once as `engine_config` allows.

        Args:
            prompts: one prompt or a list: strings, lists of chat messages, or lists of token ids.
            max_new_tokens: for each; None: 128, or what the model's context leaves.
            stop: strings that end a text; the text is cut before them, `token_ids` after the completing token.
            ignore_eos: go on past the end-of-text token.
            tree: instead of `self.tree`.
            raw: take strings as they are, without the chat template.
            processors: LogitsProcessors of transformers, called for each token with its own text.
            **sampling: fields of `SamplingConfig`, for instance `temperature=0.7, top_p=0.9, seed=1`. The same seed
                gives the same texts; a prompt that stands in the list several times gets a sample each time.

        Returns:
            An output for each prompt, in order.

        Raises:
            RequestError: a prompt is empty or does not fit, or an option is wrong; none has started then.
        """
        prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts  # tensors and arrays of token ids
        batch = [prompts] if _is_one_prompt(prompts) else list(prompts)
        if sampling.get("seed") is None:
            sampling["seed"] = draw_seed()
        seen: Counter[tuple[int, ...]] = Counter()
        requests = []
        for prompt in batch:
            request = self.make_request(
                prompt, max_new_tokens, stop=stop, ignore_eos=ignore_eos, raw=raw, processors=processors, **sampling
            )
            requests.append(dataclasses.replace(request, sequence=seen[request.prompt]))
            seen[request.prompt] += 1
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
        *,
        stop: str | Sequence[str] | None = (),
        tree: str | Tree | TreeTable | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Continue one prompt, a piece of text at a time; arguments and errors as in `generate`."""
        request = self.make_request(prompt, max_new_tokens, stop=stop, **options)
        for _, piece in self.stream_steps(request, Output(), stop, tree):
            if piece:
                yield piece

    def stream_steps(
        self,
        request: Request,
        output: Output,
        stop: str | Sequence[str] | None = (),
        tree: str | Tree | TreeTable | None = None,
    ) -> Iterator[tuple[StepRecord, str]]:
        """Decode one request; each step's record and the text that it made certain. Fills `output`."""
        decoder = StreamDecoder(self.codec, _as_tuple(stop))
        for record in self.run([request], [output], tree):
            yield record, decoder.push(record.emitted[0], last=output.finish_reason is not None)

    def run(
        self, requests: Sequence[Request], outputs: Sequence[Output], tree: str | Tree | TreeTable | None = None
    ) -> Iterator[StepRecord]:
        """Decode requests in token ids, step by step; see `Engine.run`."""
        if not requests:
            return
        longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
        engine = self._find_engine(self.tree if tree is None else find_trees(tree), len(requests), longest)
        try:
            yield from engine.run(requests, outputs)
        except GeneratorExit:
            raise
        except BaseException:  # Ctrl-C, say, in the middle of a step: what the caches hold is no longer certain
            self._engine = None
            raise

    @property
    def plan(self) -> MemoryPlan | None:
        """What the caches of the last call hold; None before the first."""
        return None if self._engine is None else self._engine.plan

    def new_engine(self, tree: str | Tree | TreeTable | None = None, config: EngineConfig | None = None) -> Engine:
        """An engine of one's own: requests may join and leave between its steps."""
        return Engine(self.base, self.heads, find_trees(tree or self.tree), config or self.engine_config)

    def _find_engine(self, trees: TreeTable, requests: int, longest: int) -> Engine:
        """The engine of the call before, if it is free and large enough, or a new one."""
        batch = min(requests, self.engine_config.max_batch)
        kept = self._engine
        if kept is not None and kept.is_idle and kept.can_hold(trees, batch, longest):
            return kept
        # Rounded up where memory is free, so that a conversation does not ask for larger caches at each turn.
        rounded = longest if self.engine_config.memory else max(LEAST_LENGTH, 1 << (longest - 1).bit_length())
        length = self.engine_config.max_length or rounded
        config = dataclasses.replace(self.engine_config, max_batch=batch, max_length=length)
        if kept is None or kept.is_idle:
            self._engine = None  # its caches go before new ones come
        engine = Engine(self.base, self.heads, trees, config)
        self._engine = self._engine or engine
        return engine

    def make_request(
        self,
        prompt: str | Sequence[Any],
        max_new_tokens: int | None = None,
        *,
        stop: str | Sequence[str] | None = (),
        ignore_eos: bool = False,
        raw: bool = False,
        processors: Sequence[LogitsProcessor] = (),
        **sampling: Any,
    ) -> Request:
        """A prompt in token ids, with its limits and its sampling; arguments as in `generate`.

        Raises:
            RequestError: the prompt is empty or longer than the model's context, or an option is wrong.
        """
        config = DecodingConfig(max_new_tokens, _as_tuple(stop), ignore_eos)
        ids = self.codec.encode(prompt, raw)
        limit = self.base.max_length
        room = limit - len(ids) if limit is not None else DEFAULT_NEW_TOKENS
        if room < 1:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, but the model's context holds {limit}: shorten the prompt"
            )
        defaults = self.base.generation_defaults
        return Request(
            prompt=tuple(ids),
            max_new_tokens=config.max_new_tokens or min(room, DEFAULT_NEW_TOKENS),
            eos_token_ids=frozenset() if config.ignore_eos else self.base.eos_token_ids,
            stop_check=check_stop_strings(self.codec, config.stop),
            sampling=self._make_sampling(sampling),
            processors=(*defaults.make_processors(len(ids), self.base.eos_token_ids), *processors),
        )

    def _make_sampling(self, options: dict[str, Any]) -> SamplingConfig:
        """Sampling as asked for, with a named seed, the model's own repetition penalty, and known tokens."""
        known = [field.name for field in dataclasses.fields(SamplingConfig)]
        for name in options:
            if name not in known:
                raise RequestError(f"no option is called {name!r}: choose from {', '.join(known)}")
        sampling = SamplingConfig(**options)
        if sampling.seed is None:
            sampling = dataclasses.replace(sampling, seed=draw_seed())
        if sampling.repetition_penalty is None:
            penalty = self.base.generation_defaults.repetition_penalty
            sampling = dataclasses.replace(sampling, repetition_penalty=penalty)
        for token in (*sampling.allowed_tokens, *(token for token, _ in sampling.logit_bias)):
            if not 0 <= token < self.base.vocab_size:
                raise RequestError(f"token {token} of logit_bias or allowed_tokens is not in the vocabulary")
        return sampling


def draw_seed() -> int:
    """A random seed, for requests that name none."""
    return secrets.randbits(63)


def pick_trees(base: BaseModel, heads: DraftHeads | None) -> TreeTable:
    """The trees to start from: small on a CPU, where each node costs time, the published one on a GPU."""
    if heads is None:
        return find_trees(PLAIN)
    return find_trees(CPU_TREES if base.device.type == "cpu" else "published-63").cut(heads.num_heads)


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
