"""`hydraspec train`: draft heads for a base model, from conversations."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from hydraspec.cli.options import Device, takes
from hydraspec.config import TrainingConfig
from hydraspec.errors import HydraspecError


@takes(config=TrainingConfig)
def train_heads(
    base: Annotated[str, typer.Option(help="the base model: a folder, a hub id, or a shipped model")],
    data: Annotated[
        str,
        typer.Option(help="conversations: ShareGPT or OpenAI messages (JSON, JSONL, .gz), plain text, or datasets:ID"),
    ],
    config: TrainingConfig,
    out: Annotated[Path | None, typer.Option(help="folder for the heads")] = None,
    eval_data: Annotated[str | None, typer.Option(help="held-out conversations; left out: a share of --data")] = None,
    hidden_states: Annotated[
        Path | None, typer.Option(help="folder of the base's hidden states: written if absent, then read")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint in OUT")] = False,
    preview: Annotated[int, typer.Option(help="only print so many examples, with what is not learned dimmed")] = 0,
    track: Annotated[list[str] | None, typer.Option(help="tensorboard or wandb; may be given several times")] = None,
    device: Device = None,
) -> None:
    """Train draft heads on a frozen base model."""
    _need("accelerate", "training", "hydraspec[train]")
    for tracker in track or []:
        if tracker not in ("tensorboard", "wandb"):
            raise HydraspecError(f"no tracker is called {tracker!r}: choose tensorboard or wandb")
        _need(tracker, f"--track {tracker}", tracker)
    from rich.console import Console

    from hydraspec.cli.loading import settle_threads, show_warnings, silence_transformers

    silence_transformers()
    show_warnings()
    settle_threads()
    console = Console(highlight=False)
    if preview:
        from hydraspec.train.preview import preview_data

        preview_data(base, data, preview, config.max_length, console)
        return
    if out is None:
        raise HydraspecError("name a folder for the heads with --out")
    from hydraspec.train.prepare import Run
    from hydraspec.train.run import train_to_folder

    run = Run(base, data, out, config, eval_data, hidden_states, resume, tuple(track or ()), device)
    if not train_to_folder(run, console):
        raise typer.Exit(130)


def _need(module: str, purpose: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise HydraspecError(f"{purpose} needs the package {module}: pip install '{package}'")
