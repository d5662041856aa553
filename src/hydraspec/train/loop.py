"""Teacher-forced training of draft heads on a frozen base model."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from hydraspec.base.model import BaseModel
from hydraspec.config import TrainingConfig
from hydraspec.errors import HydraspecError
from hydraspec.heads.protocol import DraftHeads
from hydraspec.train.data import Batch, Example, iterate_epochs, make_batches
from hydraspec.train.objectives import cross_entropy, teacher_cross_entropy

logger = logging.getLogger(__name__)

# What the paper trains each kind with: (blocks a head, weight of the teacher loss, weight of the data loss).
PAPER_RECIPES = {"medusa": (1, 0.0, 1.0), "hydra": (1, 0.0, 1.0), "hydra++": (4, 1.0, 0.0)}


@dataclass(frozen=True)
class Progress:
    """What a training step tells whoever watches."""

    step: int
    steps: int
    tokens: int  # trained on so far, padding left out
    loss: float
    seconds: float


@dataclass(frozen=True)
class HeadAccuracy:
    """How often a head is right about held-out text: its guess against the token that stands there."""

    top1: float
    top5: float


def resolve_recipe(kind: str, config: TrainingConfig) -> tuple[int, float, float]:
    """Blocks a head, teacher weight and data weight: the config's, or the paper's where it leaves them open."""
    layers, teacher, data = PAPER_RECIPES.get(kind, PAPER_RECIPES["hydra"])
    return (
        config.num_layers or layers,
        config.teacher_weight if config.teacher_weight >= 0 else teacher,
        config.data_weight if config.data_weight >= 0 else data,
    )


def pick_autocast(base: BaseModel, choice: str) -> AbstractContextManager:
    """bfloat16 products where the machine has instructions for them (or is asked to), else the weights' own dtype."""
    if choice == "auto":
        choice = "bfloat16" if base.device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() else "float32"
    if choice == "float32":
        return nullcontext()
    return torch.autocast(base.device.type, dtype=torch.bfloat16)


def head_rows(batch: Batch, head: int) -> tuple[Tensor, Tensor]:
    """Where head `head` is trained: indices (row, t) for which x_{t+1} and x_{t+2+head} are the assistant's."""
    reach = head + 2
    if batch.mask.shape[1] <= reach:
        empty = torch.zeros(0, dtype=torch.long)
        return empty, empty
    valid = batch.mask[:, 1 : -(reach - 1)] & batch.mask[:, reach:]
    rows, times = valid.nonzero(as_tuple=True)
    return rows, times


def path_embeddings(base: BaseModel, batch: Batch, rows: Tensor, times: Tensor, head: int) -> Tensor:
    """Embeddings `[R, head + 1, d]` of x_{t+1} … x_{t+1+head}."""
    steps = torch.arange(1, head + 2)
    return base.embed(batch.ids[rows[:, None], times[:, None] + steps].to(base.device))


@dataclass(frozen=True)
class Scored:
    """The logits `[R, V]` of one head at the places `(rows, times)` of a batch where it is trained."""

    head: int
    rows: Tensor
    times: Tensor
    logits: Tensor


def score_heads(base: BaseModel, heads: DraftHeads, batch: Batch, hidden: Tensor) -> Iterator[Scored]:
    """Run each head over a batch, given the true tokens before; `hidden` `[B, T, d]` is the base model's."""
    # Heads are trained in float32 whatever the base's dtype is; only its own layers get its dtype.
    dtype = next(heads.parameters()).dtype
    contexts = heads.read_contexts(hidden.to(dtype))

    def project(states: Tensor) -> Tensor:
        return base.project(states.to(base.dtype))

    for head in range(heads.num_heads):
        rows, times = head_rows(batch, head)
        if len(rows):
            path = path_embeddings(base, batch, rows, times, head).to(dtype) if heads.grounded else None
            yield Scored(head, rows, times, heads.score(head, contexts[rows, times], path, project))


