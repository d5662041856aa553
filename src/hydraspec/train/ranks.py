"""The acceptance length that a tree would reach, from one forward pass over texts that the base model wrote itself.

Greedy decoding accepts the path that the base model's own text takes through the tree. So where each head ranks the
next tokens of that text says what every step would accept, for any tree, without decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hydraspec.base.model import BaseModel
from hydraspec.errors import TreeError
from hydraspec.heads import build_heads
from hydraspec.heads.protocol import DraftHeads, choose_draft_dtype
from hydraspec.train.batch import Batch, Place
from hydraspec.tree import Tree

WIDTH = 32  # of the ranks, where no tree says how many are needed
NOT_FOUND = -1  # in place of a rank: beyond the width, not in the draft vocabulary, or after the text's end
_LOGITS_AT_ONCE = 1 << 22  # elements


@dataclass(frozen=True)
class OwnText:
    """A prompt and how the base model continues it, greedily."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]  # up to its end, or to where it was cut


@dataclass(frozen=True)
class Prediction:
    """What greedy decoding with a tree would reach; the figures are those of `Output`, of all texts together."""

    acceptance_length: float  # tokens emitted per verification step
    everywhere: float  # the same if a step began at every token, not only where the step before it ends
    rates: tuple[float, ...]  # share of the steps that accept at least 1, 2, … tokens, of those with text left for it
    steps: int
    tokens: int  # emitted by the steps


@dataclass(frozen=True)
class Ranks:
    """Where the heads rank the true next tokens, at every place where a step could begin.

    A row is a root: text by text, each token of the continuations. Head i guesses the token i + 1 places after it.
    """

    ranks: Tensor  # [N, K] int64, from 0; NOT_FOUND
    lengths: tuple[int, ...]  # tokens of each continuation; their sum is N
    widths: tuple[int, ...]  # [K]: ranks of head i are known below this

    def __post_init__(self) -> None:
        assert self.ranks.shape == (sum(self.lengths), len(self.widths))

    def find_accepted(self, tree: Tree) -> Tensor:
        """How many tokens a step from each root accepts, `[N]` int64: edges of the longest path that is in the tree.

        What lies after the end of a text is not accepted; the end cuts those tokens in decoding as well.

        Raises:
            TreeError: the tree is deeper than the heads guess, or wider than the known ranks.
        """
        self._check(tree)
        dead, width = tree.num_nodes, max((stage.width for stage in tree.expansion), default=0)
        # The child of each node by rank, or the dead node, whose children are dead; the last column is for no rank.
        child = torch.full((tree.num_nodes + 1, width + 1), dead)
        for parent, children in enumerate(tree.children):
            child[parent, : len(children)] = torch.tensor(children, dtype=torch.long)
        node = torch.zeros(len(self.ranks), dtype=torch.long)
        accepted = torch.zeros_like(node)
        for depth in range(tree.depth):
            rank = self.ranks[:, depth]
            node = child[node, torch.where((rank < 0) | (rank >= width), width, rank)]
            accepted += node != dead
        return accepted

    def walk(self, tree: Tree) -> Prediction:
        """Go through every text as decoding with this tree does: from the first token, 1 + accepted tokens a step.

        Raises:
            TreeError: see `find_accepted`.
        """
        accepted = self.find_accepted(tree)
        jumps, roots, tokens, start = (accepted + 1).tolist(), [], 0, 0
        for length in self.lengths:
            root, last = start, start + length - 1
            while root < last:  # the last token ends the text: no step begins there
                roots.append(root)
                root += jumps[root]
            tokens += max(length - 1, 0)  # the prompt's forward emits the first
            start += length
        left = torch.tensor([rest for length in self.lengths for rest in range(length - 1, -1, -1)], dtype=torch.long)
        chosen = torch.tensor(roots, dtype=torch.long)
        return Prediction(
            acceptance_length=tokens / len(roots) if roots else 1.0,
            everywhere=1.0 + sum(_find_rates(accepted, left, tree.depth)),
            rates=_find_rates(accepted[chosen], left[chosen], tree.depth),
            steps=len(roots),
            tokens=tokens,
        )

    def _check(self, tree: Tree) -> None:
        if tree.depth > len(self.widths):
            raise TreeError(
                f"tree {tree.name} is {tree.depth} deep, but the heads guess {len(self.widths)} tokens ahead: choose a "
                f"tree no deeper than {len(self.widths)}"
            )
        for head, (stage, width) in enumerate(zip(tree.expansion, self.widths, strict=False)):
            if stage.width > width:
                raise TreeError(
                    f"tree {tree.name} asks for {stage.width} tokens of head {head}, but only {width} were ranked: "
                    "rank more, or choose a narrower tree"
                )


def _find_rates(accepted: Tensor, left: Tensor, depth: int) -> tuple[float, ...]:
    """Share of the roots that accept at least j tokens, of those whose text goes on for j tokens; for j = 1 … depth."""
    rates = []
    for count in range(1, depth + 1):
        known = left >= count
        rates.append(float((accepted[known] >= count).float().mean()) if bool(known.any()) else 0.0)
    return tuple(rates)


