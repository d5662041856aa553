"""Validation that predicts deployment: how often heads are right, and how long the paths are that decoding accepts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from hydraspec.base.attention import layout_packed
from hydraspec.base.model import BaseModel
from hydraspec.config import EngineConfig, SamplingConfig
from hydraspec.decode.engine import PLAIN, Engine
from hydraspec.heads.protocol import DraftHeads
from hydraspec.train.batch import Batch, Example
from hydraspec.train.ranks import OwnText, Prediction, copy_for_deployment, find_ranks, rank_targets
from hydraspec.tree import Tree
from hydraspec.types import Output, Request

COUNTS = (1, 2, 3, 5, 10)  # of most likely tokens, for the accuracies
ROWS_AT_ONCE = 1024  # whose logits over the base model's vocabulary are made at once


@dataclass(frozen=True)
class HeadAccuracy:
    """How often the base model's own choice is among a head's most likely tokens, on text as it stands."""

    top: dict[int, float]  # by number of most likely tokens
    places: int  # that were looked at


@dataclass(frozen=True)
class Decoded:
    """What decoding did, of all prompts together; the figures are those of `Output`."""

    acceptance_length: float
    steps: int
    tokens: int  # emitted by the steps
    texts: tuple[OwnText, ...]  # what it said


@dataclass(frozen=True)
class Comparison:
    """A tree's acceptance length as predicted and as decoding measures it, on the same prompts."""

    tree: str
    predicted: Prediction
    real: float
    steps: int
    same_texts: int  # prompts that decoding continued with the very tokens of the prediction; rounding may differ
    texts: int

    @property
    def error(self) -> float:
        """Of the prediction, as a fraction of the real acceptance length; positive: it promised too much."""
        return self.predicted.acceptance_length / self.real - 1.0


@torch.no_grad()
def measure_accuracy(
    base: BaseModel,
    heads: DraftHeads,
    batches: Iterable[Batch],
    counts: Sequence[int] = COUNTS,
    dtype: torch.dtype | None = None,
) -> list[HeadAccuracy]:
    """Top-k accuracy of each head against the base model's argmax, along the path that the data gives.

    Args:
        base: the model that the heads draft for.
        heads: as they are trained; a copy is measured.
        batches: of held-out conversations; they may be packed.
        counts: the k. Those beyond the heads' vocabulary count as all of it.
        dtype: of the heads; None: the one in which they would be deployed.
    """
    heads = copy_for_deployment(heads, base, dtype)
    width = min(max(counts), heads.config.draft_vocabulary or base.vocab_size)
    hits, places = torch.zeros(heads.num_heads, width), [0] * heads.num_heads
    for batch in batches:
        anchors = [batch.find_anchors(head).to(base.device) for head in range(heads.num_heads)]
        if not len(anchors[0]):
            continue
        moved = batch.to(base.device)
        hidden = _read_hidden_states(base, moved)
        # The targets of all heads are among those of head 0: the base model is asked once for each.
        chosen = torch.full((hidden.shape[0] * hidden.shape[1],), -1, device=base.device)
        chosen[anchors[0] + 1] = choose_tokens(base, hidden.flatten(0, 1)[anchors[0] + 1])
        layout = layout_packed(moved.segments, moved.positions, heads.dtype, base.device)
        embeddings = base.embed(moved.ids).to(heads.dtype)
        states = heads.draft_states(hidden.to(heads.dtype), embeddings, anchors, layout)
        for head, rows in enumerate(anchors):
            ranks = rank_targets(base, heads, head, states[head], chosen[rows + 1 + head], width)
            hits[head] += torch.bincount(ranks[ranks >= 0].cpu(), minlength=width)
            places[head] += len(rows)
    sums = hits.cumsum(1)
    return [
        HeadAccuracy({count: float(found[min(count, width) - 1]) / max(total, 1) for count in counts}, total)
        for found, total in zip(sums, places, strict=True)
    ]


def choose_tokens(base: BaseModel, hidden: Tensor) -> Tensor:
    """The base model's argmax after final hidden states `[R, d]`: `[R]` int64, a few rows' logits at a time."""
    return torch.cat([base.project(rows).argmax(-1) for rows in hidden.split(ROWS_AT_ONCE)])


def predict_acceptance(
    base: BaseModel, heads: DraftHeads, texts: Sequence[OwnText], tree: Tree, dtype: torch.dtype | None = None
) -> Prediction:
    """The acceptance length of greedy decoding with a tree, without decoding; for many trees see `find_ranks`.

    Args:
        base: the model that wrote the texts.
        heads: as they are trained.
        texts: of `write_own_texts`.
        tree: no deeper than the heads guess.
        dtype: of the heads; None: the one in which they would be deployed.

    Raises:
        TreeError: the heads cannot fill the tree.
    """
    # As wide as drafting asks for at each depth, so that equal logits are ordered as there.
    widths = [stage.width for stage in tree.expansion][: heads.num_heads]
    return find_ranks(base, heads, texts, widths + [0] * (heads.num_heads - len(widths)), dtype=dtype).walk(tree)


def write_own_texts(
    base: BaseModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch: int = 16
) -> list[OwnText]:
    """How the base model continues prompts (token ids) by itself, decoded greedily, `batch` at a time.

    Raises:
        RequestError: a prompt is empty, or does not fit the context with `max_new_tokens` more.
    """
    return list(decode(base, None, prompts, PLAIN, max_new_tokens, batch).texts)


