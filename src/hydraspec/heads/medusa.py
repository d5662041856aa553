"""Medusa heads: each guesses from h_t alone, whatever the heads before it proposed. The baseline."""

from __future__ import annotations

from hydraspec.heads.residual import ResidualHeads


class MedusaHeads(ResidualHeads):
    """Head i sees `h_t`."""

    grounded = False
