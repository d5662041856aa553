"""Heads of residual blocks over a context and, where they are grounded, the embeddings of the path to a node."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hydraspec.base.attention import StepLayout
from hydraspec.base.model import BaseModel
from hydraspec.config import HeadsConfig
from hydraspec.heads.blocks import HeadBlocks, gather_last
from hydraspec.heads.protocol import DraftHeads, HeadState
from hydraspec.heads.tables import TokenTables


class ResidualHeads(DraftHeads):
    """K residual MLP heads. Subclasses say whether they are `grounded`, and what stands for h_t.

    A grounded head i reads `[h_t ; E(x_{t+1}) ; … ; E(x_{t+1+i})]`, the others `h_t` alone.
    """

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config)
        d = config.hidden_size
        widths = [(i + 2) * d if self.grounded else d for i in range(config.num_heads)]
        self.blocks = nn.ModuleList(HeadBlocks(width, config) for width in widths)
        self._tables: TokenTables | None = None  # a fast path of prepared heads

    def _prepare_parts(self, base: BaseModel) -> None:
        if self.grounded and TokenTables.fit(base, self.num_heads, self.dtype):
            self._tables = TokenTables([block for block in self.blocks if isinstance(block, HeadBlocks)], base)

    def _pack(self, base: BaseModel) -> None:
        super()._pack(base)
        for block in self.blocks:
            assert isinstance(block, HeadBlocks)
            block.pack(first=self._tables is None)

    # -- decoding ----------------------------------------------------------------------------------------------

    def observe(self, state: HeadState, hidden: Tensor, tokens: Tensor, counts: Sequence[int], rows: slice) -> None:
        """Take over the last of newly committed hidden states `[B, A, d]`; see `DraftHeads.observe`."""
        state.context[rows] = gather_last(hidden, counts)

    def guess(self, head: int, state: HeadState, path: Tensor, base: BaseModel, nodes: Tensor) -> Tensor:
        """Logits of the children of nodes at depth `head`; see `DraftHeads.guess`."""
        if self._tables is not None:
            if head == 0:
                state.read = self._tables.read_context(state.context)
            assert state.read is not None, "heads guess in order, from head 0"
            return self._name(head, self._tables.run(head, state.read, path), base)
        context = state.context[:, None]
        if not self.grounded:
            return self.score(head, context, None, base)
        embeddings = base.embed(path).to(context.dtype)
        return self.score(head, context.expand(-1, path.shape[1], -1), embeddings, base)

    # -- both --------------------------------------------------------------------------------------------------

    def score(self, head: int, context: Tensor, path: Tensor | None, base: BaseModel) -> Tensor:
        """Logits `[..., V]` of one head from contexts `[..., d]` and path embeddings `[..., head + 1, d]`."""
        if self.grounded:
            assert path is not None
            context = torch.cat([context, path.flatten(-2)], dim=-1)
        return self._name(head, self.blocks[head](context), base)

    # -- training ----------------------------------------------------------------------------------------------

    def read_contexts(self, hidden: Tensor, layout: StepLayout | None = None) -> Tensor:
        """What stands for h_t at every position: `[B, T, d]` from hidden states `[B, T, d]`."""
        return hidden

    def draft_states(
        self, hidden: Tensor, embeddings: Tensor, anchors: Sequence[Tensor], layout: StepLayout | None = None
    ) -> list[Tensor]:
        """What enters the vocabulary layers, for head i `[R_i, d]`; see `DraftHeads.draft_states`."""
        contexts, embedded = self.read_contexts(hidden, layout).flatten(0, 1), embeddings.flatten(0, 1)
        states = []
        for head, rows in enumerate(anchors):
            parts = [contexts.index_select(0, rows)]
            if self.grounded:
                parts += [embedded.index_select(0, rows + ahead) for ahead in range(1, head + 2)]
            states.append(self.blocks[head](torch.cat(parts, -1)))
        return states
