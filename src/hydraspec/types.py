"""The records that the stages of a decoding step exchange, and what a caller gets back.

B sequences, N tree nodes, d the base model's hidden size, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hydraspec.config import SamplingConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LogitsProcessor

# Given a sequence's new tokens and how many of them are newer than the last call, the number of tokens to keep
# (the one that completes a stop string is the last kept), or None to go on.
StopCheck = Callable[[Sequence[int], int], "int | None"]


@dataclass(frozen=True)
class Request:
    """One sequence to decode, in token ids."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    stop_check: StopCheck | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sequence: int = 0  # tells samples of one prompt with one seed apart: the noise is keyed by both
    processors: tuple[LogitsProcessor, ...] = ()  # of transformers: called with (ids [1, L], scores [1, V])


@dataclass(frozen=True)
class LiveText:
    """A request and its text so far: what an acceptance rule may look at besides logits."""

    request: Request
    tokens: list[int]  # prompt and output, the root included; the engine appends what each step emits


@dataclass(frozen=True)
class Draft:
    """A filled tree."""

    tokens: Tensor  # [B, N] int64, the root first


@dataclass(frozen=True)
class Verified:
    """The base model's view of every node."""

    logits: Tensor  # [B, N, V], of the token after each node
    hidden: Tensor  # [B, N, d], after the final norm: the lm_head's input


@dataclass(frozen=True)
class Accepted:
    """The path that each sequence keeps, and the root of its next tree."""

    path: Tensor  # [B, depth + 1] int64 nodes from the root; entries past the count repeat the last one
    counts: list[int]  # nodes kept, the root included: 1 + accepted draft tokens
    tokens: list[list[int]]  # for each sequence its accepted draft tokens and then the next root
    roots: Tensor  # [B] int64: the next roots, on the device

    def __post_init__(self) -> None:
        assert all(len(tokens) == count for tokens, count in zip(self.tokens, self.counts, strict=True))


@dataclass(frozen=True)
class Seconds:
    """Where a step's time went, in seconds."""

    draft: float = 0.0
    verify: float = 0.0
    accept: float = 0.0
    commit: float = 0.0

    @property
    def total(self) -> float:
        """All stages together."""
        return self.draft + self.verify + self.accept + self.commit


@dataclass(frozen=True)
class StepRecord:
    """One verification step of the running batch."""

    nodes: int  # tree nodes verified for each sequence, the root included
    sequences: tuple[int, ...]  # which requests ran, by index
    accepted: tuple[int, ...]  # draft tokens that each of them accepted
    emitted: tuple[tuple[int, ...], ...]  # the tokens that each of them gained, cut where it finished
    seconds: Seconds


@dataclass
class Output:
    """What one request got."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "eos", "stop" or "length"; None while it runs
    text: str = ""
    steps: int = 0  # verification steps that it took part in
    step_tokens: int = 0  # tokens emitted by those steps (the prefill emits the first one)

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted per verification step; plain decoding is 1.00."""
        return self.step_tokens / self.steps if self.steps else 1.0
