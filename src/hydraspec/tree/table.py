"""Which tree to use at which load: the more sequences decode together, the fewer nodes each of them can afford."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from hydraspec.errors import TreeError
from hydraspec.tree.presets import find_tree
from hydraspec.tree.topology import Tree


@dataclass(frozen=True)
class TreeTable:
    """Trees by the number of sequences that decode together.

    Example: `TreeTable([(2, small_16), (8, chain_2), (16, root)])` verifies 16 nodes each for up to 2 sequences, chains
    for 3 to 8, and decodes plainly from 9 on.

    Raises:
        TreeError: it is empty, or its batch sizes do not ascend.
    """

    entries: tuple[tuple[int, Tree], ...]  # (the largest batch for which it is used, tree); the last serves all beyond

    def __init__(self, entries: Iterable[tuple[int, Tree]]) -> None:
        object.__setattr__(self, "entries", tuple(entries))
        sizes = [size for size, _ in self.entries]
        if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 1:
            raise TreeError(f"the batch sizes of a table of trees must ascend from 1 up, not {sizes}")

    def pick(self, batch: int) -> Tree:
        """The tree for `batch` sequences."""
        return next((tree for size, tree in self.entries if batch <= size), self.entries[-1][1])

    @property
    def trees(self) -> tuple[Tree, ...]:
        """All of them."""
        return tuple(tree for _, tree in self.entries)

    @property
    def name(self) -> str:
        """As `find_trees` reads it."""
        if len(self.entries) == 1:
            return self.entries[0][1].name
        return ",".join(f"{size}:{tree.name}" for size, tree in self.entries)

    @property
    def num_nodes(self) -> int:
        """Of the largest tree."""
        return max(tree.num_nodes for tree in self.trees)

    @property
    def depth(self) -> int:
        """Of the deepest tree."""
        return max(tree.depth for tree in self.trees)

    def to(self, device: torch.device | str) -> TreeTable:
        """The same table with its trees' tensors on `device`."""
        return TreeTable((size, tree.to(device)) for size, tree in self.entries)

    def cut(self, depth: int) -> TreeTable:
        """The same table with every tree cut to `depth`."""
        return TreeTable((size, tree.cut(depth)) for size, tree in self.entries)


def find_trees(name: str | Tree | TreeTable) -> TreeTable:
    """A table of trees by name: one tree for every batch size, or `SIZE:TREE,SIZE:TREE,…`.

    Raises:
        TreeError: a tree or a size cannot be read.
    """
    if isinstance(name, TreeTable):
        return name
    if isinstance(name, Tree) or ":" not in name:
        return TreeTable([(1, find_tree(name))])
    entries = []
    for part in name.split(","):
        size, _, tree = part.partition(":")
        if not size.strip().isdigit():
            raise TreeError(f"a table of trees reads SIZE:TREE,SIZE:TREE, for example 2:small-16,16:root; not {part!r}")
        entries.append((int(size), find_tree(tree.strip())))
    return TreeTable(entries)
