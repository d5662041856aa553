"""Hydra heads: each is conditioned on the tokens that the heads before it proposed."""

from __future__ import annotations

from hydraspec.heads.residual import ResidualHeads


class HydraHeads(ResidualHeads):
    """Head i sees `[h_t ; E(x_{t+1}) ; … ; E(x_{t+1+i})]`."""

    grounded = True
