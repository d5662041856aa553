"""What heads are worth, measured after training: accuracy, and acceptance lengths predicted and real."""

from __future__ import annotations

from itertools import islice
from typing import Any

from rich.console import Console

from hydraspec.base.model import BaseModel
from hydraspec.config import TrainingConfig
from hydraspec.heads.protocol import DraftHeads
from hydraspec.train.packing import RowPlan, load_batch
from hydraspec.train.store import TokenStore
from hydraspec.train.validation import (
    compare_acceptance,
    find_prompts,
    measure_accuracy,
    tabulate,
    write_own_texts,
)
from hydraspec.tree import find_tree

TREES = ("small-16", "published-63")
ROWS = 64  # of held-out conversations, for the accuracy
NEW_TOKENS = 64


def measure_heads(
    base: BaseModel, heads: DraftHeads, held_out: TokenStore, config: TrainingConfig, console: Console
) -> dict[str, Any]:
    """Measure trained heads on held-out conversations and print what was found.

    Args:
        base: the model that they draft for, in the dtype in which it is deployed.
        heads: as they are trained.
        held_out: conversations.
        config: how many prompts to decode.
        console: for two tables.

    Returns:
        JSON values for the heads' provenance.
    """
    plan = RowPlan(held_out.lengths, config.max_length)
    with console.status("measuring the heads on held-out conversations"):
        accuracy = measure_accuracy(base, heads, (load_batch(held_out, [row]) for row in islice(plan.rows(), ROWS)))
        room = (base.max_length or 2 * config.max_length) - NEW_TOKENS
        prompts = list(islice(find_prompts((held_out[n] for n in range(len(held_out))), room), config.held_out_prompts))
        texts = write_own_texts(base, prompts, NEW_TOKENS)
        trees = [find_tree(name).cut(heads.num_heads) for name in TREES]
        compared = compare_acceptance(base, heads, texts, trees, NEW_TOKENS) if texts else []
    console.print(tabulate(accuracy, compared))
    return {
        "held_out_conversations": len(held_out),
        "top1": [round(head.top[1], 4) for head in accuracy],
        "top5": [round(head.top[5], 4) for head in accuracy],
        "acceptance": {
            found.tree: {"predicted": round(found.predicted.acceptance_length, 4), "real": round(found.real, 4)}
            for found in compared
        },
    }
