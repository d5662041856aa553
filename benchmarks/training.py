"""Training throughput: our step against the plain version of the same step, which materialises everything.

python benchmarks/training.py --data TRAIN.jsonl.gz [--recipe hydra++] [--steps 6] [--rounds 3] [--json FILE]

The plain step runs the heads at every position, masked or not, keeps the logits of all heads and of the teacher in
memory and leaves their gradients to autograd. Both take the same batches, heads, losses and optimiser. Peak memory is
read off processes that run one of them alone.
"""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from common import console, report
from hydraspec.base.attention import layout_packed
from hydraspec.base.model import BaseModel
from hydraspec.cli.loading import settle_threads, silence_transformers
from hydraspec.config import TrainingConfig
from hydraspec.heads.protocol import DraftHeads
from hydraspec.shipped import find_shipped
from hydraspec.text import TextCodec
from hydraspec.train.batch import Batch
from hydraspec.train.forward import pick_autocast, wants_bfloat16
from hydraspec.train.hidden_states import OnlineStates
from hydraspec.train.loop import Data, Trainer
from hydraspec.train.packing import RowPlan, load_batch
from hydraspec.train.prepare import make_heads
from hydraspec.train.recipes import resolve_recipe
from hydraspec.train.store import prepare_stores

Step = Callable[[list[Any]], int]


def compute_plain_loss(base: BaseModel, heads: DraftHeads, batch: Batch, config: TrainingConfig) -> Tensor:
    """The sum of the heads' mean losses, from logits of every head at every position."""
    hidden = base.read_hidden_states(batch.ids, layout_packed(batch.segments, batch.positions, base.dtype, base.device))
    width = batch.ids.shape[1]
    with pick_autocast(base.device, config.autocast):
        layout = layout_packed(batch.segments, batch.positions, heads.dtype, base.device)
        # Rolled beyond the end of a row: what is found there is masked.
        embeddings = base.embed(batch.ids).to(heads.dtype)
        padded = F.pad(embeddings, (0, 0, 0, heads.num_heads + 1))
        contexts = heads.read_contexts(hidden.to(heads.dtype), layout)
        logits = []
        for head in range(heads.num_heads):
            path = torch.stack([padded[:, 1 + step : 1 + step + width] for step in range(head + 1)], -2)
            states = heads.blocks[head](torch.cat([contexts, path.flatten(-2)], -1) if heads.grounded else contexts)
            weight, bias = heads.vocabulary_weight(head, base)
            logits.append(F.linear(states, weight.to(states.dtype), bias))
        teacher = torch.softmax(base.project(hidden).float(), -1)
    losses = []
    for head, of_head in enumerate(logits):
        mask = (batch.reach >= head + 2).float()
        shifted = F.pad(teacher, (0, 0, 0, head + 1))[:, head + 1 :]
        targets = F.pad(batch.ids, (0, head + 2))[:, head + 2 :]
        log_q = torch.log_softmax(of_head.float(), -1)
        loss = -(config.teacher_weight or 0.0) * (shifted * log_q).sum(-1)
        loss = loss - (config.data_weight or 0.0) * log_q.gather(-1, targets[..., None])[..., 0]
        losses.append((loss * mask).sum() / mask.sum().clamp_min(1))
    return torch.stack(losses).sum()


def make_steps(trainer: Trainer, base: BaseModel, heads: DraftHeads, config: TrainingConfig) -> dict[str, Step]:
    """One optimiser step on rows, each way; both give the number of tokens."""

    def finish() -> None:
        torch.nn.utils.clip_grad_norm_(heads.parameters(), config.clip)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)

    def ours(rows: list[Any]) -> int:
        _, tokens = trainer.find_gradients(rows)
        finish()
        return tokens

    def plain(rows: list[Any]) -> int:
        batch = trainer.data.load(rows)
        compute_plain_loss(base, heads, batch, config).backward()
        finish()
        return batch.num_tokens

    return {"plain": plain, "ours": ours}


