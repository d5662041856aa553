"""How drafts and verifications are computed: eagerly, or with static shapes, compiled or as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from hydraspec.base.model import BaseModel
from hydraspec.base.static import LEAST_VIEW, StaticForward, record, round_up
from hydraspec.decode.batch import RunningBatch
from hydraspec.heads.protocol import DraftHeads, HeadState
from hydraspec.tree.topology import Tree
from hydraspec.types import Draft, Verified


class Forwards(Protocol):
    """The two computations of a step that run models."""

    def draft(self, tree: Tree) -> Draft:
        """Fill the tree for the sequences that decode."""
        ...

    def verify(self, tokens: Tensor, tree: Tree) -> Verified:
        """The base model's view of a filled tree `[B, N]`; the cache keeps the nodes until the commit."""
        ...


class EagerForwards:
    """Runs heads and base model as they are."""

    def __init__(self, base: BaseModel, heads: DraftHeads | None, running: RunningBatch) -> None:
        self.base, self.heads, self.running = base, heads, running

    def draft(self, tree: Tree) -> Draft:
        """Fill the tree for the sequences that decode."""
        root = self.running.root[self.running.decoding]
        if self.heads is None or self.running.heads is None or tree.depth == 0:
            return Draft(root[:, None])
        self.running.catch_up()
        state = self.running.heads
        view = self.heads.count_view(state, len(root), tree.num_nodes)
        return fill_tree(tree, root, self.heads, state.first(len(root), view), self.base)

    def verify(self, tokens: Tensor, tree: Tree) -> Verified:
        """The base model's view of a filled tree."""
        return self.base.verify(tokens, tree, self.running.cache)


class StaticForwards(EagerForwards):
    """Runs them with fixed shapes: batches are rounded up, and the rows beyond them ignored."""

    def __init__(
        self, base: BaseModel, heads: DraftHeads | None, running: RunningBatch, compiler: str | None = None
    ) -> None:
        super().__init__(base, heads, running)
        self.verify = StaticForward(base, running.cache, compiler).verify  # type: ignore[method-assign]
        self._drafts: dict[tuple[int, Tree, int], Callable[[], Draft]] = {}

    def draft(self, tree: Tree) -> Draft:
        """Fill the tree for the sequences that decode; the result is overwritten by the next call."""
        heads, state = self.heads, self.running.heads
        if heads is None or state is None or tree.depth == 0:
            return super().draft(tree)
        self.running.catch_up()
        rows = round_up(self.running.active, self.running.size)
        view = heads.count_view(state, rows, tree.num_nodes)
        key = (rows, tree, max(LEAST_VIEW, 1 << (view - 1).bit_length()) if view else 0)
        if key not in self._drafts:
            root, first = self.running.root[:rows], state.first(rows, key[2])
            self._drafts[key] = record(lambda: fill_tree(tree, root, heads, first, self.base), root.device)
        return Draft(self._drafts[key]().tokens[: self.running.active])


def fill_tree(tree: Tree, root: Tensor, heads: DraftHeads, state: HeadState, base: BaseModel) -> Draft:
    """Fill a tree depth by depth: a node's children are the most likely tokens of the head at its depth."""
    tokens = root.new_zeros(len(root), tree.num_nodes)
    tokens[:, 0] = root
    for depth, stage in enumerate(tree.expansion):
        path = tokens.index_select(1, stage.paths.flatten()).view(-1, *stage.paths.shape)  # [B, P, depth + 1]
        logits = heads.guess(depth, state, path, base, stage.paths)  # [B, P or 1, V]
        best = heads.name_tokens(logits.topk(stage.width).indices).expand(-1, len(stage.paths), -1)  # [B, P, width]
        tokens[:, stage.children] = best.flatten(1).index_select(1, stage.picks)
    return Draft(tokens)
