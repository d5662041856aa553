"""Exact sampling: the path follows the tokens that plain sampling with the same noise would have chosen.

The token at position p of a text is

    argmax over v of log p_base(v | prefix) + g_p(v)

with p_base the base model's distribution after the request's settings, and g_p Gumbel noise fixed by the key (seed,
sequence, p), whatever was drafted. (Computed as the argmax of p_base / E_p, where g_p = -log E_p.) Deterministic
drafts, a head's most likely tokens, then need no rejection and no correction:

1. Given the prefix, the token has exactly the distribution p_base: the Gumbel-max trick, with noise independent of the
   prefix, which is made of the noise of other positions.
2. The draft only decides for which prefixes this forward pass computed p_base, never which token is chosen after one.

So the text is the same for any heads and any tree, the tree of the root alone included: plain decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydraspec.accept.noise import exponential_noise, extend_key
from hydraspec.accept.processing import LogitsProcessing
from hydraspec.tree.topology import Tree
from hydraspec.types import Accepted, Draft, LiveText, Verified


class SampledAcceptance:
    """Samples each token with keyed noise; at temperature 0 takes the argmax of the processed logits.

    Any mix of requests with exact acceptance: greedy ones, with or without settings, and sampled ones. On a CPU the
    walk ends once every sequence has left its tree. Elsewhere nothing waits for the device before the one copy at the
    end, except that a request with processors of its own shows them the tokens walked so far, level by level.

    Args:
        texts: B texts, the rows of every later call. The caller appends what each step emits.
        vocab_size: V.
        device: of the logits.

    Raises:
        RequestError: a logit bias or an allowed token is not a token id of the vocabulary.
    """

    def __init__(self, texts: Sequence[LiveText], vocab_size: int, device: torch.device | str) -> None:
        self.texts = texts
        self.device = torch.device(device)
        self.processing = LogitsProcessing(texts, vocab_size, device)
        self._token_ids = torch.arange(vocab_size, device=device)[None]
        self._on_host = self.device.type == "cpu"
        self._ask_host = any(text.request.processors for text in texts)
        greedy = [text.request.sampling.temperature == 0 for text in texts]
        self._all_greedy = all(greedy)
        self._greedy = torch.tensor(greedy, device=device).view(-1, 1, 1) if any(greedy) else None
        self._keys = []  # of each text, before its positions are mixed in
        for text in texts:
            seed = text.request.sampling.seed
            assert seed is not None or text.request.sampling.temperature == 0, "resolve the seed before decoding"
            self._keys.append(extend_key(extend_key(0, seed or 0), text.request.sequence))
        self._tree: tuple[Tree, Tensor] | None = None

    def choose(self, logits: Tensor) -> Tensor:
        """The token after each text: `[B, V]` to `[B]` int64."""
        assert len(logits) == len(self.texts), f"{len(logits)} rows of logits for {len(self.texts)} texts"
        self.processing.refresh()
        nowhere = torch.empty(len(logits), 1, 0, dtype=torch.int64, device=self.device)
        scores = self.processing.apply(logits[:, None], nowhere)
        return self.choose_keyed(scores, self.draw_noise(self.make_keys(1)))[:, 0]

    def accept(self, draft: Draft, verified: Verified, tree: Tree) -> Accepted:
        """The path of tokens that are chosen one after the other, as long as they are in the tree."""
        tokens, logits = draft.tokens, verified.logits
        assert len(tokens) == len(self.texts), f"{len(tokens)} rows of drafts for {len(self.texts)} texts"
        self.processing.refresh()
        parents = self.find_parents(tree)
        numbers = torch.arange(tree.num_nodes, device=self.device)
        keys = self.make_keys(tree.depth + 1)
        # Kernels are cheap on a GPU but not their launch: there the noise of all levels is drawn at once.
        noise = None if self._on_host else self.draw_noise(keys)
        node, walking = torch.zeros_like(tokens[:, 0]), torch.ones_like(tokens[:, 0], dtype=torch.bool)
        roots, counts = torch.zeros_like(node), torch.zeros_like(node)
        nodes: list[Tensor] = []
        walked = tokens.new_empty(len(tokens), 1, 0)  # [B, 1, level] the tokens chosen so far
        for level in range(tree.depth + 1):
            asked = walking.tolist() if self._ask_host else None
            scores = self.processing.apply(take_rows(logits, node), walked, asked)
            here = slice(level, level + 1)
            drawn = self.draw_noise(keys[:, here]) if self._on_host else noise[:, here] if noise is not None else None
            chosen = self.choose_keyed(scores, drawn)
            nodes.append(node)
            walked = torch.cat([walked, chosen[:, None]], -1)
            counts += walking
            roots = torch.where(walking, chosen[:, 0], roots)
            # Siblings hold different tokens, so at most one child matches; the root, number 0, is nobody's child.
            child = (((parents == node[:, None]) & (tokens == chosen)) * numbers).amax(1)
            walking &= child > 0
            node = torch.where(walking, child, node)
            if self._on_host and not walking.any():
                break
        path = torch.stack(nodes + [node] * (tree.depth + 1 - len(nodes)), 1)
        copied = torch.cat([counts[:, None], walked[:, 0]], 1).tolist()  # the step's one copy to the host
        kept = [row[0] for row in copied]
        emitted = [row[1 : count + 1] for row, count in zip(copied, kept, strict=True)]
        return Accepted(path=path, counts=kept, tokens=emitted, roots=roots)

    def make_keys(self, levels: int) -> Tensor:
        """`[B, levels]` int64: the noise's keys of the next positions of each text."""
        keys = [
            [extend_key(key, len(text.tokens) + level) for level in range(levels)]
            for key, text in zip(self._keys, self.texts, strict=True)
        ]
        return torch.tensor(keys).to(self.device, non_blocking=True)

    def draw_noise(self, keys: Tensor) -> Tensor | None:
        """`[B, L]` keys to `[B, L, V]` exponential noise; None where all texts are greedy."""
        return None if self._all_greedy else exponential_noise(keys.flatten(), self._token_ids).view(*keys.shape, -1)

    def choose_keyed(self, scores: Tensor, noise: Tensor | None) -> Tensor:
        """The sampled or most likely tokens: `[B, L, V]` processed logits and noise to `[B, L]` int64."""
        if noise is None:
            return scores.argmax(-1)
        race = scores.softmax(-1) / noise
        return (race if self._greedy is None else torch.where(self._greedy, scores, race)).argmax(-1)

    def find_parents(self, tree: Tree) -> Tensor:
        """`[N]` int64 on the device, kept while the tree stays the same; the root's is -1."""
        if self._tree is None or self._tree[0] is not tree:
            self._tree = tree, torch.tensor([-1, *tree.parents[1:]], device=self.device)
        return self._tree[1]


def take_rows(logits: Tensor, node: Tensor) -> Tensor:
    """The logits after one node of each sequence: `[B, N, V]` and `[B]` to `[B, 1, V]`."""
    firsts = torch.arange(0, logits.shape[0] * logits.shape[1], logits.shape[1], device=logits.device)
    # index_select copies whole rows; indexing with two tensors starts threads, which other work on a CPU may hold up.
    return logits.flatten(0, 1).index_select(0, firsts + node)[:, None]