class Stopwatch:
    """Sums the seconds spent in some methods."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, name: str, label: str) -> None:
        """Time every call of a method of this object."""
        method = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)


def main(
    data: Annotated[str, typer.Option(help="conversations, as for hydraspec train")],
    model: str = "tiny-assistant",
    recipe: str = "hydra++",
    tied: Annotated[bool, typer.Option(help="use the base's vocabulary layer")] = True,
    steps: Annotated[int, typer.Option(help="optimiser steps a round")] = 6,
    rounds: int = 3,
    batch_tokens: int = 4096,
    draft_vocabulary: int = 0,
    autocast: str = "auto",
    only: Annotated[str | None, typer.Option(help="plain or ours: run this alone and print its peak memory")] = None,
    json: Path | None = None,
) -> None:
    silence_transformers()
    threads = settle_threads()
    config = resolve_recipe(
        TrainingConfig(
            recipe=recipe,
            tied_vocabulary=tied,
            dropout=0.0,
            batch_tokens=batch_tokens,
            micro_tokens=batch_tokens,
            draft_vocabulary=draft_vocabulary,
            autocast=autocast,
        )
    )
    device = torch.device("cpu")
    path = find_shipped(model)
    dtype = torch.bfloat16 if wants_bfloat16(device, autocast) else None
    base, codec = BaseModel.load(path, device, dtype), TextCodec.load(path)
    with tempfile.TemporaryDirectory() as folder:
        store, _ = prepare_stores(data, None, codec, Path(folder), config.max_length, 0.0, base.vocab_size)
        plan = RowPlan(store.lengths, config.max_length, 0, 1, 0)
        made = make_heads(base, store, config)
        source = Data(plan.num_rows, plan.rows, lambda rows: load_batch(store, rows), OnlineStates(base))
        trainer = Trainer(base, made, config, source, Accelerator(cpu=True))
        ways = make_steps(trainer, base, made, config)
        rows = plan.rows(0)
        pieces = [[next(rows) for _ in range(trainer.rows_per_step)] for _ in range(steps)]
        if only:
            for piece in pieces:
                ways[only](piece)
            sys.stdout.write(f"{read_peak()}\n")
            return
        check_losses(trainer, base, made, config, pieces[0])
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, step in ways.items():
                step(pieces[0])
                start = time.perf_counter()
                tokens = sum(step(piece) for piece in pieces)
                speeds[name].append(tokens / (time.perf_counter() - start))
        shares = measure_shares(trainer, ways["ours"], pieces)
    peaks = {name: measure_peak(name) for name in ways}
    table = [
        {
            "step": name,
            "tokens/s": statistics.median(values),
            "against plain": statistics.median(a / b for a, b in zip(values, speeds["plain"], strict=True)),
            "peak MB": peaks[name],
        }
        for name, values in speeds.items()
    ]
    facts = {"recipe": dataclasses.asdict(config), "threads": threads, "rounds": speeds, "shares": shares}
    report(f"training {recipe}, {batch_tokens} tokens a step, {str(base.dtype)[6:]}", table, json, **facts)
    console.print("ours: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))


def check_losses(trainer: Trainer, base: BaseModel, heads: DraftHeads, config: TrainingConfig, rows: list[Any]) -> None:
    """Both ways must find the same loss."""
    losses, _ = trainer.find_gradients(rows)
    trainer.optimizer.zero_grad(set_to_none=True)
    plain = compute_plain_loss(base, heads, trainer.data.load(rows), config).detach()
    torch.testing.assert_close(losses.sum(), plain, rtol=2e-2, atol=2e-2)


def measure_shares(trainer: Trainer, step: Step, pieces: list[list[Any]]) -> dict[str, float]:
    """Shares of a step's time: the base's forward, the vocabulary layers with their losses, the heads, the rest."""
    watch = Stopwatch()
    module = trainer.accelerator.unwrap_model(trainer.model)
    watch.wrap(trainer.data.hidden, "read", "base forward")
    watch.wrap(module, "_score", "vocabulary layers")
    watch.wrap(module.heads, "draft_states", "heads")
    watch.wrap(trainer.accelerator, "backward", "heads")
    watch.wrap(trainer.optimizer, "step", "optimiser")
    start = time.perf_counter()
    for piece in pieces:
        step(piece)
    total = time.perf_counter() - start
    shares = {name: seconds / total for name, seconds in watch.seconds.items()}
    return {**shares, "rest": 1 - sum(shares.values())}


def read_peak() -> float:
    """The most memory this process ever held, in MB; unlike getrusage's, not what its parent held when it was made."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure_peak(name: str) -> float:
    """Peak memory in MB of a process of its own that only takes such steps."""
    words = [sys.executable, *sys.argv, "--only", name]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    typer.run(main)
