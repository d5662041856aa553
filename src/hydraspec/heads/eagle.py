"""The EAGLE head: one small decoder, run again and again on its own predictions of the hidden state.

Notation: entry j is what the decoder reads for token x_j, `fc([E(x_j) ; h_{j-1}])`, at position j; what comes out
stands for h_j, and the base model's own vocabulary layer reads it. Below the root h is not known: an entry takes its
parent's prediction instead. The first token of a text has no h before it, and takes zeros.

Source: EAGLE (Li et al. 2024), section 4.1, with the norms that its base model's layers have; EAGLE-1 as published has
neither the one before the first layer nor the final one (`HeadsConfig.outer_norms`). It is trained on its own
predictions, as HASS (Zhang et al. 2024) and EAGLE-3 (Li et al. 2025, "training-time test") do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydraspec.base.attention import StepLayout
from hydraspec.base.cache import SlotCache, count_bytes, send
from hydraspec.base.model import BaseModel
from hydraspec.base.packed import PackedLinear
from hydraspec.config import HeadsConfig
from hydraspec.errors import HydraspecError
from hydraspec.heads.blocks import gather_last
from hydraspec.heads.decoder import GrowingCache, HiddenDecoder, PlacedLayout, layout_rows
from hydraspec.heads.protocol import DraftHeads, HeadState
from hydraspec.heads.tables import BYTES_LIMIT


class EagleMemory:
    """What the EAGLE head remembers of the sequences, in the rows of the base model's cache.

    Behind the committed tokens of a row lie the nodes of the tree that is being filled: node n in slot length + n.

    Attributes:
        cache: keys and values of the entries, entry j in slot j.
        before: `[rows, slots, d]`, for slot j what stands for h_{j-1}: zeros for the first.
        ends: `[rows]` int64, the lengths of the rows, where recorded drafts can read them.
    """

    def __init__(self, cache: SlotCache, width: int) -> None:
        rows = len(cache.lengths)
        self.cache = cache
        self.before = torch.zeros(rows, cache.max_length, width, dtype=cache.dtype, device=cache.device)
        self.ends = torch.zeros(rows, dtype=torch.long, device=cache.device)

    def reset(self, row: int, length: int) -> None:
        """Forget the tokens of a row, all but its first `length`."""
        self.cache.reset(row, length)
        self.ends[row] = length

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows."""
        end = max(self.cache.lengths[a], self.cache.lengths[b]) + 1
        self.before[[a, b], :end] = self.before[[b, a], :end]
        self.ends[[a, b]] = self.ends[[b, a]]
        self.cache.swap(a, b)

    def copy_beginning(self, source: int, target: int, length: int) -> None:
        """Make the first `length` tokens of row `source` all that row `target` remembers."""
        self.cache.copy_beginning(source, target, length)
        self.before[target, : length + 1] = self.before[source, : length + 1]
        self.ends[target] = length

    def layout_nodes(self, nodes: Tensor, batch: int, view: int) -> PlacedLayout:
        """Plan a forward of the last nodes of the paths `nodes` `[P, depth + 1]`, each of which sees its path."""
        count, length = nodes.shape
        device, ends = self.cache.device, self.ends[:batch, None]
        places = ends[..., None] + nodes  # [B, P, depth + 1] slots
        lowest = torch.finfo(self.cache.dtype).min
        every = torch.arange(view, device=device)
        bias = torch.zeros(batch, view, dtype=self.cache.dtype, device=device)
        bias = bias.masked_fill_(every >= ends, lowest)[:, None].repeat(1, count, 1).scatter_(2, places, 0.0)
        depths = (ends + torch.arange(length, device=device))[:, None].expand_as(places)
        positions = every.repeat(batch, 1).scatter_(1, places.flatten(1), depths.flatten(1))
        return PlacedLayout(
            places[..., -1], depths[..., -1], view, bias, None, slice(0, batch), slot_positions=positions
        )


