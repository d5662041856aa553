"""A Llama decoder layer and its final norm without the framework around them: the fast path of the prefix layer.

The model class of transformers spends most of a step of a few tokens outside matrix products. This does the same sums
on the same weights; the model class stays the oracle (and the path for every other kind of layer).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hydraspec.base.attention import StepLayout, attend, build_mask
from hydraspec.base.cache import SlotCache


def is_plain_llama(config: Any) -> bool:
    """Whether `run_llama_layer` computes what a model of this config would."""
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type == "llama"
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") == "default"
        and rope.get("partial_rotary_factor", 1.0) == 1.0
    )


def run_llama_layer(decoder: Any, hidden: Tensor, layout: StepLayout, positions: Tensor, cache: SlotCache) -> Tensor:
    """Layer 0 and the norm of a `LlamaModel` on `hidden` `[B, T, d]`, written to and attending over `cache`.

    Returns:
        `[B, T, d]`.
    """
    layer, epsilon = decoder.layers[0], decoder.config.rms_norm_eps
    attention, mlp = layer.self_attn, layer.mlp
    batch, length, width = hidden.shape
    x = F.rms_norm(hidden, (width,), layer.input_layernorm.weight, epsilon)
    query, key, value = (
        project(x).view(batch, length, -1, attention.head_dim).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    angles = positions[:, None, :, None] * decoder.rotary_emb.inv_freq
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)
    key, value = cache.update(_rotate(key, cos, sin), value, 0)
    mask = build_mask(batch, length, layout.view, layout=layout, dtype=hidden.dtype, device=hidden.device)
    mixed, _ = attend(attention, _rotate(query, cos, sin), key, value, mask, attention.scaling)
    hidden = hidden + attention.o_proj(mixed.flatten(2))
    x = F.rms_norm(hidden, (width,), layer.post_attention_layernorm.weight, epsilon)
    hidden = hidden + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    return F.rms_norm(hidden, (width,), decoder.norm.weight, epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (RoFormer, eq. 34): `x cos + rotate(x) sin`; rotate turns halves `[a, b]` into `[-b, a]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
