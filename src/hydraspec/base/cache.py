"""The key-value cache: preallocated slots, a length per sequence, and commit by gather.

A forward writes its tokens behind the committed ones. `commit` keeps the accepted path: it moves the path's keys and
values to the slots right behind the committed tokens and lengthens the sequence; whatever else the forward wrote is
overwritten by the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer

from hydraspec.base.attention import StepLayout
from hydraspec.tree.topology import Tree


class LayerShape(NamedTuple):
    """Heads and widths of a layer's keys and values; they differ in models with latent attention."""

    key_heads: int
    key_width: int
    value_heads: int
    value_width: int


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values `[B, heads, max_length, width]`, views into the cache's slabs."""

    is_compileable = True
    is_sliding = False
    is_croppable = False

    def __init__(self, cache: SlotCache, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.cache, self.keys, self.values = cache, keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the slabs exist before the first forward."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write `[B, heads, T, width]` at the slots of the forward's layout; return the layout's view of the cache."""
        layout = self.cache.layout
        assert layout is not None, "a forward needs a layout: call SlotCache.layout_chain or layout_tree first"
        if layout.start is not None:
            end = layout.start + key_states.shape[2]
            self.keys[layout.rows, :, layout.start : end] = key_states
            self.values[layout.rows, :, layout.start : end] = value_states
        else:
            rows = self.cache.row_numbers[layout.rows]
            self.keys[rows, :, layout.slots] = key_states.transpose(1, 2)
            self.values[rows, :, layout.slots] = value_states.transpose(1, 2)
        return self.keys[layout.rows, :, : layout.view], self.values[layout.rows, :, : layout.view]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that the mask covers, and the first of them."""
        assert self.cache.layout is not None
        return self.cache.layout.view, 0

    def get_seq_length(self) -> int:
        """Always 0: lengths differ by sequence, and a model must take positions from `position_ids` alone."""
        return 0

    def get_max_length(self) -> int:
        """Slots a sequence has."""
        return self.cache.max_length


class SlotCache(Cache):
    """Slots for `batch` sequences of at most `max_length` tokens each, tree nodes included.

    Forwards work on consecutive rows. A row keeps its tokens until `reset` or a forward overwrites them.

    Attributes:
        lengths: committed tokens of each row.
        max_length: slots of each row.
        layout: where the forward in progress writes and looks.
        slabs: tensors `[layers, batch, heads, max_length, width]`: keys and values of one shape lie in one of them.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape | None],
        batch: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shapes, self.max_length = tuple(shapes), max_length
        self.dtype, self.device = dtype, device
        self.lengths: list[int] = [0] * batch
        self.layout: StepLayout | None = None
        self.slabs: list[Tensor] = []
        self.row_numbers = torch.arange(batch, device=device)[:, None]  # [batch, 1], beside [B, T] slots
        # What nodes see of each other, kept between steps: of chains by length, and of trees.
        self._chains: dict[int, Tensor] = {}
        self._trees: dict[Tree, Tensor] = {}
        sizes: dict[tuple[int, int], int] = {}  # (heads, width) -> tensors of that shape
        for shape in self.shapes:
            if shape is not None:
                for key in (shape[:2], shape[2:]):
                    sizes[key] = sizes.get(key, 0) + 1
        order = {key: n for n, key in enumerate(sizes)}
        for (heads, width), count in sizes.items():
            self.slabs.append(torch.zeros(count, batch, heads, max_length, width, dtype=dtype, device=device))
        used = [0] * len(order)
        self._places: list[tuple[tuple[int, int], tuple[int, int]] | None] = []
        for shape in self.shapes:
            if shape is None:
                self._places.append(None)
                continue
            place = []
            for key in (shape[:2], shape[2:]):
                slab = order[key]
                place.append((slab, used[slab]))
                used[slab] += 1
            self._places.append((place[0], place[1]))
        super().__init__(layers=[self._make_layer(place) for place in self._places])

    def _make_layer(self, place: tuple[tuple[int, int], tuple[int, int]] | None) -> CacheLayerMixin | DummyLayer:
        if place is None:  # the layer reads another layer's keys and values
            return DummyLayer()
        (key_slab, key_index), (value_slab, value_index) = place
        return SlotLayer(self, self.slabs[key_slab][key_index], self.slabs[value_slab][value_index])

    def layout_chain(self, width: int, rows: slice) -> StepLayout:
        """Plan a forward of `width` tokens in a row behind the committed ones of `rows` (prefill, or a chain)."""
        lengths = self.lengths[rows]
        first = lengths[0]
        steps = torch.arange(first, first + width, device=self.device)
        if not any(lengths) or (width == 1 and all(length == first for length in lengths)):
            slots = steps.expand(len(lengths), width)
            self.layout = StepLayout(slots, slots, first + width, None, first, rows)
            return self.layout
        if width not in self._chains:
            self._chains[width] = self._make_bias(torch.ones(width, width, dtype=torch.bool, device=self.device).tril())
        return self._layout_nodes(steps - first, self._chains[width], rows)

    def layout_tree(self, tree: Tree, rows: slice) -> StepLayout:
        """Plan a forward of a tree's nodes behind the committed tokens of `rows`."""
        if tree.num_nodes == 1:
            return self.layout_chain(1, rows)
        if tree not in self._trees:
            self._trees[tree] = self._make_bias(tree.ancestors.to(self.device))
        return self._layout_nodes(tree.depths.to(self.device), self._trees[tree], rows)

    def _make_bias(self, visible: Tensor) -> Tensor:
        """What is added to attention scores: 0 where `visible`, else the dtype's minimum."""
        zeros = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
        return zeros.masked_fill_(~visible, torch.finfo(self.dtype).min)

    def _layout_nodes(self, depths: Tensor, bias: Tensor, rows: slice) -> StepLayout:
        """Plan a forward of nodes at `depths` [T] below the committed tokens, who see each other by `bias` [T, T]."""
        lengths = self.lengths[rows]
        batch, width, first = len(lengths), len(depths), lengths[0]
        view = max(lengths) + width
        assert view <= self.max_length, f"{view} slots needed, {self.max_length} there"
        nodes = torch.arange(first, first + width, device=self.device)
        if all(length == first for length in lengths):
            seen = F.pad(bias, (first, 0))[None]
            slots, positions = nodes.expand(batch, width), (depths + first).expand(batch, width)
            self.layout = StepLayout(slots, positions, view, seen, first, rows)
            return self.layout
        ends = send(lengths, self.device)[:, None]
        slots, positions = ends - first + nodes, ends + depths
        seen = self._make_bias(torch.arange(view, device=self.device) < ends)[:, None].repeat(1, width, 1)
        seen.scatter_(2, slots[:, None].expand(batch, width, width), bias.expand(batch, width, width))
        self.layout = StepLayout(slots, positions, view, seen, None, rows)
        return self.layout

    def advance(self, counts: Sequence[int], rows: slice | None = None) -> None:
        """Commit the first `counts[b]` tokens that the last forward wrote for each of `rows`, where they are."""
        rows = rows or slice(0, len(counts))
        for row, count in zip(range(rows.start, rows.stop), counts, strict=True):
            self.lengths[row] += count
            assert self.lengths[row] <= self.max_length

    def commit(self, path: Tensor, counts: Sequence[int], rows: slice | None = None) -> None:
        """Commit the nodes `path[b, :counts[b]]` of the last forward: move their keys and values into place.

        Args:
            path: `[B, A]` node indices in order from the root; entries past the count may be anything.
            counts: nodes that each sequence keeps.
            rows: the B rows of that forward; None: the first ones.
        """
        rows = rows or slice(0, len(counts))
        longest = max(counts)
        if longest > 1:  # the root lies in its place already
            lengths = self.lengths[rows]
            path = path[:, 1:longest]
            behind = torch.arange(1, longest, device=self.device)
            if len(lengths) == 1:
                source, target = lengths[0] + path[0], lengths[0] + behind
                for slab in self.slabs:
                    row = slab[:, rows]
                    row.index_copy_(3, target, row.index_select(3, source))
            else:
                ends, numbers = send(lengths, self.device)[:, None], self.row_numbers[rows]
                source, target = ends + path, ends + behind
                for slab in self.slabs:
                    slab[:, numbers, :, target] = slab[:, numbers, :, source]
        self.advance(counts, rows)

    def reset(self, row: int, length: int = 0) -> None:
        """Forget the tokens of a row, all but its first `length`."""
        assert length <= self.lengths[row] or length == 0
        self.lengths[row] = length

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows."""
        end = max(self.lengths[a], self.lengths[b])
        for slab in self.slabs:
            slab[:, [a, b], :, :end] = slab[:, [b, a], :, :end]
        self.lengths[a], self.lengths[b] = self.lengths[b], self.lengths[a]

    def copy_beginning(self, source: int, target: int, length: int) -> None:
        """Make the first `length` tokens of row `source` all that row `target` holds."""
        assert length <= self.lengths[source]
        for slab in self.slabs:
            slab[:, target, :, :length] = slab[:, source, :, :length]
        self.lengths[target] = length


def count_bytes(shapes: Sequence[LayerShape | None], dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes in all layers together."""
    return sum(s.key_heads * s.key_width + s.value_heads * s.value_width for s in shapes if s) * dtype.itemsize


def send(values: Sequence[int], device: torch.device) -> Tensor:
    """Integers as an int64 tensor on `device`, without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(values, device=device)
    return torch.tensor(values, pin_memory=True).to(device, non_blocking=True)
