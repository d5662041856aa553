"""Hydra heads: each is conditioned on the tokens that the heads before it proposed."""

from __future__ import annotations

from torch import Tensor

from hydraspec.heads.protocol import DraftHeads


class HydraHeads(DraftHeads):
    """Head i sees `[h_t ; E(x_{t+1}) ; … ; E(x_{t+1+i})]`."""

    grounded = True

    def read_contexts(self, hidden: Tensor) -> Tensor:
        """The hidden states themselves."""
        return hidden