class EagleHeads(DraftHeads):
    """One head run K times: `num_heads` is how often, `num_layers` how many decoder layers it has."""

    grounded = True

    def __init__(self, config: HeadsConfig) -> None:
        if not config.tied_vocabulary:
            raise HydraspecError("the eagle head names tokens by the base model's lm_head: leave tied_vocabulary on")
        super().__init__(config)
        d = config.hidden_size
        self.fc = nn.Linear(2 * d, d)
        self.layers = HiddenDecoder(config.prefix_layer, config.outer_norms)
        # Of prepared heads: what tokens add to an entry, by table where it is small, and what states add.
        self._base: tuple[BaseModel, ...] = ()
        self._table: Tensor | None = None  # [V, d]
        self._read_state: PackedLinear | None = None

    @classmethod
    def count_decoder_layers(cls, num_layers: int) -> int:
        """All of them."""
        return num_layers

    @torch.no_grad()
    def start_from(self, base: BaseModel) -> None:
        """Take over the base model's final norm, where it is of the same kind: both end in the same space."""
        theirs, ours = getattr(base.model.base_model, "norm", None), getattr(self.layers.decoder, "norm", None)
        if isinstance(ours, nn.Module) and isinstance(theirs, type(ours)):
            ours.load_state_dict(theirs.state_dict())

    # -- decoding ----------------------------------------------------------------------------------------------------

    def _prepare_parts(self, base: BaseModel) -> None:
        d = self.config.hidden_size
        self._base = (base,)  # in a tuple: it is no part of this module
        self._read_state = PackedLinear(self.fc.weight[:, d:])
        if base.vocab_size * d * self.dtype.itemsize <= BYTES_LIMIT:
            self._table = self._read_tokens(torch.arange(base.vocab_size, device=base.device))
        self.layers.fuse()

    def _read_tokens(self, tokens: Tensor) -> Tensor:
        """What tokens add to their entries, `[..., d]`."""
        if self._table is not None:
            return F.embedding(tokens, self._table)
        embeddings = self._base[0].embed(tokens).to(self.dtype)
        return F.linear(embeddings, self.fc.weight[:, : self.config.hidden_size], self.fc.bias)

    def _enter(self, tokens: Tensor, before: Tensor) -> Tensor:
        """The entries of tokens `[...]` behind states `[..., d]`."""
        assert self._read_state is not None, "the heads must be prepared"
        return self._read_state(before, self._read_tokens(tokens))

    def new_state(self, batch: int, max_length: int) -> HeadState:
        """As for all heads, with an empty memory."""
        state = super().new_state(batch, max_length)
        cache = self.layers.new_cache(batch, self._count_slots(max_length))
        state.memory = EagleMemory(cache, self.config.hidden_size)
        return state

    def count_bytes(self, max_length: int) -> int:
        """Those of keys, values and hidden states."""
        width = self.config.hidden_size * self.dtype.itemsize
        return self._count_slots(max_length) * (count_bytes(self.layers.find_shapes(), self.dtype) + width)

    def _count_slots(self, max_length: int) -> int:
        # As for the prefix layer; and the last token's hidden state lies in the slot behind it.
        return max_length + self.num_heads + 2

    def count_view(self, state: HeadState, rows: int, nodes: int) -> int:
        """The longest row and the tree behind it."""
        return max(state.memory.cache.lengths[:rows]) + nodes

    def observe(self, state: HeadState, hidden: Tensor, tokens: Tensor, counts: Sequence[int], rows: slice) -> None:
        """Commit the entries of new tokens, with the true hidden states before them; see `DraftHeads.observe`."""
        memory, hidden = state.memory, hidden.to(self.dtype)
        numbers, ends = memory.cache.row_numbers[rows], memory.ends[rows, None]
        before = torch.cat([memory.before[numbers, ends], hidden], 1)  # [B, A + 1, d]
        self.layers.extend(self._enter(tokens, before[:, :-1]), counts, memory.cache, rows)
        memory.before[numbers, ends + torch.arange(1, before.shape[1], device=ends.device)] = hidden
        memory.ends[rows] += send(counts, ends.device)
        state.context[rows] = gather_last(hidden, counts)

    def guess(self, head: int, state: HeadState, path: Tensor, base: BaseModel, nodes: Tensor) -> Tensor:
        """Logits of the children of nodes at depth `head`; see `DraftHeads.guess`."""
        memory, batch = state.memory, len(path)
        most = memory.cache.max_length
        layout = memory.layout_nodes(nodes, batch, min(state.view or most, most))
        numbers = memory.cache.row_numbers[:batch]
        parents = layout.slots if head == 0 else memory.ends[:batch, None] + nodes[:, -2] + 1
        entries = self._enter(path[..., -1], memory.before[numbers, parents])
        out = self.layers.run(entries, layout, memory.cache)
        memory.before[numbers, layout.slots + 1] = out
        return self._name(head, out, base)

    # -- training ----------------------------------------------------------------------------------------------------

    def draft_states(
        self, hidden: Tensor, embeddings: Tensor, anchors: Sequence[Tensor], layout: StepLayout | None = None
    ) -> list[Tensor]:
        """The predicted hidden states after dropout, for head i `[R_i, d]`; see `DraftHeads.draft_states`.

        First all true entries are read. In step i each entry j goes on with the token that is i further and its own
        last prediction, and sees the true entries up to j and its own further ones.
        """
        layout = layout or layout_rows(hidden)
        before = F.pad(hidden, (0, 0, 1, -1)) * (layout.positions != 0)[..., None]  # entry j: h_{j-1}
        seen, states = GrowingCache(), []
        for step, rows in enumerate(anchors):
            ahead = F.pad(embeddings, (0, 0, 0, step))[:, step:]  # entry j: E(x_{j+step})
            entries = self.fc(self._drop(torch.cat([ahead, before], -1)))
            before = self.layers(entries, layout if step == 0 else go_on(layout, step, hidden.dtype), seen)
            states.append(self._drop(before.flatten(0, 1).index_select(0, rows + 1)))  # anchor t is entry t + 1's
        return states

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x


def go_on(layout: StepLayout, step: int, dtype: torch.dtype) -> PlacedLayout:
    """The layout of step `step` of a chain begun at each entry of `layout`, over `step` times its slots and these."""
    width, device = layout.view, layout.slots.device
    lowest = torch.finfo(dtype).min
    order = layout.bias
    if order is None:
        order = torch.zeros(1, width, width, dtype=dtype, device=device)
        order = order.masked_fill_(torch.ones(width, width, dtype=torch.bool, device=device).triu_(1), lowest)
    own = torch.full((width, width), lowest, dtype=order.dtype, device=device).fill_diagonal_(0.0)
    bias = torch.cat([order, own.repeat(1, step).expand(len(order), -1, -1)], -1)
    positions = torch.cat([layout.positions + ahead for ahead in range(step + 1)], 1)
    slots = layout.slots + step * width
    return PlacedLayout(
        slots, layout.positions + step, width * (step + 1), bias, None, layout.rows, slot_positions=positions
    )
