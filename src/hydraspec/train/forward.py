"""The loss of draft heads on a batch, given the base model's hidden states: one module, so that it can be wrapped."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydraspec.base.attention import layout_packed
from hydraspec.base.model import BaseModel
from hydraspec.config import TrainingConfig
from hydraspec.heads.protocol import DraftHeads
from hydraspec.train.batch import Batch
from hydraspec.train.objectives import draw_noise, weigh_heads
from hydraspec.train.recipes import mix_of
from hydraspec.train.vocabulary_loss import HeadRows, OutputLayer, Teacher, measure_vocabulary_losses


@dataclass(frozen=True)
class Anchored:
    """A batch on its device, with the places where each head learns."""

    batch: Batch
    anchors: tuple[Tensor, ...]  # [R_i] for each head, flat

    @classmethod
    def of(cls, batch: Batch, num_heads: int, device: torch.device) -> Anchored:
        """Find the anchors of every head and move everything to `device`."""
        anchors = tuple(batch.find_anchors(head).to(device, non_blocking=True) for head in range(num_heads))
        return cls(batch.to(device), anchors)

    def count(self) -> Tensor:
        """Anchors of each head, `[K]` float32 on the host."""
        return torch.tensor([float(len(rows)) for rows in self.anchors])


class TeacherForcedLoss(nn.Module):
    """Draft heads with their objectives: `forward` gives each head's loss on a batch.

    The base model is held beside the module, not in it: it is neither trained, nor saved, nor wrapped with the heads.
    """

    def __init__(self, base: BaseModel, heads: DraftHeads, config: TrainingConfig) -> None:
        super().__init__()
        self.heads = heads
        self._base = (base,)
        self.config, self.mix = config, mix_of(config)
        self.weights = weigh_heads(heads.num_heads, config.head_weights, config.head_decay)
        output = base.output_layer
        weight: Tensor = output.get_parameter("weight").detach()
        bias: Tensor | None = getattr(output, "bias", None)
        self._of_entry: Tensor | None = None  # vocabulary -> entry of the heads' cut vocabulary, or -1
        if heads.token_ids is not None:
            chosen = heads.token_ids.to(base.device)
            weight, bias = weight[chosen], None if bias is None else bias[chosen]
            self._of_entry = torch.full((base.vocab_size,), -1, device=base.device)
            self._of_entry[chosen] = torch.arange(len(chosen), device=base.device)
        self._teacher_layer = OutputLayer(weight, bias, base.logit_scale, base.logit_softcap)

    @property
    def base(self) -> BaseModel:
        """The frozen base model."""
        return self._base[0]

    def forward(self, anchored: Anchored, hidden: Tensor, counts: Tensor) -> Tensor:
        """The losses of the heads, `[K]` float32, to be summed.

        Args:
            anchored: the batch.
            hidden: `[B, T, d]`, the base model's hidden states.
            counts: `[K]`, for each head the anchors of the whole optimiser step, over which its loss is a mean.
        """
        batch, dtype = anchored.batch, self.heads.dtype
        with torch.no_grad():
            embeddings = self.base.embed(batch.ids).to(dtype)
            layout = layout_packed(batch.segments, batch.positions, dtype, hidden.device)
            seen = hidden.to(dtype)
            if self.training and self.config.noise:
                lengths = batch.token_lengths()
                seen = seen + draw_noise(seen, lengths, self.config.noise)
                embeddings = embeddings + draw_noise(embeddings, lengths, self.config.noise)
        with pick_autocast(hidden.device, self.config.autocast):
            states = self.heads.draft_states(seen, embeddings, anchored.anchors, layout)
        scales = [weight / max(count, 1.0) for weight, count in zip(self.weights, counts.tolist(), strict=True)]
        losses = self._score(states, anchored, hidden.flatten(0, 1), scales)
        if self.config.reconstruction_weight:
            losses = losses + self.config.reconstruction_weight * self._reconstruct(states, anchored, hidden, scales)
        return losses

    def _score(self, states: list[Tensor], anchored: Anchored, hidden: Tensor, scales: list[float]) -> Tensor:
        """The objectives that read logits; `hidden` `[B T, d]`."""
        # Head i's target at anchor t is head 0's target at anchor t + i: the teacher is asked once for all heads.
        first = anchored.anchors[0]
        targets = anchored.batch.ids.flatten()[first + 2]
        if self._of_entry is not None:
            targets = self._of_entry[targets]
        rows = []
        for head, (anchors, scale) in enumerate(zip(anchored.anchors, scales, strict=True)):
            teacher_rows = torch.searchsorted(first, anchors + head)
            rows.append(HeadRows(targets[teacher_rows], teacher_rows, scale))
        layers = [self._find_layer(head) for head in range(self.heads.num_heads)]
        dtype = torch.bfloat16 if wants_bfloat16(hidden.device, self.config.autocast) else self.heads.dtype
        teacher = Teacher(hidden[first + 1], self._teacher_layer)
        return measure_vocabulary_losses(states, layers, rows, teacher, self.mix, dtype)

    def _find_layer(self, head: int) -> OutputLayer:
        if not self.heads.vocabulary:
            return self._teacher_layer
        return OutputLayer(*self.heads.vocabulary_weight(head, self.base))

    def _reconstruct(self, states: list[Tensor], anchored: Anchored, hidden: Tensor, scales: list[float]) -> Tensor:
        """SmoothL1 to the true hidden states that the heads' states stand for, `[K]`."""
        flat, losses = hidden.flatten(0, 1), []
        for head, (state, anchors, scale) in enumerate(zip(states, anchored.anchors, scales, strict=True)):
            loss = F.smooth_l1_loss(state.float(), flat[anchors + head + 1].float(), reduction="sum")
            losses.append(loss * (scale / hidden.shape[-1]))
        return torch.stack(losses)


def wants_bfloat16(device: torch.device, choice: str) -> bool:
    """Whether products are to be bfloat16: where the machine has instructions for them, or where it is asked to."""
    if choice == "auto":
        return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return choice == "bfloat16"


def pick_autocast(device: torch.device, choice: str) -> AbstractContextManager:
    """Products in bfloat16 or in the weights' own dtype, see `wants_bfloat16`."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if wants_bfloat16(device, choice) else nullcontext()
