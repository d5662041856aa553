"""Tiny random models of real architectures, and heads that know the answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hydraspec.base.model import BaseModel
from hydraspec.config import HeadsConfig
from hydraspec.heads import HeadState
from hydraspec.heads.hydra import HydraHeads
from hydraspec.llm import LLM, load

VOCABULARY = 96
WINDOW = 8  # of the sliding layers; prompts are longer

logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny products are fastest on one thread, and so is a machine that runs other things too."""
    torch.set_num_threads(1)


def make_model(model_type: str, **options: object) -> PreTrainedModel:
    """A random model with weights large enough for sharp distributions, norms included."""
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.25,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **options,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_llama() -> BaseModel:
    return BaseModel(make_model("llama"), "tiny-llama")


@pytest.fixture(scope="session")
def shipped() -> LLM:
    """The shipped base model with its Hydra++ heads."""
    return load("tiny-assistant", "hydra++", device="cpu")


def generate_plainly(
    model: PreTrainedModel, prompt: Sequence[int], new_tokens: int, eos: int | list[int] | None = None
) -> list[int]:
    """What transformers' own greedy decoding says after `prompt`."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def random_prompts(lengths: Sequence[int], seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


class Places:
    """How many tokens of each row are committed, and which of them have been seen as roots."""

    def __init__(self, rows: int) -> None:
        self.counts = [0] * rows
        self.roots: list[dict[int, int]] = [{} for _ in range(rows)]  # position -> token

    def reset(self, row: int, length: int) -> None:
        self.counts[row], self.roots[row] = length, {}

    def swap(self, a: int, b: int) -> None:
        for values in (self.counts, self.roots):
            values[a], values[b] = values[b], values[a]

    def copy_beginning(self, source: int, target: int, length: int) -> None:
        self.counts[target], self.roots[target] = length, {}


@dataclass
class Script:
    """The full text of each sequence, and the rank at which the true token is to be found, by position."""

    texts: list[list[int]]
    rank: Callable[[int], int | None] = field(default=lambda position: (position * 7) % 3)


class ScriptedHeads(HydraHeads):
    """Heads that guess the true next tokens, at ranks that change with the position; None: not at all."""

    def __init__(self, base: BaseModel, script: Script, num_heads: int = 4) -> None:
        super().__init__(
            HeadsConfig("hydra", base.hidden_size, base.vocab_size, num_heads=num_heads, tied_vocabulary=True)
        )
        self.script = script

    def new_state(self, batch: int, max_length: int) -> HeadState:
        return HeadState(torch.zeros(batch, self.config.hidden_size), Places(batch))

    def observe(self, state: HeadState, hidden: Tensor, tokens: Tensor, counts: Sequence[int], rows: slice) -> None:
        for row, count in zip(range(rows.start, rows.stop), counts, strict=True):
            state.memory.counts[row] += count

    def guess(self, head: int, state: HeadState, path: Tensor, base: BaseModel, nodes: Tensor) -> Tensor:
        logits = torch.zeros(path.shape[0], path.shape[1], self.config.vocab_size)
        for row in range(len(path)):
            count, roots = state.memory.counts[row], state.memory.roots[row]
            roots[count] = int(path[row, 0, 0])
            text, position = self._find_text(roots), count + 1 + head
            rank = self.script.rank(position)
            if position < len(text) and rank is not None:
                decoys = [token for token in range(rank + 2) if token != text[position]][:rank]
                for place, token in enumerate([*decoys, text[position]]):
                    logits[row, :, token] = 10.0 - place
        return logits

    def _find_text(self, roots: dict[int, int]) -> list[int]:
        """The scripted text that holds all these tokens."""
        fits = (t for t in self.script.texts if all(p < len(t) and t[p] == token for p, token in roots.items()))
        return next(fits, [])
