"""The losses over the vocabulary and their gradients, a few rows of one head at a time.

The logits of all heads at all positions would be the largest arrays of training by far. Here the forward pass makes
them for a piece of the rows, reads loss and gradient off them in closed form, and forgets them; the backward pass only
hands out what was found. Rows are the places where heads learn: masked tokens never get logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hydraspec.train.objectives import Mix

LOGITS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 27}  # elements: on a CPU they shall stay in its cache


@dataclass(frozen=True)
class OutputLayer:
    """A vocabulary layer `[V, d]` with its bias and what the base does to its logits afterwards."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def cast(self, dtype: torch.dtype) -> OutputLayer:
        """The same layer for products in `dtype`, detached."""
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return replace(self, weight=self.weight.detach().to(dtype), bias=bias)

    def project(self, states: Tensor) -> Tensor:
        """Logits `[R, V]` float32 of states `[R, d]`."""
        logits = torch.nn.functional.linear(states.to(self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1.0:
            logits *= self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def push_back(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient `[R, V]` before scale and soft cap, from the one behind them. May write to `gradient`."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap).square())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


@dataclass(frozen=True)
class Teacher:
    """Where the base model's own distributions come from."""

    hidden: Tensor  # [U, d]: its hidden states before each target token
    layer: OutputLayer


@dataclass(frozen=True)
class HeadRows:
    """What one head is scored on."""

    targets: Tensor  # [R] int64: entries of the vocabulary layer; -1: the token is none of them
    teacher_rows: Tensor  # [R] int64, ascending: which of the teacher's rows is the target's
    scale: float  # of each row's loss: the head's weight by the rows of the whole step


def measure_vocabulary_losses(
    states: Sequence[Tensor],
    layers: Sequence[OutputLayer],
    rows: Sequence[HeadRows],
    teacher: Teacher,
    mix: Mix,
    dtype: torch.dtype | None = None,
    piece: int | None = None,
) -> Tensor:
    """The losses of all heads, `[K]` float32: for each the scaled sum over its rows of the mixed objectives.

    Args:
        states: for each head what enters its vocabulary layer, `[R_i, d]`; differentiable.
        layers: the heads' vocabulary layers; heads may share one. Weights and biases are differentiable.
        rows: the heads' targets.
        teacher: the base model's view of all target positions.
        mix: the objectives.
        dtype: of the products; None: the layers' own. Losses are float32, gradients of their tensors' dtypes.
        piece: teacher rows to work on at once; None: as many as a processor's cache holds.
    """
    dtype = dtype or teacher.layer.weight.dtype
    ready = {id(layer): layer.cast(dtype) for layer in (*layers, teacher.layer)}
    plan = _Plan(
        layers=tuple(ready[id(layer)] for layer in layers),
        rows=tuple(rows),
        teacher=replace(teacher, layer=ready[id(teacher.layer)]),
        mix=mix,
        piece=piece or _choose_piece(teacher),
    )
    parameters = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    return _VocabularyLosses.apply(plan, len(states), *states, *parameters)


def score_logits(
    logits: Tensor, targets: Tensor, teacher: Tensor | None, log_teacher: Tensor | None, mix: Mix
) -> tuple[Tensor, Tensor]:
    """The mixed loss of each row `[R]`, and its gradient in the logits `[R, V]`; float32. Overwrites `logits`.

    With `a = data + teacher + kl`: the gradient is `a q - data onehot - (teacher + kl) p`, and for the reverse KL
    `q (log q - log p - KL(q || p))`.
    """
    log_q = torch.log_softmax(logits, -1, out=logits)
    losses = torch.zeros(len(logits), device=logits.device)
    known = targets >= 0
    soft = mix.teacher + mix.kl
    if mix.data:
        losses -= mix.data * log_q.gather(1, targets.clamp_min(0)[:, None])[:, 0] * known
    if soft and teacher is not None:
        losses -= soft * torch.linalg.vecdot(teacher, log_q)
    if mix.kl and teacher is not None:
        losses += mix.kl * torch.xlogy(teacher, teacher).sum(-1)
    turned = None
    if mix.reverse_kl and log_teacher is not None:
        difference = log_q - log_teacher
        probabilities = log_q.exp()
        divergence = torch.linalg.vecdot(probabilities, difference)
        losses += mix.reverse_kl * divergence
        turned = difference.sub_(divergence[:, None]).mul_(probabilities).mul_(mix.reverse_kl)
    gradient = log_q.exp_()
    if mix.data:
        gradient *= (soft + mix.data * known.float())[:, None]
        gradient.scatter_add_(1, targets.clamp_min(0)[:, None], -(mix.data * known.float())[:, None])
    elif soft != 1.0:
        gradient *= soft
    if soft and teacher is not None:
        gradient.sub_(teacher, alpha=soft)
    return losses, gradient if turned is None else gradient.add_(turned)


@dataclass(frozen=True)
class _Plan:
    layers: tuple[OutputLayer, ...]
    rows: tuple[HeadRows, ...]
    teacher: Teacher
    mix: Mix
    piece: int


class _VocabularyLosses(torch.autograd.Function):
    """Forward finds the gradients as well; backward scales them. See `measure_vocabulary_losses`."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, heads: int, *tensors: Tensor | None) -> Tensor:
        """Losses `[K]`."""
        states, parameters = tensors[:heads], tensors[heads:]
        wanted = ctx.needs_input_grad[2:]
        gradients: list[Tensor | None] = [
            torch.zeros_like(tensor, memory_format=torch.contiguous_format) if tensor is not None and needed else None
            for tensor, needed in zip(tensors, wanted, strict=True)
        ]
        losses = torch.zeros(heads, device=plan.teacher.hidden.device)
        bounds = range(0, len(plan.teacher.hidden), plan.piece)
        cuts = [
            torch.searchsorted(rows.teacher_rows, rows.teacher_rows.new_tensor([*bounds, 1 << 62])).tolist()
            for rows in plan.rows
        ]
        for place, first in enumerate(bounds):
            p = log_p = None
            if plan.mix.needs_teacher:
                logits = plan.teacher.layer.project(plan.teacher.hidden[first : first + plan.piece])
                p = torch.softmax(logits, -1)
                if plan.mix.reverse_kl:
                    log_p = p.clamp_min(torch.finfo(torch.float32).tiny).log_()
            for head, (layer, rows) in enumerate(zip(plan.layers, plan.rows, strict=True)):
                part = slice(cuts[head][place], cuts[head][place + 1])
                own = states[head]
                assert own is not None
                if part.start == part.stop:
                    continue
                seen = own[part]
                chosen = rows.teacher_rows[part] - first
                logits = layer.project(seen)
                before = logits.clone() if layer.softcap is not None else logits
                one_to_one = p is not None and part.stop - part.start == len(p)
                value, gradient = score_logits(
                    logits,
                    rows.targets[part],
                    p if p is None or one_to_one else p[chosen],
                    log_p if log_p is None or one_to_one else log_p[chosen],
                    plan.mix,
                )
                losses[head] += value.sum() * rows.scale
                gradient = layer.push_back(gradient.mul_(rows.scale), before).to(layer.weight.dtype)
                if (into := gradients[head]) is not None:
                    into[part] = (gradient @ layer.weight).to(into.dtype)
                if (into := gradients[heads + 2 * head]) is not None:
                    into += (gradient.t() @ seen.to(gradient.dtype)).to(into.dtype)
                if (into := gradients[heads + 2 * head + 1]) is not None:
                    into += gradient.sum(0, dtype=into.dtype)
        assert len(parameters) == 2 * heads
        ctx.heads = heads
        ctx.save_for_backward(*(gradient for gradient in gradients if gradient is not None))
        ctx.given = [gradient is not None for gradient in gradients]
        return losses

    @staticmethod
    def backward(ctx: Any, *outside: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, scaled by those of the losses `[K]`."""
        (scale,) = outside
        saved = iter(ctx.saved_tensors)
        result: list[Tensor | None] = []
        for place, given in enumerate(ctx.given):
            head = place if place < ctx.heads else (place - ctx.heads) // 2
            result.append(next(saved) * scale[head] if given else None)
        return (None, None, *result)


def _choose_piece(teacher: Teacher) -> int:
    width = len(teacher.layer.weight)
    return max(32, LOGITS_AT_ONCE.get(teacher.hidden.device.type, 1 << 27) // width)
