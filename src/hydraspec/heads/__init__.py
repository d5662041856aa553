"""Draft heads: one protocol, one registry, one checkpoint format."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

from torch import Tensor

from hydraspec.base.model import BaseModel
from hydraspec.config import HeadsConfig
from hydraspec.errors import HydraspecError
from hydraspec.heads.decoder import describe_layers
from hydraspec.heads.eagle import EagleHeads
from hydraspec.heads.hydra import HydraHeads
from hydraspec.heads.medusa import MedusaHeads
from hydraspec.heads.prefix import HydraPlusPlusHeads
from hydraspec.heads.protocol import DraftHeads, HeadState

__all__ = ["KINDS", "DraftHeads", "HeadState", "build_heads", "cut_vocabulary", "new_heads"]

KINDS: MappingProxyType[str, type[DraftHeads]] = MappingProxyType(
    {"medusa": MedusaHeads, "hydra": HydraHeads, "hydra++": HydraPlusPlusHeads, "eagle": EagleHeads}
)


def find_kind(name: str) -> type[DraftHeads]:
    """The class of a kind of heads.

    Raises:
        HydraspecError: there is no such kind.
    """
    if name not in KINDS:
        raise HydraspecError(f"no heads are called {name!r}: choose {', '.join(KINDS)}")
    return KINDS[name]


def build_heads(config: HeadsConfig) -> DraftHeads:
    """Heads of the shape that `config` describes, with untrained weights.

    Raises:
        HydraspecError: there is no such kind of heads, or it has not what the config asks for.
    """
    return find_kind(config.kind)(config)


def cut_vocabulary(heads: DraftHeads, counts: Tensor, size: int) -> DraftHeads:
    """The same heads, proposing only the `size` tokens of the largest `counts` `[V]`."""
    assert heads.token_ids is None, "they are cut already"
    cut = build_heads(dataclasses.replace(heads.config, draft_vocabulary=size))
    ids = counts.argsort(descending=True, stable=True)[:size].sort().values
    tensors = {k: v[ids] if k.startswith("vocabulary.") else v for k, v in heads.state_dict().items()}
    cut.load_state_dict({**tensors, "token_ids": ids})
    return cut


def new_heads(
    base: BaseModel,
    kind: str,
    *,
    token_ids: Tensor | None = None,
    prefix_layer: str | dict[str, Any] = "base",
    prefix_window: int = 0,
    **options: Any,
) -> DraftHeads:
    """Untrained heads that fit a base model.

    Args:
        base: the model that they shall draft for.
        kind: one of `KINDS`.
        token_ids: `[N]` int64, the only tokens that they shall propose; None: any.
        prefix_layer: decoder layers of heads that have some: `base`, of the base model's kind; `plain`, Llama-shaped;
            or a transformers config of one's own.
        prefix_window: tokens that these layers look back, themselves included; 0: all.
        options: further fields of `HeadsConfig`.

    Raises:
        HydraspecError: there is no such kind, or it has not what is asked for.
    """
    layers = find_kind(kind).count_decoder_layers(options.get("num_layers", HeadsConfig.num_layers))
    if prefix_window and not layers:
        raise HydraspecError(f"{kind} heads have no prefix attention: leave prefix_window out")
    if isinstance(prefix_layer, str):
        options["prefix_layer"] = describe_layers(base, layers, prefix_layer, prefix_window) if layers else None
    else:
        options["prefix_layer"] = prefix_layer
    if kind == "eagle":
        options.setdefault("tied_vocabulary", True)
    if token_ids is not None:
        options["draft_vocabulary"] = len(token_ids)
    heads = build_heads(HeadsConfig(kind, base.hidden_size, base.vocab_size, **options))
    if token_ids is not None and heads.token_ids is not None:
        heads.token_ids.copy_(token_ids)
    heads.start_from(base)
    return heads
