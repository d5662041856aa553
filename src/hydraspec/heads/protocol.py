"""What every kind of draft heads offers to the decode loop and to training.

Notation: d hidden size, V vocabulary, h_t the base model's final hidden state at the last verified position t, E its
input embedding, x_{t+1} the root. Head i = 0 … K-1 predicts x_{t+2+i}, the tokens at depth i + 1 of the tree.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hydraspec.base.attention import StepLayout
from hydraspec.base.facts import store_columns_first
from hydraspec.base.model import BaseModel
from hydraspec.base.packed import BYTES_LIMIT, PackedLinear, supports
from hydraspec.config import HeadsConfig


@dataclass
class HeadState:
    """What heads remember of the sequences between steps, in the rows of the base model's cache."""

    context: Tensor  # [rows, d]: stands for h_t
    memory: Any = None  # what else this kind of heads keeps, such as a cache of its own: see `SlotCache`
    read: Tensor | None = None  # [B, K, 2d]: what the context adds to the first blocks, within one step
    view: int = 0  # slots of the memory, from the first, that a draft needs at most; 0: all of them

    def first(self, count: int, view: int = 0) -> HeadState:
        """The state of the first `count` rows, to guess with."""
        return HeadState(self.context[:count], self.memory, view=view)

    def reset(self, row: int, length: int = 0) -> None:
        """Forget the tokens of a row, all but its first `length`."""
        if self.memory is not None:
            self.memory.reset(row, length)

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows."""
        self.context[[a, b]] = self.context[[b, a]]
        if self.memory is not None:
            self.memory.swap(a, b)

    def copy_beginning(self, source: int, target: int, length: int) -> None:
        """Make the first `length` tokens of row `source` all that row `target` remembers."""
        if self.memory is not None:
            self.memory.copy_beginning(source, target, length)


class DraftHeads(nn.Module):
    """K heads that guess the tokens after the root, each with its vocabulary layer.

    Subclasses say what a head computes: in decoding `observe` and `guess`, in training `draft_states`.

    Raises:
        HydraspecError: the config asks for what this kind of heads has not.
    """

    grounded: ClassVar[bool]  # a guess depends on the path to the node

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        size = config.draft_vocabulary or config.vocab_size
        self.vocabulary = nn.ModuleList(
            [] if config.tied_vocabulary else [nn.Linear(config.hidden_size, size) for _ in range(config.num_heads)]
        )
        self._packed: list[PackedLinear] = []  # the vocabulary layers of prepared heads
        # Which tokens are proposed, where not all are: exact output does not depend on it, the cost of a draft does.
        self.token_ids: Tensor | None
        self.register_buffer(
            "token_ids", torch.zeros(config.draft_vocabulary, dtype=torch.long) if config.draft_vocabulary else None
        )

    @classmethod
    def count_decoder_layers(cls, num_layers: int) -> int:
        """Decoder layers that heads of `num_layers` have; their config is `HeadsConfig.prefix_layer`."""
        return 0

    @property
    def num_heads(self) -> int:
        """Tokens that the heads guess ahead: the deepest tree that they can fill."""
        return self.config.num_heads

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    @torch.no_grad()
    def start_from(self, base: BaseModel) -> None:
        """Initialise separate vocabulary layers from the base model's lm_head."""
        weight, bias = self._read_output_layer(base)
        for layer in self.vocabulary:
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(weight)
            layer.bias.zero_() if bias is None else layer.bias.copy_(bias)

    def _read_output_layer(self, base: BaseModel) -> tuple[Tensor, Tensor | None]:
        """Weight `[V', d]` and bias of the base model's output layer, of the tokens that are proposed."""
        weight, bias = base.output_layer.get_parameter("weight"), getattr(base.output_layer, "bias", None)
        if self.token_ids is None:
            return weight, bias
        rows = self.token_ids.to(weight.device)
        return weight[rows], None if bias is None else bias[rows]

    # -- decoding ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, base: BaseModel, dtype: torch.dtype | None = None) -> DraftHeads:
        """Make the heads ready for decoding, and for that only: device, dtype, cut vocabulary layers, no gradients.

        Args:
            base: the model that they draft for.
            dtype: of their weights; it may be smaller than the base model's, see `choose_draft_dtype`. None: the same.
        """
        self.to(device=base.device).eval()
        for parameter in self.parameters():  # not the buffers: rotary frequencies lose their meaning in bfloat16
            parameter.data = parameter.data.to(dtype or base.dtype)
        if self.token_ids is not None and not self.vocabulary:
            self.vocabulary = nn.ModuleList([self._copy_output_layer(base)] * self.num_heads)
        self.requires_grad_(False)
        self._prepare_parts(base)
        if base.device.type == "cpu":
            if self.dtype == torch.float32:
                store_columns_first(self)
            # Large heads would need too much memory twice.
            if sum(parameter.numel() * parameter.itemsize for parameter in self.parameters()) <= BYTES_LIMIT:
                self._pack(base)
        return self

    def _prepare_parts(self, base: BaseModel) -> None:
        """What a kind of heads computes ahead of decoding; weights are frozen and where they belong."""

    def _pack(self, base: BaseModel) -> None:
        """Lay out the weights for products of few rows on a CPU."""
        # The base model's own scale and soft cap change no order.
        layers = list(self.vocabulary) or [self._copy_output_layer(base)] * self.num_heads
        packed = {layer: PackedLinear.stack([layer]) for layer in layers}  # heads may share one
        self._packed = [packed[layer] for layer in layers]

    def _copy_output_layer(self, base: BaseModel) -> nn.Linear:
        """The base model's output layer in the dtype of the heads, of the tokens that are proposed."""
        weight, bias = self._read_output_layer(base)
        layer = nn.Linear(weight.shape[1], len(weight), bias is not None, weight.device, self.dtype)
        layer.weight.data = weight.detach().to(self.dtype)
        if bias is not None:
            layer.bias.data = bias.detach().to(self.dtype)
        return layer

    def name_tokens(self, proposals: Tensor) -> Tensor:
        """Token ids of the entries of `guess`'s last dimension."""
        return proposals if self.token_ids is None else self.token_ids.take(proposals)

    def new_state(self, batch: int, max_length: int) -> HeadState:
        """An empty state for `batch` sequences of at most `max_length` tokens. The heads must be prepared."""
        device = next(self.parameters()).device
        return HeadState(torch.zeros(batch, self.config.hidden_size, dtype=self.dtype, device=device))

    def count_bytes(self, max_length: int) -> int:
        """Bytes that the state of one sequence of at most `max_length` tokens takes besides its context."""
        return 0

    def count_view(self, state: HeadState, rows: int, nodes: int) -> int:
        """Slots of the state's memory that the draft of a tree of `nodes` needs for the first `rows`."""
        return 0

    @abstractmethod
    def observe(self, state: HeadState, hidden: Tensor, tokens: Tensor, counts: Sequence[int], rows: slice) -> None:
        """Read newly committed tokens, of prompts as of accepted paths. Updates `state`.

        Args:
            state: of the sequences.
            hidden: `[B, A, d]`, the base model's hidden states at these tokens, right-padded.
            tokens: `[B, A]` int64, right-padded.
            counts: real tokens of each sequence.
            rows: the B rows of the state that the sequences lie in.
        """

    @abstractmethod
    def guess(self, head: int, state: HeadState, path: Tensor, base: BaseModel, nodes: Tensor) -> Tensor:
        """Logits of the children of nodes at depth `head`; heads guess in order, from head 0. They must be prepared.

        Args:
            head: which head, from 0.
            state: the running batch, see `HeadState.first`.
            path: `[B, P, head + 1]` int64, the tokens from the root to each of P nodes.
            base: the model that the heads were prepared for.
            nodes: `[P, head + 1]` int64, which nodes of the tree these are; the root is 0.

        Returns:
            `[B, P, V]`, or `[B, 1, V]` where the path does not matter; V as `name_tokens` reads it.
        """

    def _name(self, head: int, states: Tensor, base: BaseModel) -> Tensor:
        """Logits of a head from what enters its vocabulary layer."""
        layers = self._packed or self.vocabulary
        if layers:
            return layers[head](states)
        logits = base.project(states.to(base.dtype))
        return logits if self.token_ids is None else logits[..., self.token_ids]

    # -- training ----------------------------------------------------------------------------------------------

    @abstractmethod
    def draft_states(
        self, hidden: Tensor, embeddings: Tensor, anchors: Sequence[Tensor], layout: StepLayout | None = None
    ) -> list[Tensor]:
        """What enters the vocabulary layer of each head, teacher-forced: for head i `[R_i, d]`.

        Each takes part in the gradient of every weight but the vocabulary layers', even where R_i is 0.

        Args:
            hidden: `[B, T, d]`, h at every position.
            embeddings: `[B, T, d]`, E(x) at every position.
            anchors: for each head the positions t to guess from, `[R_i]` int64, flat: row * T + t.
            layout: which positions are of one text; None: one text a row.
        """

    def vocabulary_weight(self, head: int, base: BaseModel) -> tuple[Tensor, Tensor | None]:
        """Weight `[V', d]` and bias `[V']` of a head's vocabulary layer: its own, or the base model's.

        V' is the draft vocabulary where there is one. The base model's logit scale and soft cap are left out.
        """
        if not self.vocabulary:
            return self._read_output_layer(base)
        layer = self.vocabulary[head]
        return layer.get_parameter("weight"), layer.get_parameter("bias")


def choose_draft_dtype(base: BaseModel) -> torch.dtype:
    """bfloat16 beside a float32 base model where the CPU computes in it, else the base model's dtype.

    Drafts need not be exact: half the bytes and faster products are worth a guess that now and then differs.
    """
    if base.dtype == torch.float32 and supports(base.device, torch.bfloat16):
        return torch.bfloat16
    return base.dtype