@torch.no_grad()
def find_ranks(
    base: BaseModel,
    heads: DraftHeads,
    texts: Sequence[OwnText],
    widths: int | Sequence[int] = WIDTH,
    batch_tokens: int = 4096,
    dtype: torch.dtype | None = None,
) -> Ranks:
    """Read texts once, and find where each head ranks the true next tokens.

    Args:
        base: the model that wrote the texts.
        heads: as they are trained; a copy is read.
        texts: prompts and their continuations.
        widths: how many of a head's most likely tokens are looked through, for all or for each; 0 leaves a head out.
        batch_tokens: tokens of one forward pass at most, padding included, unless one text is longer.
        dtype: of the heads; None: the one in which they would be deployed, so that it predicts what decoding meets.
    """
    count = heads.num_heads
    asked = [widths] * count if isinstance(widths, int) else list(widths)
    proposed = heads.config.draft_vocabulary or base.vocab_size
    asked = [min(width, proposed) for width in asked]
    heads = copy_for_deployment(heads, base, dtype)
    lengths = tuple(len(text.tokens) for text in texts)
    starts = torch.tensor([0, *lengths], dtype=torch.long).cumsum(0)[:-1]
    ranks = torch.full((sum(lengths), count), NOT_FOUND)
    for numbers in _group(texts, batch_tokens):
        batch = make_batch([texts[number] for number in numbers])
        anchors = [batch.find_anchors(head) for head in range(count)]
        on_device = [rows.to(base.device) for rows in anchors]
        ids = batch.ids.to(base.device)
        hidden = base.read_hidden_states(ids).to(heads.dtype)
        states = heads.draft_states(hidden, base.embed(ids).to(heads.dtype), on_device, None)
        # The row of `ranks` that the anchor at the beginning of each row of the batch would have.
        origins = starts[numbers] + 1 - torch.tensor([len(texts[number].prompt) for number in numbers])
        for head, width in enumerate(asked):
            if width:
                targets = ids.flatten()[on_device[head] + 2 + head]
                found = rank_targets(base, heads, head, states[head], targets, width)
                row, place = anchors[head] // ids.shape[1], anchors[head] % ids.shape[1]
                ranks[origins[row] + place, head] = found.cpu()
    return Ranks(ranks, lengths, tuple(asked))


def rank_targets(
    base: BaseModel,
    heads: DraftHeads,
    head: int,
    states: Tensor,
    targets: Tensor,
    width: int,
    piece: int | None = None,
) -> Tensor:
    """Where a head ranks given tokens: `[R]` int64, NOT_FOUND beyond its `width` most likely tokens.

    Equal logits are ordered as drafting orders them, which takes a `topk` too.

    Args:
        base: for its vocabulary layer, where the heads have none.
        heads: for `vocabulary_weight` and the names of their tokens.
        head: which head, from 0.
        states: `[R, d]`, what enters the head's vocabulary layer.
        targets: `[R]` int64 token ids.
        width: at most the tokens that the heads propose.
        piece: rows whose logits are made at once; None: by the size of the vocabulary.
    """
    weight, bias = heads.vocabulary_weight(head, base)
    weight = weight.to(states.dtype)
    bias = None if bias is None else bias.to(states.dtype)
    found = [torch.zeros(0, dtype=torch.long, device=states.device)]
    size = piece or max(1, _LOGITS_AT_ONCE // len(weight))
    for rows, wanted in zip(states.split(size), targets.split(size), strict=True):
        best = torch.nn.functional.linear(rows, weight, bias).topk(width).indices
        hits = heads.name_tokens(best) == wanted[:, None]
        found.append(torch.where(hits.any(1), hits.long().argmax(1), NOT_FOUND))
    return torch.cat(found)


def make_batch(texts: Sequence[OwnText]) -> Batch:
    """A text a row, right-padded, with the mask on the continuations: the anchors are the roots' predecessors."""
    width = max(len(text.prompt) + len(text.tokens) for text in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros(len(texts), width, dtype=torch.bool)
    segments, positions = torch.full_like(ids, -1), torch.zeros_like(ids)
    places = []
    for row, text in enumerate(texts):
        length = len(text.prompt) + len(text.tokens)
        ids[row, :length] = torch.tensor([*text.prompt, *text.tokens])
        mask[row, len(text.prompt) : length] = True
        segments[row, :length] = 0
        positions[row, :length] = torch.arange(length)
        places.append(Place(row, 0, length, row))
    return Batch(ids, mask, segments, positions, tuple(places))


def copy_for_deployment(heads: DraftHeads, base: BaseModel, dtype: torch.dtype | None = None) -> DraftHeads:
    """A copy on the base model's device, in evaluation mode and in the dtype of drafts; not prepared.

    Training goes on with the heads that it was made of.

    Args:
        heads: trained ones.
        base: the model that they draft for.
        dtype: of their weights; None: what `choose_draft_dtype` says.
    """
    copied, tensors = build_heads(heads.config), heads.state_dict()
    copied.load_state_dict({name: tensors[name] for name in copied.state_dict()})  # prepared heads may hold more
    for parameter in copied.parameters():  # not the buffers: see `DraftHeads.prepare`
        parameter.data = parameter.data.to(dtype or choose_draft_dtype(base))
    return copied.to(base.device).eval().requires_grad_(False)


def _group(texts: Sequence[OwnText], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of texts of like length, as many as fit a forward pass; those without an anchor are left out."""
    sizes = {n: len(text.prompt) + len(text.tokens) for n, text in enumerate(texts) if len(text.tokens) > 1}
    group: list[int] = []
    for number in sorted(sizes, key=lambda n: sizes[n]):
        if group and (len(group) + 1) * sizes[number] > batch_tokens:
            yield group
            group = []
        group.append(number)
    if group:
        yield group
