"""A training run from files to files: read, estimate, train, measure, save."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from hydraspec.base.model import BaseModel
from hydraspec.config import TrainingConfig
from hydraspec.errors import DataError, HydraspecError
from hydraspec.heads import KINDS, cut_vocabulary, new_heads
from hydraspec.heads.checkpoint import Provenance, library_versions, save_heads
from hydraspec.heads.protocol import DraftHeads
from hydraspec.shipped import find_shipped
from hydraspec.text import TextCodec
from hydraspec.train import loop
from hydraspec.train.data import Batch, count_assistant_tokens, describe, read_examples

logger = logging.getLogger(__name__)


def train_to_folder(
    base_name: str,
    kind: str,
    data: Path,
    out: Path,
    config: TrainingConfig,
    eval_data: Path | None,
    device: str | None,
    console: Console,
) -> None:
    """Train heads of `kind` for a base model on `data` and save them in `out`, with what they measured.

    Ctrl-C or SIGTERM ends the training early and saves what there is.

    Raises:
        HydraspecError: something about the arguments or the files is wrong; nothing is written then.
    """
    if kind not in KINDS:
        raise HydraspecError(f"no heads are called {kind!r}: choose {', '.join(KINDS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HydraspecError(f"{out} is there already and not empty: name another folder, or remove it")
    home = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise HydraspecError(f"{out} cannot be written: {home} is no folder that may be written to")
    for file in (data, eval_data):
        if file is not None and not file.is_file():
            raise DataError(f"data file {file} does not exist")
    path = find_shipped(base_name)
    torch.manual_seed(config.seed)
    base = BaseModel.load(path, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    codec = TextCodec.load(path)
    if base.max_length is not None and config.max_length > base.max_length:
        raise HydraspecError(f"max_length {config.max_length} is beyond the base model's context of {base.max_length}")
    with console.status(f"reading {data.name}"):
        examples = list(read_examples(data, codec, config.max_length))
        if eval_data is not None:
            held_out = list(read_examples(eval_data, codec, config.max_length, limit=config.held_out))
        else:
            cut = len(examples) - min(config.held_out, len(examples) // 10)
            examples, held_out = examples[:cut], examples[cut:]
    if not examples:
        raise DataError(f"{data} holds no conversation with an answer to learn from")
    layers, teacher_weight, data_weight = loop.resolve_recipe(kind, config)
    heads = new_heads(
        base,
        kind,
        num_heads=config.num_heads,
        num_layers=layers,
        shared_blocks=config.shared_blocks,
        tied_vocabulary=config.tied_vocabulary,
        dropout=config.dropout,
    )
    batches = loop.plan_steps(examples, config)
    tokens = sum(batch.num_tokens for batch in batches)
    console.print(
        f"{kind} heads: {sum(p.numel() for p in heads.parameters()):,} parameters, {config.num_heads} heads of "
        f"{layers} blocks; teacher weight {teacher_weight:g}, data weight {data_weight:g}"
    )
    estimate = _estimate_seconds(base, heads, batches, config)
    console.print(f"{tokens:,} tokens in {len(batches):,} steps: about {estimate / 60:.0f} min; Ctrl-C saves and ends")
    torch.manual_seed(config.seed)
    start = time.perf_counter()
    done = _train_with_bar(base, heads, batches, config, console)
    seconds = time.perf_counter() - start
    trained = sum(batch.num_tokens for batch in batches[:done])
    measured: dict[str, Any] = {
        "training_seconds": round(seconds),
        "tokens_per_second": round(trained / seconds) if seconds else 0,
    }
    provenance = Provenance(
        base=base_name,
        base_fingerprint=base.fingerprint(),
        data=f"{trained:,} tokens of {data.name} ({describe(data, examples)['conversations']:,} conversations)",
        recipe={"heads": kind, "steps": done, "of_steps": len(batches), **config.to_dict()},
        measured=measured,
        versions=library_versions(),
    )
    saved = heads
    if 0 < config.draft_vocabulary < base.vocab_size:
        saved = cut_vocabulary(heads, count_assistant_tokens(examples, base.vocab_size), config.draft_vocabulary)
    save_heads(saved, out, provenance)  # before anything else can fail
    accuracy = loop.measure_accuracy(base, heads, held_out) if held_out else []
    measured |= {
        "held_out_conversations": len(held_out),
        "top1": [round(a.top1, 4) for a in accuracy],
        "top5": [round(a.top5, 4) for a in accuracy],
    }
    save_heads(saved, out, provenance)
    _print_accuracy(accuracy, console)
    console.print(f"saved to {out}{'' if done == len(batches) else f', after {done} of {len(batches)} steps'}")


def _estimate_seconds(base: BaseModel, heads: DraftHeads, batches: Sequence[Batch], config: TrainingConfig) -> float:
    """What the run will take, from two batches tried and thrown away."""
    _, teacher_weight, data_weight = loop.resolve_recipe(heads.config.kind, config)
    heads.to(base.device).train()
    spent: list[float] = []
    for batch in (batches[0], batches[-1]):
        start = time.perf_counter()
        with loop.pick_autocast(base, config.autocast):
            loss = loop.compute_loss(base, heads, batch, teacher_weight, data_weight)
        if loss is not None:
            loss.backward()
        if base.device.type == "cuda":
            torch.cuda.synchronize()
        spent.append((time.perf_counter() - start) / batch.num_tokens)
    heads.zero_grad(set_to_none=True)
    return min(spent) * sum(batch.num_tokens for batch in batches)


def _train_with_bar(
    base: BaseModel, heads: DraftHeads, batches: Sequence[Batch], config: TrainingConfig, console: Console
) -> int:
    columns = (
        TextColumn("loss {task.fields[loss]:.3f}"),
        BarColumn(),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
    )
    with (
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar,
        _asked_to_stop() as ask,
    ):
        task = bar.add_task("training", total=len(batches), loss=float("nan"), speed=0.0)
        smooth: list[float] = []

        def watch(progress: loop.Progress) -> None:
            smooth.append(progress.loss)
            recent = sum(smooth[-50:]) / len(smooth[-50:])
            bar.update(task, completed=progress.step, loss=recent, speed=progress.tokens / progress.seconds)
            if progress.step % 100 == 0:
                logger.info("step %d of %d: loss %.4f", progress.step, progress.steps, recent)

        return loop.train(base, heads, batches, config, watch, lambda: bool(ask))


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM instead of being ended by them; a second Ctrl-C ends at once."""
    seen: list[int] = []

    def note(number: int, _: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_accuracy(accuracy: Sequence[loop.HeadAccuracy], console: Console) -> None:
    if not accuracy:
        return
    table = Table("head", "top-1", "top-5", title="accuracy on held-out text")
    for head, a in enumerate(accuracy):
        table.add_row(str(head), f"{a.top1:.1%}", f"{a.top5:.1%}")
    console.print(table)
