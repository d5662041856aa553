"""What heads are trained on: small pure functions, each with its formula; every one is a mean over rows.

Notation: z logits `[R, V]` of a head, q = softmax(z), p `[R, V]` the base's own distribution before the same token.
These are the readable definitions; `vocabulary_loss.py` computes the same sums and their gradients piece by piece.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Mix:
    """Weights of the objectives that read logits."""

    data: float = 0.0
    teacher: float = 0.0
    kl: float = 0.0
    reverse_kl: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        """Whether any of them reads the base model's distribution."""
        return bool(self.teacher or self.kl or self.reverse_kl)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """`-log q[target]`: `targets` `[R]` int64; rows whose target is negative count as 0 (Hydra, section 3)."""
    losses = F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="none")
    return losses.mean()


def teacher_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """`-sum_v p_v log q_v` against the base model's own distribution at temperature 1 (Hydra++, section 4)."""
    return -(teacher * torch.log_softmax(logits.float(), -1)).sum(-1).mean()


def forward_kl(logits: Tensor, teacher: Tensor) -> Tensor:
    """`KL(p || q) = sum_v p_v (log p_v - log q_v)`: teacher cross-entropy less p's entropy (Hinton et al., 2015)."""
    return teacher_cross_entropy(logits, teacher) + torch.xlogy(teacher, teacher).sum(-1).mean()


def reverse_kl(logits: Tensor, teacher: Tensor) -> Tensor:
    """`KL(q || p) = sum_v q_v (log q_v - log p_v)`: punishes guesses that the base would not make (MiniLLM, eq. 2).

    Probabilities of the base below the smallest normal float32 count as that.
    """
    log_q = torch.log_softmax(logits.float(), -1)
    log_p = teacher.clamp_min(torch.finfo(torch.float32).tiny).log()
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def reconstruction(states: Tensor, hidden: Tensor) -> Tensor:
    """SmoothL1 between a head's hidden states and the base's true ones, both `[R, d]` (EAGLE, eq. 1; beta 1)."""
    return F.smooth_l1_loss(states.float(), hidden.float())


def mix_objectives(logits: Tensor, targets: Tensor, teacher: Tensor | None, mix: Mix) -> Tensor:
    """The weighted sum of the objectives that read logits."""
    total = logits.new_zeros((), dtype=torch.float32)
    if mix.data:
        total = total + mix.data * cross_entropy(logits, targets)
    if teacher is not None:
        if mix.teacher:
            total = total + mix.teacher * teacher_cross_entropy(logits, teacher)
        if mix.kl:
            total = total + mix.kl * forward_kl(logits, teacher)
        if mix.reverse_kl:
            total = total + mix.reverse_kl * reverse_kl(logits, teacher)
    return total


def draw_noise(like: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """Uniform noise `U(-1, 1) alpha / sqrt(L d)` (NEFTune, section 2) in the shape of `like` `[B, T, d]`.

    Args:
        like: what it will be added to.
        lengths: `[B, T]`, for each token the length L of its conversation.
        alpha: how much of it.
    """
    size = alpha / (lengths.clamp_min(1) * like.shape[-1]).sqrt()
    return torch.empty_like(like).uniform_(-1, 1) * size[..., None].to(like.dtype)


def weigh_heads(num_heads: int, weights: tuple[float, ...] = (), decay: float = 1.0) -> list[float]:
    """The weight of each head's loss: the given ones (1 where there are none) times `decay` to the head's number."""
    return [(weights[head] if weights else 1.0) * math.pow(decay, head) for head in range(num_heads)]
