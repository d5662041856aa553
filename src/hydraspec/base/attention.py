"""Tree attention through the public interfaces of transformers: one attention function and one mask function.

A model computes its masks by asking the function registered under its attention implementation's name, and hands
the result to the attention function of the same name. Both are registered here once; `attend_with` names them on a
model's config for the length of one forward and restores what stood there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import AttentionInterface

from hydraspec.errors import UnsupportedModel

IMPLEMENTATION = "hydraspec_tree"


@dataclass(frozen=True)
class StepLayout:
    """Where the tokens of one forward lie in the cache, and what each of them sees.

    Shapes: B sequences, T tokens each, and a view of the first S slots of the cache.
    """

    slots: Tensor  # [B, T] int64: the slot that each token's key and value go to
    positions: Tensor  # [B, T] int64: the token's position in its own text
    view: int  # S: no token of this forward sees a slot beyond it
    # [B or 1, T, S], 0 where a token sees a slot and the dtype's minimum where not, to be added to attention scores, so
    # that no layer has to convert a bool mask anew. None: causal order from an empty cache or, for T = 1, everything.
    bias: Tensor | None
    start: int | None  # the first slot, where it is the same in every sequence
    rows: slice = field(default_factory=lambda: slice(None))  # the B rows of the cache that the sequences lie in
    # Of texts side by side: the row, begin and end of each, in order, where attending to them one by one is faster.
    segments: tuple[tuple[int, int, int], ...] | None = None

    def __post_init__(self) -> None:
        assert self.slots.shape == self.positions.shape
        assert self.bias is None or self.bias.shape[1:] == (self.slots.shape[1], self.view)

    def find_slot_positions(self) -> Tensor:
        """`[B, S]` int64: the position in its text of the token in each slot; committed tokens lie in order."""
        indices = torch.arange(self.view, device=self.slots.device).repeat(len(self.slots), 1)
        return indices.scatter_(1, self.slots, self.positions)

    def positions_within(self, context: int | None) -> Tensor:
        """`positions`, none beyond a model's context.

        Nodes and padding may lie beyond it, but are never kept; learned positions must not be asked for them.
        """
        return self.positions if context is None else self.positions.clamp_max(context - 1)


_layout: ContextVar[StepLayout] = ContextVar("hydraspec_layout")
_explicit: ContextVar[bool] = ContextVar("hydraspec_explicit", default=False)


def layout_packed(segments: Tensor, positions: Tensor, dtype: torch.dtype, device: torch.device) -> StepLayout:
    """The layout of rows in which conversations lie side by side, none of which sees another; without a cache.

    A token sees itself and what stands before it in its own segment. Padding sees the padding before it, so that its
    softmax is a number too.

    Args:
        segments: `[B, T]` int64, which conversation of its row a token belongs to; -1: padding, at the end.
        positions: `[B, T]` int64, within the conversation.
        dtype: of the mask, which is that of the attention scores.
        device: of the layout.
    """
    segments, positions = segments.to(device), positions.to(device)
    batch, width = segments.shape
    slots = torch.arange(width, device=device).expand(batch, width)
    if int(segments.max()) <= 0:
        # One conversation a row: causal order says it all. Padding counts on, lest a window of earlier tokens hold it.
        return StepLayout(slots, slots, width, None, 0)
    seen = (segments[:, :, None] == segments[:, None]) & (slots[0][:, None] >= slots[0])
    bias = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
    # On a GPU one masked product is faster than many small ones.
    parts = _find_segments(segments) if device.type == "cpu" else None
    return StepLayout(slots, positions, width, bias, 0, segments=parts)


def _find_segments(segments: Tensor) -> tuple[tuple[int, int, int], ...]:
    """Row, begin and end of each run of equal numbers in `segments` `[B, T]`."""
    parts = []
    for row, numbers in enumerate(segments):
        ends = numbers.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
        parts += [(row, begin, end) for begin, end in pairwise([0, *ends])]
    return tuple(parts)


@contextmanager
def attend_with(config: Any, layout: StepLayout, explicit: bool) -> Iterator[None]:
    """Let the model that owns `config` attend as `layout` says, inside the block only.

    Args:
        config: the text config that the model's layers read; its attention implementation is set and restored.
        layout: slots, positions and visibility of the forward.
        explicit: always write a mask out, for models that keep their own attention code.
    """
    before = config._attn_implementation_internal
    layout_token, explicit_token = _layout.set(layout), _explicit.set(explicit)
    # The public setter would walk all sub-models at every step; this is the attribute that it ends up writing.
    config._attn_implementation_internal = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        _explicit.reset(explicit_token)
        _layout.reset(layout_token)


def build_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable = causal_mask_function,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    layout: StepLayout | None = None,
    **_: Any,
) -> Tensor | None:
    """The mask of one kind of layer: the model's own rule on positions, and the tree's rule on slots.

    Args:
        batch_size: B.
        q_length: T.
        kv_length: S.
        mask_function: the model's rule, on batch, head, query position and key position.
        dtype: of the mask.
        device: of the mask.
        use_vmap: set by transformers where the rule cannot be evaluated on tensors.
        layout: of the forward; None: the one that `attend_with` set.

    Returns:
        `[B or 1, 1, T, S]` to be added to the scores, or None where plain causal order is all there is to say.
    """
    if use_vmap:
        raise UnsupportedModel("this model overlays masks that cannot be evaluated on a tree's positions")
    explicit = layout is None and _explicit.get()
    layout = layout or _layout.get()
    plain = mask_function is causal_mask_function
    bias = None if layout.bias is None else layout.bias[:, None]
    if plain and (bias is not None or not explicit):
        return bias  # ancestors lie before their descendants, so a tree is in causal order already
    batch = torch.arange(batch_size, device=device)[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    # Sliding windows and chunks are rules on positions in the text, not on slots of the cache.
    positions, slot_positions = layout.positions[:, None, :, None], layout.find_slot_positions()[:, None, None]
    unseen = ~mask_function(batch, head, positions, slot_positions)
    if bias is None:
        bias = torch.zeros(batch_size, 1, q_length, kv_length, dtype=dtype, device=device)
    return bias.masked_fill(unseen, torch.finfo(dtype).min)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` [B, H, T, D] over `key` and `value` [B, Hkv, S, D], with an additive mask [B, 1, T, S].

    Without a mask the tokens are in causal order from the first slot, or (T = 1) see everything.

    Returns:
        `[B, T, H, Dv]`, and None in place of the attention weights.
    """
    if position_bias is not None or indices is not None:
        raise UnsupportedModel(f"{type(module).__name__} biases or selects positions in its attention")
    batch, heads, length, width = query.shape
    group = heads // key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    sinks = sinks if s_aux is None else s_aux
    if softcap is not None or sinks is not None:
        return _attend_explicitly(query, key, value, attention_mask, scale, softcap, sinks, group), None
    segments = _find_own_segments(attention_mask)
    if segments is not None:
        out = _attend_in_segments(query, key, value, segments, scale, group)
    elif group > 1 and attention_mask is not None:
        # The query heads of a group become more rows of one head: keys and values are read once, not repeated.
        rows = query.reshape(batch, heads // group, group * length, width)
        mask = attention_mask.repeat(1, 1, group, 1)
        out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
        out = out.reshape(batch, heads, length, value.shape[-1])
    else:
        causal = attention_mask is None and length > 1
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scale, is_causal=causal, enable_gqa=group > 1
        )
    return out.transpose(1, 2).contiguous(), None


