"""The parts that heads are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydraspec.base.cache import send
from hydraspec.base.packed import PackedLinear
from hydraspec.config import HeadsConfig


class ResBlock(nn.Module):
    """`R(x) + SiLU(W x + b)` (Hydra, section 3): W starts at zero, so that a fresh block passes its input on.

    R is the identity where input and output are of one width, else a linear layer.
    """

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width)
        self.residual = nn.Identity() if width_in == width else nn.Linear(width_in, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width_in]` to `[..., width]`."""
        return self.residual(x) + F.silu(self.linear(x))


class HeadBlocks(nn.Module):
    """The residual blocks of one head: the first reads `width_in`, the others d; with dropout before each.

    With `shared_blocks` the blocks after the first are one block, applied several times.
    """

    def __init__(self, width_in: int, config: HeadsConfig) -> None:
        super().__init__()
        self.first = ResBlock(width_in, config.hidden_size)
        own = min(config.num_layers - 1, 1) if config.shared_blocks else config.num_layers - 1
        self.rest = nn.ModuleList(ResBlock(config.hidden_size, config.hidden_size) for _ in range(own))
        self.times = config.num_layers - 1 if config.shared_blocks else 1
        self.dropout = config.dropout
        # The products of frozen blocks, packed for a CPU: of the first block, and of those that follow, in order.
        self._first: PackedLinear | None = None
        self._rest: list[PackedLinear] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width_in]` to `[..., d]`."""
        if self._first is None:
            return self.finish(self.first(self._drop(x)))
        if isinstance(self.first.residual, nn.Identity):
            return self.finish(self._first.silu(x).add_(x))
        return self.finish(add_gate(self._first(x)))

    def finish(self, x: Tensor) -> Tensor:
        """What follows the first block: `[..., d]` to `[..., d]`."""
        if self._rest is not None:
            for product in self._rest:
                x = product.silu(x).add_(x)
            return x
        for _ in range(self.times):
            for block in self.rest:
                x = block(self._drop(x))
        return self._drop(x)

    def pack(self, first: bool) -> None:
        """Pack the products of frozen blocks for a CPU, with or without the first block's."""
        self._rest = [PackedLinear.stack([block.get_submodule("linear")]) for block in self.rest] * self.times
        if first:
            residual, linear = self.first.residual, self.first.linear
            self._first = PackedLinear.stack([linear] if isinstance(residual, nn.Identity) else [residual, linear])

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def add_gate(products: Tensor) -> Tensor:
    """`R(x) + SiLU(W x + b)` `[..., d]` from both products `[..., 2d]`."""
    residual, gate = products.chunk(2, dim=-1)
    return F.silu(gate).add_(residual)


def gather_last(hidden: Tensor, counts: Sequence[int]) -> Tensor:
    """Of right-padded `[B, T, d]` the last real position of each row, `[B, d]`."""
    if len(counts) == 1:
        return hidden[:, counts[0] - 1]
    rows = torch.arange(len(counts), device=hidden.device)
    return hidden[rows, send(counts, hidden.device) - 1]
