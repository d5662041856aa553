"""One decoding step: draft, verify, accept, commit. Start reading here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hydraspec.accept.greedy import AcceptanceRule
from hydraspec.base.cache import SlotCache
from hydraspec.base.model import BaseModel
from hydraspec.heads.protocol import DraftHeads, HeadState
from hydraspec.tree.topology import Tree
from hydraspec.types import Accepted, Draft, Seconds, Verified


@dataclass
class RunningBatch:
    """The sequences that decode together, between two steps.

    Every token before the root is in the cache; the root is known, but not yet read by the base model.
    """

    root: Tensor  # [B] int64
    cache: SlotCache
    heads: HeadState | None

    def retain(self, rows: Sequence[int]) -> None:
        """Keep only the sequences `rows`, in that order."""
        self.root = self.root[list(rows)]
        self.cache.retain(rows)
        if self.heads is not None:
            self.heads.retain(rows)


@torch.inference_mode()
def decode_step(
    base: BaseModel, heads: DraftHeads | None, tree: Tree, rule: AcceptanceRule, running: RunningBatch
) -> tuple[Accepted, Seconds]:
    """Advance every sequence by the draft tokens that the base model agrees with, and one token of its own.

    Plain decoding is the tree of the root alone. Updates `running`.
    """
    clock = _Clock(base.device)
    filled = draft(base, heads, tree, running)
    drafted = clock.lap()
    verified = base.verify(filled.tokens, tree, running.cache)
    verify_seconds = clock.lap()
    accepted = rule.accept(filled, verified, tree)
    accept_seconds = clock.lap()
    commit(heads, verified, accepted, running)
    return accepted, Seconds(drafted, verify_seconds, accept_seconds, clock.lap())


def draft(base: BaseModel, heads: DraftHeads | None, tree: Tree, running: RunningBatch) -> Draft:
    """Fill the tree depth by depth: a node's children are the most likely tokens of the head at its depth."""
    tokens = running.root.new_zeros(len(running.root), tree.num_nodes)
    tokens[:, 0] = running.root
    if heads is None or running.heads is None:
        return Draft(tokens)
    for depth, stage in enumerate(tree.expansion):
        path = tokens.index_select(1, stage.paths.flatten()).view(-1, *stage.paths.shape)  # [B, P, depth + 1]
        logits = heads.guess(depth, running.heads, path, base)  # [B, P or 1, V]
        best = heads.name_tokens(logits.topk(stage.width).indices).expand(-1, len(stage.paths), -1)  # [B, P, width]
        tokens[:, stage.children] = best.flatten(1).index_select(1, stage.picks)
    return Draft(tokens)


def commit(heads: DraftHeads | None, verified: Verified, accepted: Accepted, running: RunningBatch) -> None:
    """Keep the accepted paths: their keys and values, their hidden states for the heads, the next roots."""
    running.cache.commit(accepted.path, accepted.counts)
    if heads is not None and running.heads is not None:
        kept = accepted.path[:, : max(accepted.counts)]
        hidden = verified.hidden.gather(1, kept[..., None].expand(*kept.shape, verified.hidden.shape[-1]))
        heads.observe(running.heads, hidden, accepted.counts)
    running.root = accepted.roots


class _Clock:
    """Seconds between laps; on a GPU each lap waits for the work so far."""

    def __init__(self, device: torch.device) -> None:
        self._wait = torch.cuda.synchronize if device.type == "cuda" else None
        self._last = time.perf_counter()

    def lap(self) -> float:
        if self._wait is not None:
            self._wait()
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
