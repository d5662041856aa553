"""`hydraspec regenerate`: a data set with the base model's own answers, for heads to learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hydraspec.cli.options import Device, Dtype, Heads, TreeName, takes
from hydraspec.config import EngineConfig, RegenerationConfig, SamplingConfig
from hydraspec.errors import HydraspecError


@takes(config=RegenerationConfig, sampling=SamplingConfig)
def regenerate_data(
    data: Annotated[str, typer.Argument(help="conversations or texts, in any form that train reads")],
    base: Annotated[str, typer.Option(help="the base model: a folder, a hub id, or a shipped model")],
    out: Annotated[Path, typer.Option(help="JSON lines to write; gzipped if the name ends with .gz")],
    config: RegenerationConfig,
    sampling: SamplingConfig,
    heads: Heads = None,
    tree: TreeName = None,
    batch: Annotated[int, typer.Option(help="conversations answered at once", min=1)] = 16,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Let a base model answer the prompts of DATA itself; stopped, the same command goes on."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from hydraspec.cli.loading import load_quietly
    from hydraspec.train.conversations import count_conversations
    from hydraspec.train.progress import listen_for_stop
    from hydraspec.train.regenerate import Regenerated, regenerate

    if tree and not heads:
        raise HydraspecError("a tree needs heads to fill it: name them with --heads")
    console = Console(highlight=False)
    total = count_conversations(data, config.limit)
    llm = load_quietly(base, heads, tree, device, dtype, EngineConfig(max_batch=batch))
    amount = "conversations" if total is None else f"{total:,} conversations"
    console.print(f"{amount} answered anew by {base}; Ctrl-C keeps what is written, and the same command goes on")
    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[speed]:,.0f} tokens/s, acceptance length {task.fields[length]:.2f}"),
    )
    with (
        listen_for_stop() as stop,
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar,
    ):
        task = bar.add_task("regenerating", total=total, speed=0.0, length=1.0)

        def watch(progress: Regenerated) -> None:
            seconds = bar.tasks[0].elapsed or 1.0
            speed = progress.tokens / seconds
            bar.update(task, completed=progress.conversations, speed=speed, length=progress.acceptance_length)

        done = regenerate(llm, data, out, config, sampling, watch, lambda: bool(stop))
    if not done.is_complete:
        console.print(f"stopped after {done.conversations:,} conversations: the same command goes on")
        raise typer.Exit(130)
    console.print(f"wrote {done.written:,} of {done.conversations:,} conversations to {out}")
