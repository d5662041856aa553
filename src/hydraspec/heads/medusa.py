"""Medusa heads: each guesses from h_t alone, whatever the heads before it proposed. The baseline."""

from __future__ import annotations

from torch import Tensor

from hydraspec.heads.protocol import DraftHeads


class MedusaHeads(DraftHeads):
    """Head i sees `h_t`."""

    grounded = False

    def read_contexts(self, hidden: Tensor) -> Tensor:
        """The hidden states themselves."""
        return hidden