def measure_acceptance(
    base: BaseModel,
    heads: DraftHeads,
    prompts: Sequence[Sequence[int]],
    tree: Tree,
    max_new_tokens: int,
    batch: int = 16,
    dtype: torch.dtype | None = None,
) -> float:
    """The acceptance length of real greedy decoding, of all prompts together.

    Args:
        base: the model that the heads draft for.
        heads: as they are trained; a copy of them is deployed.
        prompts: token ids.
        tree: no deeper than the heads guess.
        max_new_tokens: for each prompt.
        batch: how many are decoded together; what is measured does not depend on it.
        dtype: of the heads; None: what `choose_draft_dtype` says.

    Raises:
        RequestError: see `write_own_texts`.
        TreeError: the heads cannot fill the tree.
    """
    return decode(base, deploy(heads, base, dtype), prompts, tree, max_new_tokens, batch).acceptance_length


def compare_acceptance(
    base: BaseModel,
    heads: DraftHeads,
    texts: Sequence[OwnText],
    trees: Sequence[Tree],
    max_new_tokens: int,
    batch: int = 16,
    dtype: torch.dtype | None = None,
) -> list[Comparison]:
    """Predicted and real acceptance length of each tree, on the prompts of `texts`.

    Args:
        base: the model that the heads draft for.
        heads: as they are trained; a copy of them is deployed.
        texts: of `write_own_texts`, with the same `max_new_tokens`.
        trees: no deeper than the heads guess.
        max_new_tokens: for each prompt.
        batch: how many are decoded together.
        dtype: of the heads, for both; None: what `choose_draft_dtype` says.

    Raises:
        TreeError: the heads cannot fill a tree.
    """
    deployed = deploy(heads, base, dtype)
    found = []
    for tree in trees:
        decoded = decode(base, deployed, [text.prompt for text in texts], tree, max_new_tokens, batch)
        found.append(
            Comparison(
                tree=tree.name,
                predicted=predict_acceptance(base, heads, texts, tree, dtype),
                real=decoded.acceptance_length,
                steps=decoded.steps,
                same_texts=sum(mine == own for mine, own in zip(decoded.texts, texts, strict=True)),
                texts=len(texts),
            )
        )
    return found


def deploy(heads: DraftHeads, base: BaseModel, dtype: torch.dtype | None = None) -> DraftHeads:
    """A copy of trained heads that is ready to decode; see `copy_for_deployment`."""
    copied = copy_for_deployment(heads, base, dtype)
    return copied.prepare(base, copied.dtype)


def decode(
    base: BaseModel,
    heads: DraftHeads | None,
    prompts: Sequence[Sequence[int]],
    tree: Tree,
    max_new_tokens: int,
    batch: int = 16,
) -> Decoded:
    """Continue prompts greedily, as the model's own generation config asks; the heads must be prepared.

    Raises:
        RequestError, TreeError: see `measure_acceptance`.
    """
    if not prompts:
        return Decoded(1.0, 0, 0, ())
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    if base.max_length is not None:
        longest = min(longest, base.max_length)
    config = EngineConfig(max_batch=min(batch, len(prompts)), max_length=longest)
    defaults = base.generation_defaults
    requests = [
        Request(
            prompt=tuple(prompt),
            max_new_tokens=max_new_tokens,
            eos_token_ids=base.eos_token_ids,
            sampling=SamplingConfig(repetition_penalty=defaults.repetition_penalty),
            processors=defaults.make_processors(len(prompt), base.eos_token_ids),
        )
        for prompt in prompts
    ]
    outputs = [Output() for _ in requests]
    for _ in Engine(base, heads, tree, config).run(requests, outputs):
        pass
    steps, tokens = sum(output.steps for output in outputs), sum(output.step_tokens for output in outputs)
    texts = [OwnText(request.prompt, tuple(o.token_ids)) for request, o in zip(requests, outputs, strict=True)]
    return Decoded(tokens / steps if steps else 1.0, steps, tokens, tuple(texts))


def find_prompts(examples: Iterable[Example], max_tokens: int) -> Iterator[list[int]]:
    """Prompts in token ids: conversations up to where the assistant begins to write; those too long are left out.

    The first prompt ends before its conversation's first answer, the next before the second of its own, and so on in a
    cycle of four, so that short and long histories both occur.
    """
    taken = 0
    for example in examples:
        mask = example.mask
        begins = [t for t in range(1, len(mask)) if mask[t] and not mask[t - 1]]
        if begins and (end := begins[min(taken % 4, len(begins) - 1)]) <= max_tokens:
            taken += 1
            yield list(example.ids[:end])


def tabulate(accuracy: Sequence[HeadAccuracy], comparisons: Sequence[Comparison]) -> Table:
    """What was measured, as two tables under each other; an empty one is left out."""
    grid = Table.grid()
    if accuracy:
        table = Table(title="right about the base's choice", title_justify="left")
        table.add_column("head", justify="right")
        for count in accuracy[0].top:
            table.add_column(f"top {count}", justify="right")
        for head, measured in enumerate(accuracy):
            table.add_row(str(head), *(f"{share:.1%}" for share in measured.top.values()))
        grid.add_row(table)
    if comparisons:
        table = Table(title="acceptance length, greedy", title_justify="left")
        table.add_column("tree")
        for name in ("predicted", "real", "error", "accepts 1, 2, … or more"):
            table.add_column(name, justify="right")
        for row in comparisons:
            rates = " ".join(f"{rate:.0%}" for rate in row.predicted.rates)
            length = row.predicted.acceptance_length
            table.add_row(row.tree, f"{length:.2f}", f"{row.real:.2f}", f"{row.error:+.1%}", rates)
        grid.add_row(table)
    return grid


def _read_hidden_states(base: BaseModel, batch: Batch) -> Tensor:
    """Final hidden states `[B, T, d]` of a batch, packed or not."""
    layout = layout_packed(batch.segments, batch.positions, base.dtype, base.device)
    return base.read_hidden_states(batch.ids, layout)
