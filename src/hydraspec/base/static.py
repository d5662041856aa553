"""Verification with static shapes: one forward a (batch, tree, view), compiled, or replayed as a CUDA graph.

Batches and views are rounded up to a few sizes; what a forward reads besides weights and cache lies in buffers that
are filled in place. The eager forward stays the oracle: the first result of each shape is compared with it, and a shape
whose result differs, or that cannot be compiled, is verified eagerly from then on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

from hydraspec.base.attention import StepLayout, attend_with
from hydraspec.base.cache import SlotCache, send
from hydraspec.base.model import BaseModel
from hydraspec.tree.topology import Tree
from hydraspec.types import Verified

logger = logging.getLogger(__name__)

LEAST_VIEW = 128


@dataclass
class Shape:
    """Buffers and forward of one shape: `rows` sequences, N nodes, a view of S slots."""

    layout: StepLayout
    ids: Tensor  # [rows, N]
    masks: Tensor | dict[str, Tensor]  # [rows or 1, 1, N, S] each
    forward: Callable[[], Verified] | None  # None: verify eagerly


class StaticForward:
    """Verifies trees for one cache, whose address the compiled or recorded forwards hold on to.

    Args:
        base: the base model.
        cache: its rows from 0 on are verified; rows beyond the batch are computed too, and ignored.
        compiler: a backend of torch.compile, for instance `inductor`; None: no compilation.
    """

    def __init__(self, base: BaseModel, cache: SlotCache, compiler: str | None) -> None:
        self.base, self.cache, self.compiler = base, cache, compiler
        self._shapes: dict[tuple[int, Tree, int], Shape] = {}
        if compiler is not None:
            for slab in cache.slabs:
                torch._dynamo.mark_static_address(slab)

    @torch.inference_mode()
    def verify(self, tokens: Tensor, tree: Tree) -> Verified:
        """As `BaseModel.verify`. The result lies in buffers that the next call overwrites."""
        batch = len(tokens)
        rows = round_up(batch, len(self.cache.lengths))
        needed = max(self.cache.lengths[:rows]) + tree.num_nodes
        view = min(max(LEAST_VIEW, 1 << (needed - 1).bit_length()), self.cache.max_length)
        key = (rows, tree, view)
        if key not in self._shapes:
            self._shapes[key] = self._prepare(tokens, rows, tree, view)
        shape = self._shapes[key]
        if shape.forward is None:
            return self.base.verify(tokens, tree, self.cache)
        self._fill(shape, tokens, tree)
        self.cache.layout = shape.layout
        verified = shape.forward()
        return Verified(verified.logits[:batch], verified.hidden[:batch])

    def _fill(self, shape: Shape, tokens: Tensor, tree: Tree) -> None:
        """Write this step's tokens, places and masks into the shape's buffers."""
        layout, device = shape.layout, self.cache.device
        shape.ids[: len(tokens)] = tokens
        ends = send(self.cache.lengths[layout.rows], device)[:, None]
        torch.add(ends, torch.arange(tree.num_nodes, device=device), out=layout.slots)
        torch.add(ends, tree.depths, out=layout.positions)
        bias = layout.bias
        assert bias is not None
        lowest = torch.finfo(bias.dtype).min
        bias.fill_(lowest).masked_fill_((torch.arange(layout.view, device=device) < ends)[:, None], 0.0)
        seen = torch.zeros_like(tree.ancestors, dtype=bias.dtype).masked_fill_(~tree.ancestors, lowest)
        bias.scatter_(2, layout.slots[:, None].expand(-1, tree.num_nodes, -1), seen.expand(len(bias), -1, -1))
        masks = self._make_masks(layout)
        if isinstance(masks, dict):
            assert isinstance(shape.masks, dict)
            for kind, mask in masks.items():
                shape.masks[kind].copy_(mask)
        else:
            assert isinstance(shape.masks, Tensor)
            shape.masks.copy_(masks)

    def _make_masks(self, layout: StepLayout) -> Tensor | dict[str, Tensor]:
        """What the model's layers add to their scores: one mask, or one for each kind of layer."""
        embeddings = torch.empty(*layout.slots.shape, 1, dtype=self.base.dtype, device=self.cache.device)
        self.cache.layout = layout
        with attend_with(self.base.config, layout, explicit=True):
            return create_masks_for_generate(
                config=self.base.config,
                inputs_embeds=embeddings,
                attention_mask=None,
                past_key_values=self.cache,
                position_ids=layout.positions,
            )

    def _prepare(self, tokens: Tensor, rows: int, tree: Tree, view: int) -> Shape:
        """Buffers of a new shape, and its forward if it says what the eager one says."""
        device, dtype = self.cache.device, self.base.dtype
        slots = torch.zeros(rows, tree.num_nodes, dtype=torch.long, device=device)
        bias = torch.zeros(rows, tree.num_nodes, view, dtype=dtype, device=device)
        layout = StepLayout(slots, slots.clone(), view, bias, None, slice(0, rows))
        shape = Shape(layout, torch.zeros_like(slots), self._make_masks(layout), None)
        what = f"{rows} x {tree.num_nodes} nodes, view {view}"
        expected = self.base.verify(tokens, tree, self.cache)
        start = time.perf_counter()
        try:
            forward = record(self._compile(shape), device)
            self._fill(shape, tokens, tree)
            self.cache.layout = layout
            logits = forward().logits[: len(tokens)]
        except Exception as error:  # compilers and graph capture fail in many ways; the eager forward is right
            logger.warning(
                "%s is verified eagerly: %s", what, (str(error).strip() or type(error).__name__).split("\n")[0]
            )
            return shape
        logger.info("%s: ready in %.1f s", what, time.perf_counter() - start)
        tolerance = 1e-3 if dtype == torch.float32 else 0.25
        off = float((logits - expected.logits).abs().max() / expected.logits.std())
        if not off < tolerance:
            logger.warning("%s is verified eagerly: the static forward is off by %.2g deviations", what, off)
            return shape
        shape.forward = forward
        return shape

    def _compile(self, shape: Shape) -> Callable[[], Verified]:
        decoder, base = self.base.model.base_model, self.base

        def run(ids: Tensor, positions: Tensor, masks: Tensor | dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            out = decoder(
                input_ids=ids, position_ids=positions, attention_mask=masks, past_key_values=self.cache, use_cache=True
            )
            return base.project(out.last_hidden_state), out.last_hidden_state

        if self.compiler is not None:
            run = torch.compile(run, backend=self.compiler, fullgraph=True, dynamic=False)

        def forward() -> Verified:
            positions = shape.layout.positions_within(base.max_length)
            with attend_with(base.config, shape.layout, explicit=True):
                return Verified(*run(shape.ids, positions, shape.masks))

        return forward


T = TypeVar("T")


def record(forward: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """On a GPU, `forward` as a CUDA graph: what it reads and what it returns keep their addresses. Else itself."""
    if device.type != "cuda":
        return forward
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up: lazy initialisations must not be recorded
        for _ in range(2):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward()

    def replay() -> T:
        graph.replay()
        return result

    return replay


def round_up(batch: int, most: int) -> int:
    """The rows that are computed for a batch: the next power of two, or all of them."""
    return min(1 << (batch - 1).bit_length(), most)
