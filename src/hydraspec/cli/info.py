"""`hydraspec info`: what a model or a set of heads is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def info(
    name: Annotated[str, typer.Argument(help="a model or heads: a folder, a hub id, or a shipped name")],
) -> None:
    """Say what a model is, or what a set of heads is and what made it."""
    import json

    from rich.console import Console
    from rich.table import Table

    from hydraspec.cli.loading import silence_transformers
    from hydraspec.errors import CheckpointError
    from hydraspec.hub import fetch
    from hydraspec.shipped import find_shipped

    silence_transformers()
    path = fetch(find_shipped(name), "model or heads")
    config_file = Path(path) / "config.json"
    is_heads = False
    if config_file.is_file():
        try:
            is_heads = "heads" in json.loads(config_file.read_text(encoding="utf-8"))
        except (ValueError, OSError):
            raise CheckpointError(f"{config_file} is not JSON; copy the folder again") from None
    rows = _describe_heads(path) if is_heads else _describe_model(path)
    table = Table(show_header=False, box=None)
    for key, value in rows:
        table.add_row(key, value if isinstance(value, str) else json.dumps(value))
    Console().print(table)


def _describe_heads(path: str) -> list[tuple[str, Any]]:
    from safetensors import safe_open

    from hydraspec.errors import CheckpointError
    from hydraspec.heads.checkpoint import read_config

    config, provenance = read_config(Path(path))
    file = Path(path) / "model.safetensors"
    try:
        with safe_open(file, "pt") as tensors:
            parameters = 0
            for key in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                size = 1
                for width in tensors.get_slice(key).get_shape():
                    size *= width
                parameters += size
    except Exception as error:  # safetensors raises kinds of its own and OSError
        raise CheckpointError(f"{file} is missing or damaged ({error}); copy the heads again") from error
    return [
        ("heads", config.kind),
        ("path", path),
        ("parameters", f"{parameters:,}"),
        ("heads x blocks", f"{config.num_heads} x {config.num_layers}{' (shared)' if config.shared_blocks else ''}"),
        ("vocabulary layer", "the base model's" if config.tied_vocabulary else "one a head"),
        ("hidden size, vocabulary", f"{config.hidden_size}, {config.vocab_size}"),
        ("base model", f"{provenance.base} ({provenance.base_fingerprint})"),
        ("trained on", provenance.data),
        ("recipe", provenance.recipe),
        ("measured", provenance.measured),
        ("versions", provenance.versions),
    ]


def _describe_model(path: str) -> list[tuple[str, Any]]:
    from hydraspec.base.model import BaseModel

    base = BaseModel.load(path)
    config = base.config
    shapes = [shape for shape in base.cache_shapes if shape is not None]
    per_token = sum((s.key_heads * s.key_width + s.value_heads * s.value_width) for s in shapes)
    return [
        ("model", config.model_type),
        ("path", path),
        ("parameters", f"{sum(p.numel() for p in base.model.parameters()):,}"),
        ("layers, hidden size, vocabulary", f"{config.num_hidden_layers}, {base.hidden_size}, {base.vocab_size}"),
        ("context", f"{base.max_length} tokens" if base.max_length else "not stated"),
        ("cache", f"{per_token * base.dtype.itemsize:,} bytes a token in {str(base.dtype).removeprefix('torch.')}"),
        ("end of text", sorted(base.eos_token_ids)),
        ("fingerprint", base.fingerprint()),
        ("tree attention", "checked: equal to plain decoding on every path"),
    ]
