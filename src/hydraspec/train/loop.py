"""The training loop: optimiser steps on rows of conversations, in one process or many, resumable at every step."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hydraspec.base.model import BaseModel
from hydraspec.config import TrainingConfig
from hydraspec.errors import HydraspecError
from hydraspec.heads.protocol import DraftHeads
from hydraspec.train.batch import Batch
from hydraspec.train.checkpoint import Checkpoint
from hydraspec.train.forward import Anchored, TeacherForcedLoss
from hydraspec.train.packing import Row

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class HiddenSource(Protocol):
    """Where the base model's hidden states come from: the model itself, or files."""

    def read(self, batch: Batch) -> Tensor:
        """Those of a batch, `[B, T, d]`."""
        ...


@dataclass(frozen=True)
class Data:
    """What a run is trained on."""

    num_rows: int
    rows: Callable[[int], Iterator[Row]]  # the rows in their order, from the given number on
    load: Callable[[Sequence[Row]], Batch]
    hidden: HiddenSource


@dataclass(frozen=True)
class Progress:
    """What an optimiser step tells whoever watches."""

    step: int
    steps: int
    tokens: int  # trained on so far by all processes, padding left out
    losses: tuple[float, ...]  # of each head
    learning_rate: float
    gradient_norm: float
    seconds: float  # of all steps so far, those before a resumption included

    @property
    def loss(self) -> float:
        """The sum over the heads."""
        return sum(self.losses)


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from the peak to `final_learning_rate` times the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    floor = config.final_learning_rate
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(module: torch.nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices only."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


class Trainer:
    """Heads in training, with everything that a checkpoint must hold.

    Attributes:
        step: optimiser steps done.
        steps: of the whole run.
        tokens: trained on so far.
        seconds: spent in steps so far.
    """

    def __init__(
        self, base: BaseModel, heads: DraftHeads, config: TrainingConfig, data: Data, accelerator: Accelerator
    ) -> None:
        self.config, self.data, self.accelerator = config, data, accelerator
        self.heads = heads.to(base.device).train()
        module = TeacherForcedLoss(base, heads, config)
        self.model, self.optimizer = accelerator.prepare(module, make_optimizer(module, config))
        self.average: AveragedModel | None = None
        if config.ema:
            self.average = AveragedModel(heads, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.device = base.device
        self.rows_per_step = max(1, config.batch_tokens // config.max_length)
        self.rows_at_once = max(1, config.micro_tokens // config.max_length)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.steps = math.ceil(data.num_rows / self.rows_per_step)
        # Dropout and noise differ between processes; weights do not, the first process's are sent to all.
        torch.manual_seed(config.seed + accelerator.process_index)

    def run(
        self, watch: Callable[[Progress], None] = lambda _: None, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """Train until the end of the plan, or until `stopped` says so between two steps.

        Raises:
            HydraspecError: a loss is not a number; the weights are as the step before left them.
        """
        rows = self.data.rows(self.step * self.rows_per_step)
        while self.step < self.steps and not stopped():
            start = time.perf_counter()
            progress = self._advance(list(islice(rows, self.rows_per_step)))
            self.seconds += time.perf_counter() - start
            watch(dataclasses.replace(progress, seconds=self.seconds))

    def _advance(self, rows: Sequence[Row]) -> Progress:
        """One optimiser step on `rows`, shared out among the processes."""
        rate = learning_rate(self.config, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses, tokens = self.find_gradients(rows)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        values = losses.tolist()
        if not all(map(math.isfinite, values)):
            self.optimizer.zero_grad(set_to_none=True)
            raise HydraspecError(
                f"the loss is {sum(values)} at step {self.step}: check the data, or go on from the last checkpoint "
                "with --resume and a lower --learning-rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.heads)
        self.step += 1
        self.tokens += tokens
        return Progress(self.step, self.steps, self.tokens, tuple(values), rate, float(norm), self.seconds)

    def find_gradients(self, rows: Sequence[Row]) -> tuple[Tensor, int]:
        """Add the gradients of one optimiser step, in as many forward passes as memory asks for.

        Returns:
            The losses of the heads `[K]` and the number of tokens, of all processes together.
        """
        processes = self.accelerator.num_processes
        mine = rows[self.accelerator.process_index :: processes]
        pieces = [mine[start : start + self.rows_at_once] for start in range(0, len(mine), self.rows_at_once)]
        batches = [self.data.load(piece) for piece in pieces or [[]]]  # without rows of its own it must still take part
        anchored = [Anchored.of(batch, self.heads.num_heads, self.device) for batch in batches]
        # Each head's loss is a mean over all of its anchors in the step, wherever they are computed.
        own = torch.stack([part.count() for part in anchored]).sum(0)
        tokens = torch.tensor([float(sum(batch.num_tokens for batch in batches))])
        sums = self.accelerator.reduce(torch.cat([own, tokens]).to(self.device), "sum").cpu()
        losses = torch.zeros(self.heads.num_heads, device=self.device)
        for place, part in enumerate(anchored):
            hidden = self.data.hidden.read(part.batch)
            last = place == len(anchored) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                found = self.model(part, hidden, sums[:-1])
                self.accelerator.backward(found.sum() * processes)  # gradients are averaged over processes
            losses += found.detach()
        return self.accelerator.reduce(losses, "sum"), int(sums[-1])

    # -- what a checkpoint holds -----------------------------------------------------------------------------------

    def trained_weights(self) -> dict[str, Tensor]:
        """The weights to deploy, on the CPU: the average over steps where one is kept. All processes must ask."""
        if self.average is not None:
            averaged: dict[str, Any] = get_model_state_dict(self.average.module, options=_WHOLE)
            return averaged
        whole: dict[str, Any] = get_model_state_dict(self.model, options=_WHOLE)
        return {name.removeprefix("heads."): value for name, value in whole.items()}

    def capture(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on: tensors on the CPU, and numbers.

        All processes must ask; where weights are sharded, the first one alone gets all tensors.
        """
        weights: dict[str, Any] = get_model_state_dict(self.model, options=_WHOLE)
        optimizer: Any = get_optimizer_state_dict(self.model, self._raw_optimizer, options=_WHOLE).get("state", {})
        tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in weights.items()}
        tensors |= {f"optimizer.{name}/{k}": v for name, state in optimizer.items() for k, v in state.items()}
        if self.average is not None:
            average: dict[str, Any] = get_model_state_dict(self.average, options=_WHOLE)
            tensors |= {f"average.{name}": tensor for name, tensor in average.items()}
        for process, states in enumerate(gather_object([_read_random_states(self.device)])):
            tensors |= {f"random.{process}.{name}": state for name, state in states.items()}
        return tensors, {"tokens": self.tokens, "seconds": self.seconds, "processes": self.accelerator.num_processes}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where `capture` was called."""
        parts: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}, "average": {}, "random": {}}
        for name, tensor in checkpoint.tensors.items():
            part, _, key = name.partition(".")
            parts[part][key] = tensor
        set_model_state_dict(self.model, parts["model"], options=_WHOLE)
        states: dict[str, dict[str, Tensor]] = {}
        for key, tensor in parts["optimizer"].items():
            name, _, entry = key.rpartition("/")
            states.setdefault(name, {})[entry] = tensor
        # The groups are made anew from the config; what they learned is per weight.
        groups = get_optimizer_state_dict(self.model, self._raw_optimizer)["param_groups"]
        whole: Any = {"state": states, "param_groups": groups}
        set_optimizer_state_dict(self.model, self._raw_optimizer, whole, options=_WHOLE)
        if self.average is not None:
            set_model_state_dict(self.average, parts["average"], options=_WHOLE)
        self.step = checkpoint.step
        self.tokens, self.seconds = int(checkpoint.facts["tokens"]), float(checkpoint.facts["seconds"])
        own = f"{self.accelerator.process_index}."
        _set_random_states(
            {k.removeprefix(own): v for k, v in parts["random"].items() if k.startswith(own)}, self.device
        )

    @property
    def _raw_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)


def _read_random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states if device.type != "cuda" else {**states, "cuda": torch.cuda.get_rng_state(device)}


def _set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
