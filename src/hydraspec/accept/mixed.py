"""A batch whose sequences follow different acceptance rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydraspec.accept.greedy import AcceptanceRule
from hydraspec.tree.topology import Tree
from hydraspec.types import Accepted, Draft, Verified


class MixedAcceptance:
    """Applies each rule to its own rows. Each rule copies once to the host.

    Args:
        parts: rules and the rows of the batch that they decide; every row belongs to one rule.
        device: of the logits.
    """

    def __init__(self, parts: Sequence[tuple[AcceptanceRule, Sequence[int]]], device: torch.device | str) -> None:
        order = [row for _, rows in parts for row in rows]
        assert sorted(order) == list(range(len(order))), f"the parts must share out the rows, not {order}"
        self._parts = [(rule, torch.tensor(rows, device=device)) for rule, rows in parts]
        self._places = [order.index(row) for row in range(len(order))]  # of each row in the parts' results in turn
        self._gather = torch.tensor(self._places, device=device)

    def choose(self, logits: Tensor) -> Tensor:
        """The token after each sequence's text: `[B, V]` to `[B]` int64."""
        return torch.cat([rule.choose(logits[rows]) for rule, rows in self._parts])[self._gather]

    def accept(self, draft: Draft, verified: Verified, tree: Tree) -> Accepted:
        """The path that each sequence keeps, by its own rule."""
        results = [
            rule.accept(Draft(draft.tokens[rows]), Verified(verified.logits[rows], verified.hidden[rows]), tree)
            for rule, rows in self._parts
        ]
        counts = [count for result in results for count in result.counts]
        tokens = [row for result in results for row in result.tokens]
        return Accepted(
            path=torch.cat([result.path for result in results])[self._gather],
            counts=[counts[place] for place in self._places],
            tokens=[tokens[place] for place in self._places],
            roots=torch.cat([result.roots for result in results])[self._gather],
        )
