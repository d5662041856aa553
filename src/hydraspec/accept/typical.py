"""Typical acceptance: longer paths than exact sampling, but NOT the base model's distribution. An opt-in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydraspec.accept.sampling import SampledAcceptance, take_rows
from hydraspec.tree.topology import Tree
from hydraspec.types import Accepted, Draft, LiveText, Verified


class TypicalAcceptance:
    """Accepts a drafted token that the base model finds likely enough, whether or not it would have sampled it.

    A token is accepted if `p > min(epsilon, alpha * exp(-H(p)))`, with p the base model's distribution after the
    request's settings at the token's parent, H its entropy in nats, epsilon `posterior_threshold` and alpha
    `posterior_alpha` (Cai et al.: Medusa, arXiv 2401.10774; Hydra, arXiv 2402.05109). The longest path whose
    every token is accepted wins; among equally long ones the one with the higher sum of log p. The next root is sampled
    after it with the noise of exact sampling, as Medusa's paper says; its code takes the argmax.

    The text depends on the draft, and its distribution is not the base model's. As the temperature goes to 0 it becomes
    greedy decoding. A request's own processors are called for every node of the tree, in no useful order.

    Args:
        texts: B texts with a temperature above 0, the rows of every later call. The caller appends what a step emits.
        vocab_size: V.
        device: of the logits.

    Raises:
        RequestError: a logit bias or an allowed token is not a token id of the vocabulary.
    """

    def __init__(self, texts: Sequence[LiveText], vocab_size: int, device: torch.device | str) -> None:
        self._sampled = SampledAcceptance(texts, vocab_size, device)
        configs = [text.request.sampling for text in texts]
        self._epsilon = torch.tensor([[config.posterior_threshold] for config in configs], device=device)  # [B, 1]
        self._alpha = torch.tensor([[config.posterior_alpha] for config in configs], device=device)

    def choose(self, logits: Tensor) -> Tensor:
        """The token after each text, sampled: `[B, V]` to `[B]` int64."""
        return self._sampled.choose(logits)

    def accept(self, draft: Draft, verified: Verified, tree: Tree) -> Accepted:
        """The longest path of typical tokens, and a root sampled after it."""
        tokens = draft.tokens
        tree = tree.to(tokens.device)
        processing = self._sampled.processing
        processing.refresh()
        scores = processing.apply(verified.logits, _find_contexts(tokens, tree))  # [B, N, V]
        log_p = scores.log_softmax(-1)
        p = log_p.exp()
        bound = torch.minimum(self._epsilon, self._alpha * torch.exp(-torch.special.entr(p).sum(-1)))  # [B, N]

        parents = self._sampled.find_parents(tree).clamp(min=0)
        held = tokens[..., None]  # each node's token, looked up in its parent's distribution
        token_p = p.index_select(1, parents).gather(-1, held)[..., 0]  # [B, N]
        typical = token_p > bound[:, parents]
        typical[:, 0] = True  # the root was chosen before
        kept = (typical[:, None] | ~tree.ancestors).all(-1)  # [B, N]: every node on the path to it

        token_log_p = token_p.log().masked_fill(~typical, 0.0)
        token_log_p[:, 0] = 0.0
        path_log_p = torch.where(tree.ancestors, token_log_p[:, None], 0.0).sum(-1)
        reached = tree.depths.masked_fill(~kept, -1)
        longest = reached == reached.amax(1, keepdim=True)
        last = path_log_p.masked_fill(~longest, -torch.inf).argmax(1)  # [B]

        counts = tree.depths[last] + 1
        keys = self._sampled.make_keys(tree.depth + 1).gather(1, counts[:, None] - 1)
        roots = self._sampled.choose_keyed(take_rows(scores, last), self._sampled.draw_noise(keys))  # [B, 1]
        path = tree.root_to_node[last]
        walked = tokens.gather(1, path[:, 1:])
        copied = torch.cat([counts[:, None], roots, walked], 1).tolist()  # the step's one copy to the host
        return Accepted(
            path=path,
            counts=[count for count, *_ in copied],
            tokens=[[*drafted[: count - 1], root] for count, root, *drafted in copied],
            roots=roots[:, 0],
        )


def _find_contexts(tokens: Tensor, tree: Tree) -> Tensor:
    """`[B, N, depth]`: the drafted tokens on the way from the root to each node, without the root's; -1 pads."""
    steps = torch.arange(1, tree.depth + 1, device=tokens.device)
    return tokens[:, tree.root_to_node[:, 1:]].masked_fill(steps > tree.depths[:, None], -1)
