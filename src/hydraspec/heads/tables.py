"""The first layer of grounded heads on a CPU: what a token adds to it is looked up instead of computed.

A head's first block is linear in `[h_t ; E(x_{t+1}) ; … ]` before its activation, and the embeddings are frozen. So
what each token adds at each place of the path can be computed once for the whole vocabulary. That trades memory
(K (K + 1) / 2 tables of V x 2d) for reading the weights of the widest layers at every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hydraspec.base.model import BaseModel
from hydraspec.heads.blocks import HeadBlocks

BYTES_LIMIT = 128 << 20  # tables beyond this cost more memory than they are worth


class TokenTables:
    """Tables of the first blocks of grounded heads, for frozen weights."""

    def __init__(self, blocks: Sequence[HeadBlocks], base: BaseModel) -> None:
        d = base.hidden_size
        embeddings = base.embed(torch.arange(base.vocab_size, device=base.device))
        weights, biases = [], []
        self.tables: list[Tensor] = []
        for head, block in enumerate(blocks):
            residual, linear = block.first.residual, block.first.linear
            weight = torch.cat([residual.get_parameter("weight"), linear.weight])  # [2d, (head + 2) d]
            weights.append(weight[:, :d])
            biases.append(torch.cat([residual.get_parameter("bias"), linear.bias]))
            places = [embeddings @ weight[:, d * place : d * (place + 1)].t() for place in range(1, head + 2)]
            self.tables.append(torch.cat(places))  # [(head + 1) V, 2d]
        self.context_weight = torch.cat(weights).t().contiguous().t()
        self.context_bias = torch.cat(biases)
        self.offsets = torch.arange(len(blocks), device=base.device) * base.vocab_size

    @staticmethod
    def fit(base: BaseModel, num_heads: int) -> bool:
        """Whether the tables are for this device, and small enough."""
        count = num_heads * (num_heads + 1) // 2
        size = count * base.vocab_size * 2 * base.hidden_size * base.dtype.itemsize
        return base.device.type == "cpu" and size <= BYTES_LIMIT

    def read_context(self, context: Tensor) -> Tensor:
        """What the context adds: `[B, d]` to `[B, K, 2d]`, biases included."""
        return F.linear(context, self.context_weight, self.context_bias).view(len(context), len(self.tables), -1)

    def first_block(self, head: int, read: Tensor, path: Tensor) -> Tensor:
        """The first block's output `[B, P, d]` from `read_context`'s result and the path's tokens `[B, P, head+1]`."""
        batch, nodes, length = path.shape
        rows = (path + self.offsets[:length]).view(-1, length)
        added = F.embedding_bag(rows, self.tables[head], mode="sum").view(batch, nodes, -1)
        residual, gate = (added + read[:, head, None]).chunk(2, dim=-1)
        return residual + F.silu(gate)
