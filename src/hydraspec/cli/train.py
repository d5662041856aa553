"""`hydraspec train`: draft heads for a base model, from conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hydraspec.cli.options import Device, takes
from hydraspec.config import TrainingConfig


@takes(config=TrainingConfig)
def train_heads(
    base: Annotated[str, typer.Option(help="the base model: a folder, a hub id, or a shipped model")],
    heads: Annotated[str, typer.Option(help="medusa, hydra or hydra++")],
    data: Annotated[Path, typer.Option(help="conversations in ShareGPT form: JSONL, or JSONL.gz")],
    out: Annotated[Path, typer.Option(help="folder for the heads")],
    config: TrainingConfig,
    eval_data: Annotated[Path | None, typer.Option(help="held-out conversations; left out: the last of --data")] = None,
    device: Device = None,
) -> None:
    """Train draft heads on a frozen base model."""
    from rich.console import Console

    from hydraspec.cli.loading import silence_transformers
    from hydraspec.train.run import train_to_folder

    silence_transformers()
    train_to_folder(base, heads, data, out, config, eval_data, device, Console())
