"""What our loop is compared with: itself without heads, and the ways of transformers to decode the same model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hydraspec.base.model import BaseModel
from hydraspec.decode.engine import PLAIN
from hydraspec.errors import CheckpointError, RequestError
from hydraspec.evaluate.bench import Batch, Method, Run, decode_with
from hydraspec.hub import fetch
from hydraspec.llm import LLM
from hydraspec.shipped import find_shipped
from hydraspec.text import TextCodec

# What each peer is called in tables.
PEERS = {
    "plain": "plain (our loop)",
    "hf": "transformers",
    "assisted": "assisted generation",
    "lookup": "prompt lookup",
}
LOOKUP_TOKENS = 10  # that prompt lookup proposes, as its paper's examples do


def check_peers(names: Sequence[str], assistant: str | None) -> None:
    """Refuse what `make_peers` cannot make, before a model is loaded.

    Raises:
        RequestError: there is no such peer, or assisted generation is asked for without an assistant.
    """
    for name in names:
        if name not in PEERS:
            raise RequestError(f"no peer is called {name!r}: choose {', '.join(PEERS)}")
    if "assisted" in names and assistant is None:
        raise RequestError("the peer assisted needs a small model that drafts: name one with --assistant")


def make_peers(
    llm: LLM, names: Sequence[str], max_new_tokens: int, largest_batch: int = 1, assistant: str | None = None
) -> list[Method]:
    """The methods called `names`, our plain loop first whether it is among them or not.

    Args:
        llm: whose base model they decode.
        names: keys of `PEERS`.
        max_new_tokens: for each prompt.
        largest_batch: what the methods will be asked for.
        assistant: the small model of assisted generation: a folder, a hub id, or a shipped model.

    Raises:
        RequestError: see `check_peers`; or the assistant has another vocabulary.
        CheckpointError: the assistant cannot be loaded.
    """
    check_peers(names, assistant)
    plain = LLM(llm.base, llm.codec, None, PLAIN, llm.engine_config)
    peers = [Method(PEERS["plain"], decode_with(plain, max_new_tokens, largest_batch))]
    if not set(names) - {"plain"}:
        return peers
    model, eos = _load_untouched(llm.base), llm.base.eos_token_ids
    if "hf" in names:
        peers.append(Method(PEERS["hf"], decode_with_transformers(model, max_new_tokens, eos)))
    if "assisted" in names and assistant is not None:
        helper = _load_assistant(assistant, llm)
        decode = decode_with_transformers(model, max_new_tokens, eos, assistant_model=helper)
        peers.append(Method(PEERS["assisted"], decode, largest_batch=1))
    if "lookup" in names:
        decode = decode_with_transformers(model, max_new_tokens, eos, prompt_lookup_num_tokens=LOOKUP_TOKENS)
        peers.append(Method(PEERS["lookup"], decode, largest_batch=1))
    return peers


def decode_with_transformers(
    model: PreTrainedModel, max_new_tokens: int, eos_token_ids: frozenset[int], **options: Any
) -> Callable[[Batch], Run]:
    """Greedy `generate` of transformers with its default cache; `options` are further arguments of it.

    Prompts of a batch are padded on the left. What `generate` writes after the end of a text is cut.
    """
    drafts = "assistant_model" in options or "prompt_lookup_num_tokens" in options

    def run(prompts: Batch) -> Run:
        start = time.perf_counter()
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with _PassCounter(model) as counter:
            out = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=sorted(eos_token_ids) or None,
                pad_token_id=0,
                **options,
            )
        new = [cut_after_eos(row, eos_token_ids) for row in out[:, width:].tolist()]
        seconds = time.perf_counter() - start
        # One pass reads the prompt and emits a first token, unless it verifies the first draft at once.
        read = 0 if drafts else 1
        passes, step_tokens = counter.passes - read, sum(len(tokens) - read for tokens in new)
        return Run(new, seconds, passes, passes if drafts else step_tokens, step_tokens)

    return run


def cut_after_eos(tokens: Sequence[int], eos_token_ids: frozenset[int]) -> list[int]:
    """`tokens` up to and including the first that ends a text."""
    end = next((place + 1 for place, token in enumerate(tokens) if token in eos_token_ids), len(tokens))
    return list(tokens[:end])


class _PassCounter:
    """Counts the forward passes of a model inside the block."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.passes = 0

    def __enter__(self) -> _PassCounter:
        self._handle = self._model.register_forward_pre_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _count(self, *_: object) -> None:
        self.passes += 1


def _load_untouched(base: BaseModel) -> PreTrainedModel:
    """The base model as transformers loads it: a copy of its own on a CPU, where ours stores its weights otherwise."""
    if base.device.type != "cpu":
        return base.model
    return AutoModelForCausalLM.from_pretrained(base.name, dtype=base.dtype).eval()


def _load_assistant(name: str, llm: LLM) -> PreTrainedModel:
    folder = fetch(find_shipped(name), "model")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=llm.base.dtype).to(llm.base.device).eval()
    except Exception as error:  # of any model's own code
        why = " ".join(str(error).split())
        raise CheckpointError(f"the assistant {name} cannot be loaded: {why[:200]}") from error
    ours, theirs = llm.codec.tokenizer.get_vocab(), TextCodec.load(folder).tokenizer.get_vocab()
    size = len(model.get_input_embeddings().weight)
    if ours != theirs or size != llm.base.vocab_size:
        raise RequestError(f"assistant {name} has another vocabulary than {llm.base.name}: choose one with the same")
    return model
