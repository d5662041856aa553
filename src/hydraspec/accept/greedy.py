"""Exact acceptance: the path follows the tokens that the base model itself chooses."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hydraspec.tree.topology import Tree
from hydraspec.types import Accepted, Draft, Verified


class AcceptanceRule(Protocol):
    """Decides which drafted path is kept, and what the next root is."""

    def choose(self, logits: Tensor) -> Tensor:
        """The token after each sequence's text: `[B, V]` to `[B]` int64. The prefill's choice is the first root."""
        ...

    def accept(self, draft: Draft, verified: Verified, tree: Tree) -> Accepted:
        """The path that each sequence keeps."""
        ...


class GreedyAcceptance:
    """The base model's argmax after each node; the longest path of such tokens is kept."""

    def choose(self, logits: Tensor) -> Tensor:
        """The most likely token, of the last dimension."""
        return logits.argmax(-1)

    def accept(self, draft: Draft, verified: Verified, tree: Tree) -> Accepted:
        """The longest path whose every token is the base model's argmax after its parent."""
        return follow_choices(tree, draft.tokens, self.choose(verified.logits))


def follow_choices(tree: Tree, tokens: Tensor, chosen: Tensor) -> Accepted:
    """Walk from the root to the child that holds the chosen token, as long as there is one.

    This is exact for any draft: each emitted token is the one chosen from the base model's own distribution after the
    tokens before it. Siblings hold different tokens, so at most one child matches.

    Args:
        tree: its topology.
        tokens: `[B, N]` the drafted tokens.
        chosen: `[B, N]` the base model's next token after each node.

    Example: the chain `a b c` with choices `b x y` accepts `b` and makes `x` the next root: counts 2, tokens `[b, x]`.
    """
    drafted_rows, chosen_rows = torch.stack([tokens, chosen]).tolist()  # the step's one copy to the host
    paths, counts, emitted = [], [], []
    for drafted, choices in zip(drafted_rows, chosen_rows, strict=True):
        node: int | None = 0
        path, gained = [], []
        while node is not None:
            path.append(node)
            gained.append(choices[node])
            node = next((child for child in tree.children[node] if drafted[child] == choices[node]), None)
        counts.append(len(path))
        paths.append(path + [path[-1]] * (tree.depth + 1 - len(path)))
        emitted.append(gained)
    roots = torch.tensor([gained[-1] for gained in emitted], device=tokens.device)
    return Accepted(path=torch.tensor(paths, device=tokens.device), counts=counts, tokens=emitted, roots=roots)