def _find_own_segments(mask: Tensor | None) -> tuple[tuple[int, int, int], ...] | None:
    """The segments of the layout whose own bias `mask` is: then no window or other rule of the model's is in it."""
    if mask is None or torch.compiler.is_compiling():  # a compiler can follow neither the context nor the pointers
        return None
    layout = _layout.get(None)  # fast paths attend without one
    if layout is None or layout.segments is None or layout.bias is None:
        return None
    is_same = mask.data_ptr() == layout.bias.data_ptr() and mask.numel() == layout.bias.numel()
    return layout.segments if is_same else None


def _attend_in_segments(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[tuple[int, int, int], ...], scale: float, group: int
) -> Tensor:
    """Each text by itself in causal order: of four texts in a row, an eighth of all pairs."""
    parts = []
    for row, begin, end in segments:
        q, k, v = (states[row : row + 1, :, begin:end] for states in (query, key, value))
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=group > 1))
    batch, heads, length, _ = query.shape
    return torch.cat(parts, 2).view(heads, batch, length, value.shape[-1]).transpose(0, 1)


def _attend_explicitly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    group: int,
) -> Tensor:
    """Attention whose softmax is written out: soft-capped scores (Gemma 2), attention sinks (GPT-OSS)."""
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    elif scores.shape[-2] > 1:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    if sinks is not None:
        columns = sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = F.softmax(torch.cat([scores, columns], -1), -1)[..., :-1]
    else:
        weights = F.softmax(scores, -1)
    return torch.matmul(weights.to(value.dtype), value).transpose(1, 2).contiguous()


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, build_mask)
