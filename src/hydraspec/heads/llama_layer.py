"""A Llama decoder layer and its final norm without the framework around them: the fast path of the prefix layer.

The model class of transformers spends most of a step of a few tokens outside matrix products. This does the same sums
with the same weights in fewer and larger products; the model class stays the oracle, and the path for other layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hydraspec.base.attention import StepLayout, attend, build_mask
from hydraspec.base.cache import SlotCache


def is_plain_llama(config: Any) -> bool:
    """Whether `FusedLlamaLayer` computes what a model of this config would."""
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type == "llama"
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") == "default"
        and rope.get("partial_rotary_factor", 1.0) == 1.0
    )


class FusedLlamaLayer:
    """Layer 0 and the norm of a frozen `LlamaModel`, with its query, key and value products in one, gate and up too."""

    def __init__(self, decoder: Any) -> None:
        layer = decoder.layers[0]
        self.attention, self.epsilon = layer.self_attn, decoder.config.rms_norm_eps
        self.norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight, decoder.norm.weight)
        self.inverse_frequencies = decoder.rotary_emb.inv_freq
        self.query_key_value = _stack([self.attention.q_proj, self.attention.k_proj, self.attention.v_proj])
        self.gate_up = _stack([layer.mlp.gate_proj, layer.mlp.up_proj])
        self.down = layer.mlp.down_proj
        width = self.attention.head_dim
        self.heads = [len(p.weight) // width for p in (self.attention.q_proj, self.attention.k_proj)]

    def extend(self, hidden: Tensor, layout: StepLayout, positions: Tensor, cache: SlotCache) -> Tensor:
        """`[B, T, d]` to `[B, T, d]`, written to and attending over `cache` as `layout` says."""
        batch, length, _ = hidden.shape
        x = self._norm(hidden, 0)
        states = F.linear(x, *self.query_key_value).view(batch, length, -1, self.attention.head_dim).transpose(1, 2)
        # Queries and keys turn by the same angles, so they turn together.
        angles = positions[:, None, :, None] * self.inverse_frequencies
        angles = torch.cat([angles, angles], dim=-1)
        turned = _rotate(states[:, : sum(self.heads)], angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype))
        key, value = cache.update(turned[:, self.heads[0] :], states[:, sum(self.heads) :], 0)
        mask = build_mask(batch, length, layout.view, layout=layout, dtype=hidden.dtype, device=hidden.device)
        query = turned[:, : self.heads[0]]
        mixed, _ = attend(self.attention, query, key, value, mask, self.attention.scaling)
        hidden = hidden + self.attention.o_proj(mixed.flatten(2))
        gate, up = F.linear(self._norm(hidden, 1), *self.gate_up).chunk(2, dim=-1)
        return self._norm(hidden + self.down(F.silu(gate) * up), 2)

    def _norm(self, x: Tensor, which: int) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.norms[which], self.epsilon)


def _stack(layers: list[Any]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of linear layers on top of each other, stored as the layers store theirs."""
    weight = torch.cat([layer.weight for layer in layers])
    if layers[0].weight.stride(0) == 1:
        weight = weight.t().contiguous().t()
    return weight, None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (RoFormer, eq. 34): `x cos + rotate(x) sin`; rotate turns halves `[a, b]` into `[-b, a]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
