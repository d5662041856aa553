"""Llama's decoder without the framework around it: the fast path of base models and prefix layers of its shape.

A model class of transformers spends most of a step of a few tokens outside matrix products. This does the same sums
with the same weights in fewer and larger products; the model class stays the oracle, and the path for all others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from hydraspec.base.attention import StepLayout, attend, build_mask
from hydraspec.base.cache import LayerShape, SlotCache
from hydraspec.base.packed import BYTES_LIMIT, PackedLinear
from hydraspec.base.quantised import is_plain_linear

# The parts that a decoder must have, and nothing else: another norm or another product is another model.
_DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Rotary factors that change with the length of the text are left to the model class.
_CHANGING = ("dynamic", "longrope")


class FusedNorm:
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last dimension, in half of PyTorch's operations on a CPU."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        self.weight, self.epsilon = weight.detach(), epsilon
        self._dtype = torch.promote_types(weight.dtype, torch.float32)
        self._epsilon = torch.full((1,), epsilon, dtype=self._dtype, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., d]` to `[..., d]`; the weight may be of more dimensions, `[H, d]`."""
        if x.device.type != "cpu":
            return F.rms_norm(x, x.shape[-1:], None, self.epsilon) * self.weight
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self._dtype)
        scale = torch.addcmul(self._epsilon, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).mul_(self.weight).to(x.dtype)


class FusedLayer:
    """One decoder layer: query, key and value products in one, gate and up too, residual sums within products.

    Notation: H query heads and H' key heads of width D.
    """

    def __init__(self, layer: Any, window: int | None) -> None:
        self.attention, mlp = layer.self_attn, layer.mlp
        self.window = window  # tokens that a sliding layer looks back, itself included
        epsilon: float = layer.input_layernorm.variance_epsilon
        self.before_attention = FusedNorm(layer.input_layernorm.weight, epsilon)
        self.before_mlp = FusedNorm(layer.post_attention_layernorm.weight, epsilon)
        self.width: int = self.attention.head_dim
        self.query_heads = len(self.attention.q_proj.weight) // self.width
        self.key_heads = len(self.attention.k_proj.weight) // self.width
        self.turned = self.query_heads + self.key_heads  # heads that positions turn
        self.head_norm: FusedNorm | None = None
        if hasattr(self.attention, "q_norm"):
            weights = [self.attention.q_norm.weight.expand(self.query_heads, -1)]
            weights += [self.attention.k_norm.weight.expand(self.key_heads, -1)]
            self.head_norm = FusedNorm(torch.cat(weights), epsilon)
        self.query_key_value = PackedLinear.stack([getattr(self.attention, f"{name}_proj") for name in "qkv"])
        self.mix = PackedLinear.stack([self.attention.o_proj])
        self.gate_up = PackedLinear.stack([mlp.gate_proj, mlp.up_proj])
        self.down = PackedLinear.stack([mlp.down_proj])
        self.num_bytes = sum(part.num_bytes for part in (self.query_key_value, self.mix, self.gate_up, self.down))

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: SlotCache, index: int
    ) -> Tensor:
        """`[B, T, d]` to `[B, T, d]`; `cos` and `sin` `[B, T, 1, D]` are as `_rotate` wants them."""
        batch, length, _ = hidden.shape
        states = self.query_key_value(self.before_attention(hidden)).view(batch, length, -1, self.width)
        # Queries and keys turn by the same angles, so they turn together.
        turned = states[:, :, : self.turned]
        if self.head_norm is not None:
            turned = self.head_norm(turned)
        turned = _rotate(turned, cos, sin).transpose(1, 2)
        value = states[:, :, self.turned :].transpose(1, 2)
        key, value = cache.update(turned[:, self.query_heads :], value, index)
        query = turned[:, : self.query_heads]
        mixed, _ = attend(self.attention, query, key, value, mask, self.attention.scaling)
        hidden = self.mix(mixed.flatten(2), hidden)
        gate, up = self.gate_up(self.before_mlp(hidden)).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up, hidden)


