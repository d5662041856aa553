"""What every kind of draft heads offers to the decode loop and to training.

Notation: d hidden size, V vocabulary, h_t the base model's final hidden state at the last verified position t, E its
input embedding, x_{t+1} the root. Head i = 0 … K-1 predicts x_{t+2+i}, the tokens at depth i + 1 of the tree.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hydraspec.base.facts import store_columns_first
from hydraspec.base.model import BaseModel
from hydraspec.base.packed import BYTES_LIMIT, PackedLinear, supports
from hydraspec.config import HeadsConfig
from hydraspec.heads.blocks import HeadBlocks, gather_last
from hydraspec.heads.tables import TokenTables

Project = Callable[[Tensor], Tensor]


@dataclass
class HeadState:
    """What heads remember of the sequences between steps, in the rows of the base model's cache."""

    context: Tensor  # [rows, d]: stands for h_t
    memory: Any = None  # what else this kind of heads keeps, such as a cache of its own: see `SlotCache`
    read: Tensor | None = None  # [B, K, 2d]: what the context adds to the first blocks, within one step

    def first(self, count: int) -> HeadState:
        """The state of the first `count` rows, to guess with."""
        return HeadState(self.context[:count], self.memory)

    def reset(self, row: int, length: int = 0) -> None:
        """Forget the tokens of a row, all but its first `length`."""
        if self.memory is not None:
            self.memory.reset(row, length)

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows."""
        self.context[[a, b]] = self.context[[b, a]]
        if self.memory is not None:
            self.memory.swap(a, b)

    def copy_beginning(self, source: int, target: int, length: int) -> None:
        """Make the first `length` tokens of row `source` all that row `target` remembers."""
        if self.memory is not None:
            self.memory.copy_beginning(source, target, length)


class DraftHeads(nn.Module):
    """K residual MLP heads over a context and, where they are grounded, the embeddings of the path to a node.

    Subclasses say what the context is (`begin`, `observe`, `read_contexts`) and whether the heads are `grounded`.
    """

    grounded: ClassVar[bool]

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        # A grounded head i reads [h_t ; E(x_{t+1}) ; … ; E(x_{t+1+i})].
        widths = [(i + 2) * d if self.grounded else d for i in range(config.num_heads)]
        self.blocks = nn.ModuleList(HeadBlocks(width, config) for width in widths)
        self.vocabulary = nn.ModuleList(
            [] if config.tied_vocabulary else [nn.Linear(d, config.vocab_size) for _ in range(config.num_heads)]
        )
        # Fast paths of prepared heads.
        self._tables: TokenTables | None = None
        self._packed: list[PackedLinear] = []  # the vocabulary layers
        # Which tokens are proposed, where not all are: exact output does not depend on it, the cost of a draft does.
        self.token_ids: Tensor | None
        self.register_buffer(
            "token_ids", torch.zeros(config.draft_vocabulary, dtype=torch.long) if config.draft_vocabulary else None
        )

    @property
    def num_heads(self) -> int:
        """Tokens that the heads guess ahead: the deepest tree that they can fill."""
        return self.config.num_heads

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    @torch.no_grad()
    def start_from(self, base: BaseModel) -> None:
        """Initialise separate vocabulary layers from the base model's lm_head."""
        for layer in self.vocabulary:
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(base.output_layer.get_parameter("weight"))
            bias = getattr(base.output_layer, "bias", None)
            layer.bias.zero_() if bias is None else layer.bias.copy_(bias)

    @torch.no_grad()
    def prepare(self, base: BaseModel, dtype: torch.dtype | None = None) -> DraftHeads:
        """Make the heads ready for decoding, and for that only: device, dtype, cut vocabulary layers, no gradients.

        Args:
            base: the model that they draft for.
            dtype: of their weights; it may be smaller than the base model's, see `choose_draft_dtype`. None: the same.
        """
        self.to(device=base.device).eval()
        for parameter in self.parameters():  # not the buffers: rotary frequencies lose their meaning in bfloat16
            parameter.data = parameter.data.to(dtype or base.dtype)
        if self.token_ids is not None:
            layers = self.vocabulary or [base.output_layer]
            cut = [_cut_rows(layer, self.token_ids).to(dtype or base.dtype) for layer in layers]
            self.vocabulary = nn.ModuleList(cut * (self.num_heads // len(cut)))
        self.requires_grad_(False)
        if self.grounded and TokenTables.fit(base, self.num_heads, self.dtype):
            self._tables = TokenTables([block for block in self.blocks if isinstance(block, HeadBlocks)], base)
        if base.device.type == "cpu":
            self._pack(base)
        return self

    def _pack(self, base: BaseModel) -> None:
        """Lay out the weights for products of few rows on a CPU; large heads would need too much memory twice."""
        if self.dtype == torch.float32:
            store_columns_first(self)
        if sum(parameter.numel() * parameter.itemsize for parameter in self.parameters()) > BYTES_LIMIT:
            return
        for block in self.blocks:
            assert isinstance(block, HeadBlocks)
            block.pack(first=self._tables is None)
        layers = list(self.vocabulary)
        if not layers:  # the base model's own, whose scale and soft cap change no order
            every = torch.arange(base.vocab_size, device=base.device)
            layers = [_cut_rows(base.output_layer, every).to(self.dtype)] * self.num_heads
        packed = {layer: PackedLinear.stack([layer]) for layer in layers}  # heads may share one
        self._packed = [packed[layer] for layer in layers]

    def name_tokens(self, proposals: Tensor) -> Tensor:
        """Token ids of the entries of `guess`'s last dimension."""
        return proposals if self.token_ids is None else self.token_ids.take(proposals)

    # -- decoding ----------------------------------------------------------------------------------------------

    def new_state(self, batch: int, max_length: int) -> HeadState:
        """An empty state for `batch` sequences of at most `max_length` tokens. The heads must be prepared."""
        device = next(self.parameters()).device
        return HeadState(torch.zeros(batch, self.config.hidden_size, dtype=self.dtype, device=device))

    def count_bytes(self, max_length: int) -> int:
        """Bytes that the state of one sequence of at most `max_length` tokens takes besides its context."""
        return 0

    def observe(self, state: HeadState, hidden: Tensor, counts: Sequence[int], rows: slice) -> None:
        """Read the hidden states of newly committed tokens, of prompts as of accepted paths. Updates `state`.

        Args:
            state: of the sequences.
            hidden: `[B, A, d]`, right-padded.
            counts: real tokens of each sequence.
            rows: the B rows of the state that the sequences lie in.
        """
        state.context[rows] = gather_last(hidden, counts)

    def guess(self, head: int, state: HeadState, path: Tensor, base: BaseModel) -> Tensor:
        """Logits of the children of nodes at depth `head`. The heads must be prepared for `base`.

        Args:
            head: which head, from 0.
            state: the running batch.
            path: `[B, P, head + 1]` int64, the tokens from the root to each of P nodes.
            base: for its embeddings, and for its vocabulary layer where the heads have none.

        Returns:
            `[B, P, V]`, or `[B, 1, V]` where the path does not matter; V as `name_tokens` reads it.
        """

        def project(hidden: Tensor) -> Tensor:
            return base.project(hidden.to(base.dtype))

        if self._tables is not None:
            if head == 0:
                state.read = self._tables.read_context(state.context)
            assert state.read is not None, "heads guess in order, from head 0"
            return self._name(head, self._tables.run(head, state.read, path), project)
        context = state.context[:, None]
        if not self.grounded:
            return self.score(head, context, None, project)
        embeddings = base.embed(path).to(context.dtype)
        return self.score(head, context.expand(-1, path.shape[1], -1), embeddings, project)

    # -- both --------------------------------------------------------------------------------------------------

    def score(self, head: int, context: Tensor, path: Tensor | None, project: Project) -> Tensor:
        """Logits `[..., V]` of one head from contexts `[..., d]` and path embeddings `[..., head + 1, d]`."""
        if self.grounded:
            assert path is not None
            context = torch.cat([context, path.flatten(-2)], dim=-1)
        return self._name(head, self.blocks[head](context), project)

    def _name(self, head: int, hidden: Tensor, project: Project) -> Tensor:
        layers = self._packed or self.vocabulary
        return layers[head](hidden) if layers else project(hidden)

    # -- training ----------------------------------------------------------------------------------------------

    @abstractmethod
    def read_contexts(self, hidden: Tensor) -> Tensor:
        """What stands for h_t at every position: `[B, T, d]` from hidden states `[B, T, d]`."""


def choose_draft_dtype(base: BaseModel) -> torch.dtype:
    """bfloat16 beside a float32 base model where the CPU computes in it, else the base model's dtype.

    Drafts need not be exact: half the bytes and faster products are worth a guess that now and then differs.
    """
    if base.dtype == torch.float32 and supports(base.device, torch.bfloat16):
        return torch.bfloat16
    return base.dtype


def _cut_rows(layer: nn.Module, rows: Tensor) -> nn.Linear:
    """A copy of a vocabulary layer with only some of its outputs."""
    weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
    cut = nn.Linear(weight.shape[1], len(rows), bias=bias is not None, device=weight.device, dtype=weight.dtype)
    cut.weight.data = weight.detach()[rows]
    if bias is not None:
        cut.bias.data = bias.detach()[rows]
    return cut
