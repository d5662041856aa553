"""The first layer of grounded heads on a CPU: what a token adds to it is looked up instead of computed.

A head's first block is linear in `[h_t ; E(x_{t+1}) ; … ]` before its activation, and the embeddings are frozen. So
what each token adds at each place of the path can be computed once for the whole vocabulary. That trades memory
(K (K + 1) / 2 tables of V x 2d) for reading the weights of the widest layers at every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydraspec.base.model import BaseModel
from hydraspec.base.packed import PackedLinear
from hydraspec.heads.blocks import HeadBlocks, add_gate

BYTES_LIMIT = 128 << 20  # tables beyond this cost more memory than they are worth


class TokenTables:
    """The blocks of grounded heads of frozen weights, with tables for the first block of each."""

    def __init__(self, blocks: Sequence[HeadBlocks], base: BaseModel) -> None:
        d, dtype = base.hidden_size, blocks[0].first.linear.weight.dtype
        embeddings = base.embed(torch.arange(base.vocab_size, device=base.device)).to(dtype)
        weights, biases = [], []
        self.tables: list[Tensor] = []
        for head, block in enumerate(blocks):
            residual, linear = block.first.residual, block.first.linear
            weight = torch.cat([residual.get_parameter("weight"), linear.weight])  # [2d, (head + 2) d]
            weights.append(weight[:, :d])
            biases.append(torch.cat([residual.get_parameter("bias"), linear.bias]))
            places = [embeddings @ weight[:, d * place : d * (place + 1)].t() for place in range(1, head + 2)]
            self.tables.append(torch.cat(places))  # [(head + 1) V, 2d]
        self.context_product = PackedLinear(torch.cat(weights), torch.cat(biases))
        self.offsets = [torch.arange(head + 1, device=base.device) * base.vocab_size for head in range(len(blocks))]
        self.blocks = list(blocks)

    @staticmethod
    def fit(base: BaseModel, num_heads: int, dtype: torch.dtype) -> bool:
        """Whether the tables are for this device, and small enough in the dtype of the heads."""
        count = num_heads * (num_heads + 1) // 2
        size = count * base.vocab_size * 2 * base.hidden_size * dtype.itemsize
        return base.device.type == "cpu" and size <= BYTES_LIMIT

    def read_context(self, context: Tensor) -> Tensor:
        """What the context adds: `[B, d]` to `[B, K, 2d]`, biases included."""
        return self.context_product(context).view(len(context), len(self.tables), -1)

    def run(self, head: int, read: Tensor, path: Tensor) -> Tensor:
        """A head's blocks: `[B, P, d]` from `read_context`'s result and the path's tokens `[B, P, head + 1]`."""
        batch, nodes, length = path.shape
        rows = (path + self.offsets[head]).flatten()
        starts = torch.arange(0, len(rows), length, device=rows.device)
        added = torch.embedding_bag(self.tables[head], rows, starts)[0].view(batch, nodes, -1)  # sums, as given
        return self.blocks[head].finish(add_gate(added.add_(read[:, head, None])))