def compute_loss(
    base: BaseModel, heads: DraftHeads, batch: Batch, teacher_weight: float, data_weight: float
) -> Tensor | None:
    """The sum over heads of each head's mean loss on one batch; None where the batch trains nothing."""
    hidden = base.read_hidden_states(batch.ids.to(base.device))
    teacher, teacher_row = _read_teacher(base, hidden, batch) if teacher_weight else (None, None)
    losses = []
    for scored in score_heads(base, heads, batch, hidden):
        rows, times = scored.rows, scored.times
        if data_weight:
            targets = batch.ids[rows, times + scored.head + 2].to(base.device)
            losses.append(data_weight * cross_entropy(scored.logits, targets))
        if teacher is not None and teacher_row is not None:
            target = teacher[teacher_row[rows, times + scored.head + 1].to(base.device)]
            losses.append(teacher_weight * teacher_cross_entropy(scored.logits, target))
    return torch.stack(losses).sum() if losses else None


@torch.no_grad()
def _read_teacher(base: BaseModel, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The base's distributions `[R, V]` before each of the assistant's tokens, and the row of each position."""
    before = torch.zeros_like(batch.mask)
    before[:, :-1] = batch.mask[:, 1:]
    rows, times = before.nonzero(as_tuple=True)
    index = torch.zeros(batch.mask.shape, dtype=torch.long)
    index[rows, times] = torch.arange(len(rows))
    return torch.softmax(base.project(hidden[rows, times]).float(), -1), index


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from the peak to `final_learning_rate` times the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    floor = config.final_learning_rate
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(heads: DraftHeads, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices only."""
    matrices = [p for p in heads.parameters() if p.ndim > 1]
    others = [p for p in heads.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def plan_steps(examples: Sequence[Example], config: TrainingConfig) -> list[Batch]:
    """The batches of a run in order: `epochs` passes, or as many as give `max_tokens` tokens."""
    epochs = config.epochs
    if config.max_tokens:
        epochs = max(1, math.ceil(config.max_tokens / sum(len(e.ids) for e in examples)))
    plan, tokens = [], 0
    for batch in iterate_epochs(examples, config.batch_tokens, config.seed, epochs):
        plan.append(batch)
        tokens += batch.num_tokens
        if config.max_tokens and tokens >= config.max_tokens:
            break
    return plan


def train(
    base: BaseModel,
    heads: DraftHeads,
    batches: Sequence[Batch],
    config: TrainingConfig,
    watch: Callable[[Progress], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Train `heads` in place on `batches`, in order.

    Args:
        base: the frozen base model.
        heads: changed by the training.
        batches: see `plan_steps`.
        config: learning rate, losses and the rest.
        watch: told about each step.
        stopped: asked before each step; True ends the run early.

    Returns:
        Steps done.

    Raises:
        HydraspecError: the loss is not a number.
    """
    _, teacher_weight, data_weight = resolve_recipe(heads.config.kind, config)
    optimizer = make_optimizer(heads, config)
    heads.to(base.device).train()
    tokens, start = 0, time.perf_counter()
    for step, batch in enumerate(batches):
        if stopped():
            return step
        rate = learning_rate(config, step, len(batches))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with pick_autocast(base, config.autocast):
            loss = compute_loss(base, heads, batch, teacher_weight, data_weight)
        tokens += batch.num_tokens
        if loss is not None:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(heads.parameters(), config.clip)
            optimizer.step()
        value = float(loss.detach()) if loss is not None else 0.0
        if not math.isfinite(value):
            raise HydraspecError(f"the loss is {value} at step {step}: lower --learning-rate, or check the data")
        watch(Progress(step + 1, len(batches), tokens, value, time.perf_counter() - start))
    return len(batches)


@torch.inference_mode()
def measure_accuracy(base: BaseModel, heads: DraftHeads, examples: Sequence[Example]) -> list[HeadAccuracy]:
    """Top-1 and top-5 accuracy of each head on held-out conversations, given the true tokens before."""
    heads.eval()
    right1 = torch.zeros(heads.num_heads)
    right5 = torch.zeros(heads.num_heads)
    total = torch.zeros(heads.num_heads)
    for batch in make_batches(examples, batch_tokens=4096, seed=0):
        hidden = base.read_hidden_states(batch.ids.to(base.device))
        for scored in score_heads(base, heads, batch, hidden):
            best = scored.logits.topk(5, dim=-1).indices.cpu()
            right = best == batch.ids[scored.rows, scored.times + scored.head + 2][:, None]
            right1[scored.head] += right[:, 0].sum()
            right5[scored.head] += right.any(-1).sum()
            total[scored.head] += len(right)
    total = total.clamp_min(1)
    return [HeadAccuracy(float(a), float(b)) for a, b in zip(right1 / total, right5 / total, strict=True)]
