"""Watching a run: the bar, the trackers, checkpoints in time, and signals that end it."""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hydraspec.config import TrainingConfig
from hydraspec.train import loop

logger = logging.getLogger(__name__)

SMOOTHED = 50  # steps that the shown loss is a mean over


class Saver:
    """Writes checkpoints every so many steps or minutes."""

    def __init__(self, config: TrainingConfig, save: Callable[[], None]) -> None:
        self.save = save
        self._steps, self._seconds = config.checkpoint_steps, 60 * config.checkpoint_minutes
        self._last = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after `step` steps."""
        by_steps = self._steps and step % self._steps == 0
        return bool(by_steps or (self._seconds and time.monotonic() - self._last > self._seconds))

    def save_now(self) -> None:
        """Write one, and count the minutes anew."""
        self.save()
        self._last = time.monotonic()


def follow(console: Console, trainer: loop.Trainer, saver: Saver, stop: list[int], accelerator: Accelerator) -> None:
    """Run the trainer to its end, or until a signal has come; show, track and save on the way."""
    columns = (
        TextColumn("loss {task.fields[loss]:.3f}"),
        BarColumn(),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
    )
    recent: deque[float] = deque(maxlen=SMOOTHED)
    first_tokens, first_seconds = trainer.tokens, trainer.seconds
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("training", total=trainer.steps, completed=trainer.step, loss=float("nan"), speed=0.0)

        def watch(progress: loop.Progress) -> None:
            recent.append(progress.loss)
            mean = sum(recent) / len(recent)
            spent = progress.seconds - first_seconds
            bar.update(task, completed=progress.step, loss=mean, speed=(progress.tokens - first_tokens) / spent)
            values = {f"loss/head_{head}": loss for head, loss in enumerate(progress.losses)}
            values |= {"loss/all": progress.loss, "learning_rate": progress.learning_rate}
            accelerator.log({**values, "gradient_norm": progress.gradient_norm}, step=progress.step)
            if progress.step % 100 == 0:
                logger.info("step %d of %d: loss %.4f", progress.step, progress.steps, mean)
            if progress.step < progress.steps and _agree(saver.is_due(progress.step), accelerator):
                saver.save_now()

        trainer.run(watch, lambda: _agree(bool(stop), accelerator))


def _agree(here: bool, accelerator: Accelerator) -> bool:
    """Whether any process says so: what one does at a step, all must do."""
    if accelerator.num_processes == 1:
        return here
    return bool(accelerator.reduce(torch.tensor([float(here)], device=accelerator.device), "sum").item())


@contextmanager
def listen_for_stop() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM instead of being ended by them; a second one ends at once."""
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