class FusedLlama:
    """The layers and final norm of a frozen decoder, and its output layer where it has one; for inference only.

    Its weights are copies beside the model's own, which stay as they are; later changes to those are not followed.

    Attributes:
        num_bytes: memory that the copies take.
        output: the output layer, without what a model does to its logits afterwards; None: there is none.
    """

    def __init__(self, decoder: Any, output: nn.Module | None = None) -> None:
        self.layers = [
            FusedLayer(layer, window)
            for layer, window in zip(decoder.layers, _find_windows(decoder.config), strict=True)
        ]
        self.norm = FusedNorm(decoder.norm.weight, decoder.norm.variance_epsilon)
        self.output = None if output is None else PackedLinear.stack([output])
        self.num_bytes = sum(layer.num_bytes for layer in self.layers) + (self.output.num_bytes if self.output else 0)
        self._rotary = decoder.rotary_emb
        self._angles = self.norm.weight.new_empty(0, 0)  # [positions, 2D]

    def forward(self, hidden: Tensor, layout: StepLayout, positions: Tensor, cache: SlotCache) -> Tensor:
        """Run the layers over embeddings, writing to `cache` and attending over it as `layout` says.

        Args:
            hidden: `[B, T, d]`, what the model's own input layer gives.
            layout: the plan that `cache` made for this forward.
            positions: `[B, T]`, none beyond the model's context.
            cache: of the model's layers; written, and not lengthened.

        Returns:
            `[B, T, d]` after the final norm: the output layer's input.
        """
        if len(self._angles) < cache.max_length:
            every = torch.arange(cache.max_length, device=hidden.device)[None]
            self._angles = self._find_angles(hidden, every)[0]
        return self._run(hidden, F.embedding(positions, self._angles), layout, cache)

    def project(self, hidden: Tensor) -> Tensor:
        """The output layer: `[..., d]` to `[..., V]`."""
        assert self.output is not None, "this decoder has no output layer"
        return self.output(hidden)

    def _run(self, hidden: Tensor, angles: Tensor, layout: StepLayout, cache: SlotCache) -> Tensor:
        """`forward`, with the `angles` `[B, T, 2D]` of the tokens' positions."""
        batch, length, _ = hidden.shape
        cos, sin = angles[:, :, None].chunk(2, dim=-1)
        masks: dict[int | None, Tensor | None] = {}
        for index, layer in enumerate(self.layers):
            # No window ends within a view that is shorter than it.
            window = layer.window if layer.window is not None and layer.window < layout.view else None
            if window not in masks:
                rule = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
                masks[window] = build_mask(
                    batch, length, layout.view, rule, layout=layout, dtype=hidden.dtype, device=hidden.device
                )
            hidden = layer.forward(hidden, cos, sin, masks[window], cache, index)
        return self.norm(hidden)

    def _find_angles(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """`[B, T, 2D]`: cosines and sines by the model's own rule, the sines signed as `_rotate` wants them."""
        cos, sin = self._rotary(hidden, positions)
        first, second = sin.chunk(2, dim=-1)
        return torch.cat([cos, -first, second], dim=-1).to(hidden.dtype)

    @torch.no_grad()
    def agrees_with(self, model: Any) -> bool:
        """Whether this computes what `model` does, seen on a few tokens in a row and all over its context."""
        weight, count = self.norm.weight, 16
        embedding = getattr(model.get_input_embeddings(), "weight", None)
        spread = 1.0 if embedding is None else float(embedding.float().std())
        inputs = torch.randn(2, count, len(weight), generator=torch.Generator().manual_seed(0)).to(weight) * spread
        stride = max(int(getattr(model.config, "max_position_embeddings", None) or count) // count, 1)
        positions = torch.arange(count, device=weight.device) * torch.tensor([[1], [stride]], device=weight.device)
        shapes = [LayerShape(layer.key_heads, layer.width, layer.key_heads, layer.width) for layer in self.layers]
        cache = SlotCache(shapes, 2, count, weight.dtype, weight.device)
        found = self._run(inputs, self._find_angles(inputs, positions), cache.layout_chain(count, slice(0, 2)), cache)
        # With a mask given, gaps between positions are not taken for ends of texts.
        every = torch.ones_like(positions)
        out = model(inputs_embeds=inputs, attention_mask=every, position_ids=positions, use_cache=False)
        expected = (out.last_hidden_state if self.output is None else out.logits).float()
        error = (found if self.output is None else self.project(found)).float() - expected
        tolerance = 1e-3 if weight.dtype == torch.float32 else 0.1  # rounding is off by 1e-6 and 0.02 deviations
        return bool(error.square().mean().sqrt() < tolerance * expected.std())


def fuse(model: Any, limit: int = BYTES_LIMIT) -> FusedLlama | None:
    """The fast path of a causal LM or of a bare decoder; None where it would not compute exactly what the model does.

    Args:
        model: a model of transformers, in evaluation mode.
        limit: bytes that the copies of its weights may take.
    """
    decoder = model.base_model
    output = None if decoder is model else model.get_output_embeddings()
    if not _is_plain(decoder) or not (output is None or is_plain_linear(output)):
        return None
    copied = [*decoder.layers.parameters(), *([] if output is None else output.parameters())]
    if sum(parameter.numel() * parameter.itemsize for parameter in copied) > limit:
        return None
    fused = FusedLlama(decoder, output)
    try:
        return fused if fused.agrees_with(model) else None
    except Exception:  # a class of these parts may still ask for other arguments or shapes: it is run as it is
        return None


def _is_plain(decoder: Any) -> bool:
    """Whether a decoder has the parts of a Llama decoder and no others; `agrees_with` sees what they do."""
    if not _has(decoder, _DECODER):
        return False
    config, rotary = decoder.config, decoder.rotary_emb
    norms, linears = [decoder.norm], []
    for layer in decoder.layers:
        if not (_has(layer, _LAYER) and _has(layer.mlp, _MLP)):
            return False
        attention, mlp = layer.self_attn, layer.mlp
        if not (_has(attention, _ATTENTION) or _has(attention, _ATTENTION | _HEAD_NORMS)):
            return False
        if getattr(attention, "head_dim", None) != 2 * len(getattr(rotary, "inv_freq", ())):
            return False
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [getattr(attention, name) for name in _HEAD_NORMS if hasattr(attention, name)]
        linears += [getattr(attention, name) for name in _ATTENTION] + [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    parameters = [*decoder.layers.parameters(), *decoder.norm.parameters()]
    return (
        config.hidden_act == "silu"
        and getattr(rotary, "rope_type", None) not in (None, *_CHANGING)
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
        and all(is_plain_linear(linear) for linear in linears)
        and all([name for name, _ in norm.named_parameters()] == ["weight"] for norm in norms)
        and len({getattr(norm, "variance_epsilon", None) for norm in norms} | {None}) == 2
        and len({(parameter.dtype, parameter.device) for parameter in parameters}) == 1
    )


def _has(module: nn.Module, parts: set[str]) -> bool:
    """Whether a module consists of these parts alone."""
    return {name for name, _ in module.named_children()} == parts and not [*module.parameters(recurse=False)]


def _find_windows(config: Any) -> list[int | None]:
    """For each layer the tokens that it looks back, itself included; None: all."""
    # A class without sliding layers ignores what its config file says of them.
    window = config.sliding_window if hasattr(type(config), "sliding_window") else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (RoFormer, eq. 34): `[a, b] cos + [b, a] sin`, where the first half of `sin` is negative."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
