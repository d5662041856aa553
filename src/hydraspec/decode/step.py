"""One decoding step: draft, verify, accept, commit. Start reading here."""

from __future__ import annotations

import torch

from hydraspec.accept.greedy import AcceptanceRule
from hydraspec.decode.batch import RunningBatch
from hydraspec.decode.clock import Clock
from hydraspec.decode.forwards import Forwards
from hydraspec.tree.topology import Tree
from hydraspec.types import Accepted, Draft, Seconds, Verified


@torch.inference_mode()
def decode_step(
    forwards: Forwards, tree: Tree, rule: AcceptanceRule, running: RunningBatch, clock: Clock
) -> tuple[Accepted, Seconds]:
    """Advance every sequence by the draft tokens that the base model agrees with, and one token of its own.

    Plain decoding is the tree of the root alone. Updates `running`.
    """
    clock.mark()
    draft = forwards.draft(tree)
    clock.mark()
    verified = forwards.verify(draft.tokens, tree)
    clock.mark()
    accepted = rule.accept(draft, verified, tree)
    clock.mark()
    commit(tree, draft, verified, accepted, running)
    clock.mark()
    return accepted, clock.read()


def commit(tree: Tree, draft: Draft, verified: Verified, accepted: Accepted, running: RunningBatch) -> None:
    """Keep the accepted paths: keys and values, tokens and hidden states for the heads, the next roots."""
    rows = running.decoding
    running.cache.commit(accepted.path, accepted.counts, rows)
    if tree.depth == 0:
        running.postpone(verified.hidden, draft.tokens)  # nobody guesses from it now
    elif running.heads is not None:
        kept = accepted.path[:, : max(accepted.counts)]
        hidden = verified.hidden.gather(1, kept[..., None].expand(*kept.shape, verified.hidden.shape[-1]))
        running.observe(hidden, draft.tokens.gather(1, kept), accepted.counts, rows)
    running.root[rows] = accepted.roots
