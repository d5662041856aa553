"""Acceptance rules: which drafted path is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydraspec.accept.greedy import AcceptanceRule, GreedyAcceptance
from hydraspec.accept.mixed import MixedAcceptance
from hydraspec.accept.sampling import SampledAcceptance
from hydraspec.accept.typical import TypicalAcceptance
from hydraspec.types import LiveText

if TYPE_CHECKING:
    import torch


def make_rule(texts: Sequence[LiveText], vocab_size: int, device: torch.device | str) -> AcceptanceRule:
    """The rule for these requests together; typical acceptance at temperature 0 is greedy, and therefore exact.

    Args:
        texts: the batch's rows, in order. The rule reads their tokens at each step; their seeds are integers.
        vocab_size: length of a row of logits.
        device: of the logits.

    Raises:
        RequestError: a logit bias or an allowed token is not a token id of the vocabulary.
    """
    typical = [row for row, text in enumerate(texts) if _is_typical(text)]
    exact = [row for row, text in enumerate(texts) if not _is_typical(text)]
    if not typical:
        if all(text.request.sampling.is_plain_greedy and not text.request.processors for text in texts):
            return GreedyAcceptance()
        return SampledAcceptance(texts, vocab_size, device)
    if not exact:
        return TypicalAcceptance(texts, vocab_size, device)
    parts = [(make_rule([texts[row] for row in rows], vocab_size, device), rows) for rows in (exact, typical)]
    return MixedAcceptance(parts, device)


def _is_typical(text: LiveText) -> bool:
    return text.request.sampling.acceptance == "typical" and text.request.sampling.temperature > 0
