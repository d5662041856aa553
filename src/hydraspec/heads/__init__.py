"""Draft heads: one protocol, one registry, one checkpoint format."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from torch import Tensor

from hydraspec.base.model import BaseModel
from hydraspec.config import HeadsConfig
from hydraspec.errors import HydraspecError
from hydraspec.heads.hydra import HydraHeads
from hydraspec.heads.medusa import MedusaHeads
from hydraspec.heads.prefix import HydraPlusPlusHeads, cut_to_one_layer
from hydraspec.heads.protocol import DraftHeads, HeadState

__all__ = ["KINDS", "DraftHeads", "HeadState", "build_heads", "cut_vocabulary", "new_heads"]

KINDS: MappingProxyType[str, type[DraftHeads]] = MappingProxyType(
    {"medusa": MedusaHeads, "hydra": HydraHeads, "hydra++": HydraPlusPlusHeads}
)


def build_heads(config: HeadsConfig) -> DraftHeads:
    """Heads of the shape that `config` describes, with untrained weights.

    Raises:
        HydraspecError: there is no such kind of heads.
    """
    if config.kind not in KINDS:
        raise HydraspecError(f"no heads are called {config.kind!r}: choose {', '.join(KINDS)}")
    return KINDS[config.kind](config)


def cut_vocabulary(heads: DraftHeads, counts: Tensor, size: int) -> DraftHeads:
    """The same heads, proposing only the `size` tokens of the largest `counts` `[V]`.

    The result is to be saved or prepared; training goes on with the heads that it was made of.
    """
    cut = build_heads(dataclasses.replace(heads.config, draft_vocabulary=size))
    ids = counts.argsort(descending=True, stable=True)[:size].sort().values
    cut.load_state_dict({**heads.state_dict(), "token_ids": ids})
    return cut


def new_heads(base: BaseModel, kind: str, **options: object) -> DraftHeads:
    """Untrained heads that fit a base model; `options` are further fields of `HeadsConfig`."""
    prefix_layer = cut_to_one_layer(base.config) if kind == "hydra++" else None
    values = {"kind": kind, "hidden_size": base.hidden_size, "vocab_size": base.vocab_size}
    heads = build_heads(HeadsConfig(**{**values, "prefix_layer": prefix_layer, **options}))  # type: ignore[arg-type]
    heads.start_from(base)
    return heads
