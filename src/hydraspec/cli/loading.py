"""What commands that load models share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydraspec.llm import LLM


def load_quietly(model: str, heads: str | None, tree: str | None, device: str | None, dtype: str | None) -> LLM:
    """`hydraspec.load` without the progress bars of transformers."""
    silence_transformers()
    from hydraspec.llm import load

    return load(model, heads, tree, device, dtype)


def silence_transformers() -> None:
    """Turn off the progress bars that transformers shows while it loads weights."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
