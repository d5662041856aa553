"""Hydra decoding: draft heads guess a tree of tokens, the frozen base model checks it in one forward pass."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydraspec.llm import LLM, load
    from hydraspec.tree import Tree

__version__ = "0.1.0"
__all__ = ["LLM", "Tree", "load"]

_HOMES = {"LLM": "hydraspec.llm", "load": "hydraspec.llm", "Tree": "hydraspec.tree"}


def __getattr__(name: str) -> Any:
    """Import torch only when something that needs it is asked for."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hydraspec' has no attribute {name!r}")
