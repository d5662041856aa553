"""What a model's class, config and files say about it before it decodes anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from hydraspec.base.cache import LayerShape
from hydraspec.base.quantised import is_plain_weight
from hydraspec.errors import HydraspecError, UnsupportedModel


def parse_device(name: str | torch.device) -> torch.device:
    """A device by name.

    Raises:
        HydraspecError: there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise HydraspecError(f"device {name} cannot be used here: {first_line(error)}") from None
    return device


def refuse_unfit(kind: type, config: Any, name: str) -> None:
    """Refuse what no tree of guesses can be verified with.

    Raises:
        UnsupportedModel: the model keeps state that cannot be branched or taken back, or its positions come from slots.
    """
    text = config.get_text_config(decoder=True)
    layer_types = set(getattr(text, "layer_types", None) or ())
    recurrent = layer_types - {"full_attention", "sliding_attention", "chunked_attention", "dummy", "moe", "mlp"}
    if getattr(kind, "_is_stateful", False) or recurrent:
        why = f"layers of type {', '.join(sorted(recurrent))}" if recurrent else "recurrent state"
        raise UnsupportedModel(
            f"{name or kind.__name__} ({config.model_type}) has {why}, which a tree of guesses cannot share; "
            "use a model with attention layers only"
        )
    attention = getattr(text, "attn_config", None)
    if text.model_type == "bloom" or getattr(text, "alibi", False) or getattr(attention, "alibi", False):
        raise UnsupportedModel(
            f"{name or kind.__name__} ({config.model_type}) has ALiBi positions, which it takes from slots of the "
            "cache and not from the tree; use a model with rotary or learned positions"
        )


@torch.no_grad()
def probe_cache_shapes(config: Any, run: Callable[[DynamicCache], object], name: str) -> tuple[LayerShape | None, ...]:
    """The shape of each layer's keys and values, seen in a forward of two tokens. None: it reads another layer's.

    Raises:
        UnsupportedModel: a layer caches something else than keys and values, or nothing at all is cached.
    """
    cache = DynamicCache(config=config)
    run(cache)
    shapes: list[LayerShape | None] = []
    for layer in cache.layers:
        if hasattr(layer, "conv_states") or hasattr(layer, "indexer_keys"):
            raise UnsupportedModel(f"{name} caches more than keys and values ({type(layer).__name__}); not supported")
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.numel() == 0:
            shapes.append(None)
        else:
            shapes.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3]))
    if not any(shapes):
        raise UnsupportedModel(f"{name} does not use a key-value cache; not supported")
    return tuple(shapes)


def store_columns_first(model: nn.Module) -> None:
    """Store the weights of linear layers transposed in memory; shapes and values stay as they are.

    A float32 product of few rows (the nodes of a small tree) is two to four times faster this way on CPUs, because
    the library need not rearrange the whole weight for each product. A product of one row is as fast as before.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and is_plain_weight(layer.weight):
            layer.weight.data = layer.weight.data.t().contiguous().t()


def find_context(config: Any) -> int | None:
    """Tokens of context that a model was made for, or None where its config does not say."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond the original context all positions turn by other angles, earlier tokens' too: no cache is right then.
        original = rope.get("original_max_position_embeddings")
        return original or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    return getattr(config, "max_position_embeddings", None)


def find_eos(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text, from the generation config or else the config."""
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = model.config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


def explain_config(folder: str, error: Exception) -> str:
    """Why the config of a model folder cannot be read."""
    if not (Path(folder) / "config.json").is_file():
        return f"{folder} is no model folder: it has no config.json"
    return f"{folder}/config.json describes no known model: {first_line(error)}"


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
