"""Decoder layers over hidden states instead of embeddings: what prefix attention and the EAGLE head are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from hydraspec.base.attention import StepLayout, attend_with
from hydraspec.base.cache import LayerShape, SlotCache
from hydraspec.base.facts import find_context, probe_cache_shapes
from hydraspec.base.fused import FusedLlama, fuse
from hydraspec.base.model import BaseModel
from hydraspec.errors import HydraspecError, UnsupportedModel

# Left out of the stored config of the layers: what says nothing about them.
_NOT_OF_THE_LAYERS = ("_name_or_path", "architectures", "dtype", "transformers_version", "id2label", "label2id")
_HEAD_WIDTH = 64  # of plain layers, where it divides the hidden size


def describe_layers(base: BaseModel, count: int, choice: str = "base", window: int = 0) -> dict[str, Any]:
    """The transformers config of a decoder over the base model's hidden states, as plain JSON values.

    Args:
        base: whose hidden size and context it shall have.
        count: layers.
        choice: `base`, layers of the base model's own kind, or `plain`, Llama-shaped ones whatever the base is.
        window: tokens that each layer looks back, itself included; 0: all, or what layers of that kind do.

    Raises:
        HydraspecError: there is no such choice, or layers of the base's kind have no window.
    """
    if choice not in ("base", "plain"):
        raise HydraspecError(f"prefix_layer must be base or plain, not {choice!r}")
    if window < 0:
        raise HydraspecError(f"prefix_window must be 0 (no window) or the tokens to look back, not {window}")
    if choice == "plain":
        return _describe_plain_layers(base, count, window)
    values = cut_to_layers(base.config, count)
    if not window:
        return values
    if not hasattr(type(base.config), "sliding_window"):
        raise HydraspecError(
            f"decoder layers of {base.config.model_type} have no sliding window: choose prefix_layer plain"
        )
    values["sliding_window"] = window
    if values.get("layer_types"):
        values["layer_types"] = ["sliding_attention"] * count
    if "use_sliding_window" in values:
        values.update(use_sliding_window=True, max_window_layers=0)
    return values


def cut_to_layers(config: Any, count: int) -> dict[str, Any]:
    """The config of a decoder with `count` layers of the base's own kind, of full attention where it has such."""
    kept = {key: value for key, value in config.to_dict().items() if key not in _NOT_OF_THE_LAYERS}
    depth = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    layers = kept[depth]
    for key, value in kept.items():
        if isinstance(value, list) and len(value) == layers:  # one entry a layer
            kept[key] = (["full_attention"] if "full_attention" in value else value[-1:]) * count
    kept[depth] = count
    return {**kept, "vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def _describe_plain_layers(base: BaseModel, count: int, window: int) -> dict[str, Any]:
    """Llama's layer; Mistral's class is the same with a window. The inner width is 8/3 d, as Llama's."""
    d = base.hidden_size
    width = next((w for w in range(min(_HEAD_WIDTH, d), 1, -1) if d % w == 0 and w % 2 == 0), None)
    if width is None:
        raise HydraspecError(f"plain layers need an even hidden size, not {d}: choose prefix_layer base")
    values = {
        "model_type": "mistral",
        "hidden_size": d,
        "intermediate_size": -(-8 * d // 3 // 64) * 64,
        "num_hidden_layers": count,
        "num_attention_heads": d // width,
        "num_key_value_heads": d // width,
        "head_dim": width,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_window": window or None,
        "vocab_size": 1,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return values if base.max_length is None else {**values, "max_position_embeddings": base.max_length}


class HiddenDecoder(nn.Module):
    """Decoder layers and a final norm, which hidden states enter; with a cache of its own while decoding.

    Args:
        config: the transformers config of the layers, see `describe_layers`.
        outer_norms: False: neither the norm before the first layer nor the final one, as in the published EAGLE-1.

    Raises:
        UnsupportedModel: no such layers can be made.
    """

    def __init__(self, config: dict[str, Any] | None, outer_norms: bool = True) -> None:
        super().__init__()
        if not config:
            raise UnsupportedModel("these heads need the config of their decoder layers (prefix_layer)")
        values = dict(config)
        try:
            self.layer_config: PretrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
            self.decoder = AutoModel.from_config(self.layer_config, dtype=torch.float32)
            self.decoder.set_input_embeddings(nn.Identity())  # hidden states come in, never token ids
            if not outer_norms:
                self._drop_outer_norms()
        except Exception as error:  # of any model's own code
            reason = " ".join(str(error).split())
            raise UnsupportedModel(f"no prefix layer can be made of this config ({reason}); use hydra heads") from error
        self.context = find_context(self.layer_config)
        self.explicit_masks = not type(self.decoder)._can_set_attn_implementation()
        self.fused: FusedLlama | None = None  # a fast path of prepared heads
        self._shapes: tuple[LayerShape | None, ...] | None = None

    def _drop_outer_norms(self) -> None:
        first: nn.Module = self.decoder.get_submodule("layers.0")
        for owner, name in ((self.decoder, "norm"), (first, "input_layernorm")):
            if not isinstance(getattr(owner, name, None), nn.Module):
                raise UnsupportedModel(f"its {type(owner).__name__} has no {name} to leave out")
            setattr(owner, name, nn.Identity())

    def fuse(self) -> None:
        """Take the fast path, where the layers are of Llama's shape; they must be frozen and in evaluation mode."""
        self.fused = fuse(self.decoder)

    # -- decoding ----------------------------------------------------------------------------------------------------

    def find_shapes(self) -> tuple[LayerShape | None, ...]:
        """The shapes of the layers' keys and values."""
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
        """An empty cache of the layers' own."""
        parameter = next(self.decoder.parameters())
        return SlotCache(self.find_shapes(), batch, max_length, parameter.dtype, parameter.device)

    def extend(self, hidden: Tensor, counts: Sequence[int], cache: SlotCache, rows: slice) -> Tensor:
        """Attend from the next entries `[B, A, d]`, right-padded, over all earlier ones, and commit them."""
        out = self.run(hidden, cache.layout_chain(hidden.shape[1], rows), cache)
        cache.advance(counts, rows)
        return out

    def run(self, hidden: Tensor, layout: StepLayout, cache: SlotCache) -> Tensor:
        """`[B, T, d]` to `[B, T, d]`: write to `cache` and attend over it as `layout` says."""
        cache.layout = layout
        if self.fused is not None:
            return self.fused.forward(hidden, layout, layout.positions_within(self.context), cache)
        return self._attend(hidden, layout, cache)

    # -- training ----------------------------------------------------------------------------------------------------

    def forward(self, hidden: Tensor, layout: StepLayout | None = None, seen: GrowingCache | None = None) -> Tensor:
        """All positions at once, differentiably: `[B, T, d]` to `[B, T, d]`.

        Args:
            hidden: the entries.
            layout: who sees whom among the entries in `seen` and these; None: causal order, one text a row.
            seen: entries of earlier calls; these are added to it. None: there are none.
        """
        return self._attend(hidden, layout or layout_rows(hidden), GrowingCache() if seen is None else seen)

    def _attend(self, hidden: Tensor, layout: StepLayout, cache: Cache) -> Tensor:
        positions = layout.positions_within(self.context)
        with attend_with(self.layer_config, layout, self.explicit_masks):
            return self.decoder(
                inputs_embeds=hidden, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state


class GrowingLayer(CacheLayerMixin):
    """One layer's keys and values, made longer by each forward; gradients flow through them."""

    is_compileable = False
    is_sliding = False
    is_croppable = False

    keys: Tensor | None
    values: Tensor | None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first forward's keys and values are all there are."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append `[B, heads, T, width]` and return everything `[B, heads, S, width]`."""
        if self.keys is None or self.values is None:
            self.keys, self.values = key_states, value_states
        else:
            self.keys = torch.cat([self.keys, key_states], dim=2)
            self.values = torch.cat([self.values, value_states], dim=2)
        self.is_initialized = True
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that the mask covers, and the first of them."""
        return (0 if self.keys is None else self.keys.shape[2]) + query_length, 0

    def get_seq_length(self) -> int:
        """Always 0: a model must take positions from `position_ids` alone."""
        return 0

    def get_max_length(self) -> int:
        """No bound."""
        return -1


class GrowingCache(Cache):
    """Keys and values of all layers in training; see `GrowingLayer`."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GrowingLayer)


@dataclass(frozen=True)
class PlacedLayout(StepLayout):
    """A layout whose slots are not in the order of the text: it says at which position each one stands."""

    slot_positions: Tensor | None = None  # [B, S] int64

    def find_slot_positions(self) -> Tensor:
        """`[B, S]` int64: the position in its text of the entry in each slot."""
        assert self.slot_positions is not None
        return self.slot_positions


def layout_rows(hidden: Tensor) -> StepLayout:
    """Causal order of one text in each row of `[B, T, d]`."""
    slots = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
    return StepLayout(slots, slots, hidden.shape[1], None, 0)
