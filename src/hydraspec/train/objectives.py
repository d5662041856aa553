"""What heads are trained on: small pure functions, each with its formula."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """`-log softmax(logits)[target]`, mean over rows: `logits` `[R, V]`, `targets` `[R]` int64 (Hydra, section 3)."""
    return F.cross_entropy(logits.float(), targets)


def teacher_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """`-sum_v p_v log softmax(logits)_v`, mean over rows, against the base model's own distribution `p` `[R, V]`.

    Source: Hydra++, "training against the base model's distribution"; temperature 1. Written as
    `logsumexp(logits) - p · logits`, which needs no second `[R, V]` array of log probabilities.
    """
    logits = logits.float()
    return (torch.logsumexp(logits, -1) - torch.linalg.vecdot(teacher, logits)).mean()
