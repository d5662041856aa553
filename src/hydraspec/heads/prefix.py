"""Hydra++ heads: Hydra heads whose context first attends over the hidden states of all verified positions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hydraspec.base.attention import StepLayout
from hydraspec.base.cache import count_bytes
from hydraspec.base.model import BaseModel
from hydraspec.config import HeadsConfig
from hydraspec.heads.blocks import gather_last
from hydraspec.heads.decoder import HiddenDecoder
from hydraspec.heads.hydra import HydraHeads
from hydraspec.heads.protocol import HeadState


class HydraPlusPlusHeads(HydraHeads):
    """Head i sees `[prefix(h_1 … h_t) ; E(x_{t+1}) ; … ; E(x_{t+1+i})]`, where prefix is one decoder layer."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config)
        self.prefix = HiddenDecoder(config.prefix_layer)

    @classmethod
    def count_decoder_layers(cls, num_layers: int) -> int:
        """One, however many blocks the heads have."""
        return 1

    def _prepare_parts(self, base: BaseModel) -> None:
        super()._prepare_parts(base)
        self.prefix.fuse()

    def new_state(self, batch: int, max_length: int) -> HeadState:
        """As for all heads, with an empty cache of the prefix layer."""
        state = super().new_state(batch, max_length)
        state.memory = self.prefix.new_cache(batch, self._count_slots(max_length))
        return state

    def count_bytes(self, max_length: int) -> int:
        """Those of the prefix layer's keys and values."""
        return self._count_slots(max_length) * count_bytes(self.prefix.find_shapes(), self.dtype)

    def _count_slots(self, max_length: int) -> int:
        # An extension is padded to the longest in the batch, so it may write past the last committed slot.
        return max_length + self.num_heads + 1

    def observe(self, state: HeadState, hidden: Tensor, tokens: Tensor, counts: Sequence[int], rows: slice) -> None:
        """Read newly committed hidden states `[B, A, d]` into the prefix layer's cache, and the contexts."""
        contexts = self.prefix.extend(hidden.to(self.dtype), counts, state.memory, rows)
        state.context[rows] = gather_last(contexts, counts)

    def read_contexts(self, hidden: Tensor, layout: StepLayout | None = None) -> Tensor:
        """The prefix layer's output `[B, T, d]`."""
        return self.prefix(hidden, layout)
