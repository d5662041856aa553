"""One decoding step: draft, verify, accept, commit. Start reading here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hydraspec.accept.greedy import AcceptanceRule
from hydraspec.base.model import BaseModel
from hydraspec.decode.batch import RunningBatch
from hydraspec.decode.clock import Clock
from hydraspec.heads.protocol import DraftHeads
from hydraspec.tree.topology import Tree
from hydraspec.types import Accepted, Draft, Seconds, Verified


# The base model's view of a filled tree `[B, N]`, with the nodes left in the cache for the commit.
Verify = Callable[[Tensor, Tree], Verified]


@torch.inference_mode()
def decode_step(
    base: BaseModel,
    heads: DraftHeads | None,
    tree: Tree,
    verify: Verify,
    rule: AcceptanceRule,
    running: RunningBatch,
    clock: Clock,
) -> tuple[Accepted, Seconds]:
    """Advance every sequence by the draft tokens that the base model agrees with, and one token of its own.

    Plain decoding is the tree of the root alone. Updates `running`.
    """
    clock.mark()
    filled = draft(base, heads, tree, running)
    clock.mark()
    verified = verify(filled.tokens, tree)
    clock.mark()
    accepted = rule.accept(filled, verified, tree)
    clock.mark()
    commit(tree, verified, accepted, running)
    clock.mark()
    return accepted, clock.read()


def draft(base: BaseModel, heads: DraftHeads | None, tree: Tree, running: RunningBatch) -> Draft:
    """Fill the tree depth by depth: a node's children are the most likely tokens of the head at its depth."""
    root = running.root[running.decoding]
    if tree.depth == 0:
        return Draft(root[:, None])
    assert heads is not None and running.heads is not None
    running.catch_up()
    state = running.heads.first(running.active)
    tokens = root.new_zeros(len(root), tree.num_nodes)
    tokens[:, 0] = root
    for depth, stage in enumerate(tree.expansion):
        path = tokens.index_select(1, stage.paths.flatten()).view(-1, *stage.paths.shape)  # [B, P, depth + 1]
        logits = heads.guess(depth, state, path, base)  # [B, P or 1, V]
        best = heads.name_tokens(logits.topk(stage.width).indices).expand(-1, len(stage.paths), -1)  # [B, P, width]
        tokens[:, stage.children] = best.flatten(1).index_select(1, stage.picks)
    return Draft(tokens)


def commit(tree: Tree, verified: Verified, accepted: Accepted, running: RunningBatch) -> None:
    """Keep the accepted paths: their keys and values, their hidden states for the heads, the next roots."""
    rows = running.decoding
    running.cache.commit(accepted.path, accepted.counts, rows)
    if tree.depth == 0:
        running.postpone(verified.hidden)  # nobody guesses from it now
    elif running.heads is not None:
        kept = accepted.path[:, : max(accepted.counts)]
        hidden = verified.hidden.gather(1, kept[..., None].expand(*kept.shape, verified.hidden.shape[-1]))
        running.observe(hidden, accepted.counts, rows)
    running.root[rows] = accepted.roots
