"""Hydra++ heads: Hydra heads whose context first attends over the hidden states of all verified positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from hydraspec.base.attention import attend_with
from hydraspec.base.cache import LayerShape, SlotCache, count_bytes
from hydraspec.base.facts import find_context, probe_cache_shapes
from hydraspec.base.fused import FusedLlama, fuse
from hydraspec.base.model import BaseModel
from hydraspec.config import HeadsConfig
from hydraspec.errors import UnsupportedModel
from hydraspec.heads.blocks import gather_last
from hydraspec.heads.hydra import HydraHeads
from hydraspec.heads.protocol import DraftHeads, HeadState

# Left out of the stored config of the layer: what says nothing about it.
_NOT_OF_THE_LAYER = ("_name_or_path", "architectures", "dtype", "transformers_version", "id2label", "label2id")


def cut_to_one_layer(config: Any) -> dict[str, Any]:
    """The config of a decoder with one layer of the base's own kind, as plain JSON values."""
    values = config.to_dict()
    kept = {key: value for key, value in values.items() if key not in _NOT_OF_THE_LAYER}
    count = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    layers = kept[count]
    for key, value in kept.items():
        if isinstance(value, list) and len(value) == layers:  # one entry a layer
            kept[key] = ["full_attention"] if "full_attention" in value else value[-1:]
    kept[count] = 1
    return {**kept, "vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


class PrefixLayer(nn.Module):
    """One decoder layer of the base model's kind with a final norm, over hidden states instead of embeddings."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        if not config.prefix_layer:
            raise UnsupportedModel("hydra++ heads need the config of their prefix layer (prefix_layer)")
        values = dict(config.prefix_layer)
        try:
            self.layer_config: PretrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
            self.decoder = AutoModel.from_config(self.layer_config, dtype=torch.float32)
            self.decoder.set_input_embeddings(nn.Identity())  # hidden states come in, never token ids
        except Exception as error:  # of any model's own code
            reason = " ".join(str(error).split())
            raise UnsupportedModel(f"no prefix layer can be made of this config ({reason}); use hydra heads") from error
        self.context = find_context(self.layer_config)
        self.explicit_masks = not type(self.decoder)._can_set_attn_implementation()
        self.fused: FusedLlama | None = None  # a fast path of prepared heads
        self._shapes: tuple[LayerShape | None, ...] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, T, d]` to `[B, T, d]`, causal over right-padded rows."""
        return self.decoder(inputs_embeds=hidden, use_cache=False).last_hidden_state

    def find_shapes(self) -> tuple[LayerShape | None, ...]:
        """The shape of the layer's keys and values."""
        if self._shapes is None:
            parameter = next(self.decoder.parameters())
            probe = torch.zeros(1, 2, self.layer_config.hidden_size, dtype=parameter.dtype, device=parameter.device)
            self._shapes = probe_cache_shapes(
                self.layer_config,
                lambda cache: self.decoder(inputs_embeds=probe, past_key_values=cache, use_cache=True),
                "the prefix layer",
            )
        return self._shapes

    def new_cache(self, batch: int, max_length: int) -> SlotCache:
        """An empty cache of the layer's own."""
        parameter = next(self.decoder.parameters())
        return SlotCache(self.find_shapes(), batch, max_length, parameter.dtype, parameter.device)

    def extend(self, hidden: Tensor, counts: Sequence[int], cache: SlotCache, rows: slice) -> Tensor:
        """Attend from newly verified positions `[B, A, d]` over all earlier ones, and commit them to the cache."""
        layout = cache.layout_chain(hidden.shape[1], rows)
        positions = layout.positions_within(self.context)
        if self.fused is not None:
            out = self.fused.forward(hidden, layout, positions, cache)
        else:
            with attend_with(self.layer_config, layout, self.explicit_masks):
                out = self.decoder(
                    inputs_embeds=hidden, position_ids=positions, past_key_values=cache, use_cache=True
                ).last_hidden_state
        cache.advance(counts, rows)
        return out


class HydraPlusPlusHeads(HydraHeads):
    """Head i sees `[prefix(h_1 … h_t) ; E(x_{t+1}) ; … ; E(x_{t+1+i})]`."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config)
        self.prefix = PrefixLayer(config)

    def prepare(self, base: BaseModel, dtype: torch.dtype | None = None) -> DraftHeads:
        """As for all heads; a layer of Llama's shape gets its fast path."""
        super().prepare(base, dtype)
        self.prefix.fused = fuse(self.prefix.decoder)
        return self

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

    def observe(self, state: HeadState, hidden: Tensor, counts: Sequence[int], rows: slice) -> None:
        """Read newly committed hidden states `[B, A, d]` into the prefix layer's cache, and the contexts."""
        contexts = self.prefix.extend(hidden.to(self.dtype), counts, state.memory, rows)
        state.context[rows] = gather_last(contexts, counts)

    def read_contexts(self, hidden: Tensor) -> Tensor:
        """The prefix layer's output `[B, T, d]`."""
        return self.prefix(hidden)
