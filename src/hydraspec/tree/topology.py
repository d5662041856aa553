"""A tree of guesses: its topology, and everything that a decoding step derives from it once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydraspec.errors import TreeError


@dataclass(frozen=True)
class Depth:
    """What drafting needs to know of one depth: who is expanded there, and where the children go.

    Example: in the tree `[[0], [1], [0, 0], [0, 1]]` the root's depth has `paths = [[0]]`, `children = slice(1, 3)`,
    `picks = [0, 1]`, `width = 2`; the next has `paths = [[0, 1]]`, `children = slice(3, 5)`.
    """

    paths: Tensor  # [P, depth + 1] the nodes from the root to each node that has children, both included
    children: slice  # the C nodes of the next depth; nodes are numbered by depth, so they lie in a row
    picks: Tensor  # [C] where each child's token lies in the flattened best tokens [P, width] of its parents
    width: int  # how many of the most likely tokens are needed: the largest rank + 1


@dataclass(frozen=True)
class Tree:
    """A static topology of child-rank paths, the same for every sequence of a batch.

    Node 0 is the root. A path `(0, 2)` is the node reached from the root by its most likely token and then by that
    one's third most likely. Nodes are numbered by depth, then by path, so that parents come before children.

    Example: `Tree([[0], [0, 0], [1]])` has 4 nodes: root, (0,), (1,), (0, 0).

    Raises:
        TreeError: a path is empty, repeated, has a negative rank, lacks its parent or leaves out a smaller rank.
    """

    paths: tuple[tuple[int, ...], ...]
    name: str = field(default="custom", compare=False)

    def __init__(self, paths: Iterable[Sequence[int]], name: str = "custom") -> None:
        object.__setattr__(self, "paths", _validate(paths, name))
        object.__setattr__(self, "name", name)

    @property
    def num_nodes(self) -> int:
        """Nodes that a step verifies, the root included."""
        return len(self.paths) + 1

    @property
    def depth(self) -> int:
        """Edges on the longest path from the root: the most draft tokens that a step can accept."""
        return max((len(path) for path in self.paths), default=0)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """The parent of each node; the root is its own."""
        index = {path: node for node, path in enumerate(self.paths, start=1)}
        return (0, *(index[path[:-1]] if len(path) > 1 else 0 for path in self.paths))

    @cached_property
    def depths(self) -> Tensor:
        """`[N]` int64: edges between the root and each node."""
        return torch.tensor([0, *(len(path) for path in self.paths)])

    @cached_property
    def ancestors(self) -> Tensor:
        """`[N, N]` bool: row i marks the nodes on the path from the root to node i, both included."""
        mask = torch.eye(self.num_nodes, dtype=torch.bool)
        for node in range(1, self.num_nodes):
            mask[node] |= mask[self.parents[node]]
        return mask

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The children of each node, by rank."""
        lists: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for node in range(1, self.num_nodes):
            lists[self.parents[node]].append(node)
        return tuple(map(tuple, lists))

    @cached_property
    def root_to_node(self) -> Tensor:
        """`[N, depth + 1]` int64: the nodes from the root to each node; the node itself fills what is left over."""
        rows = []
        for node in range(self.num_nodes):
            path = [node]
            while path[0] != 0:
                path.insert(0, self.parents[path[0]])
            rows.append(path + [node] * (self.depth + 1 - len(path)))
        return torch.tensor(rows)

    @cached_property
    def leaf_paths(self) -> Tensor:
        """`[leaves, depth + 1]` int64: `root_to_node` of the nodes without children."""
        leaves = [node for node in range(self.num_nodes) if not self.children[node]]
        return self.root_to_node[leaves]

    @cached_property
    def expansion(self) -> tuple[Depth, ...]:
        """For each depth but the last, what drafting its children needs."""
        depths = self.depths.tolist()
        stages = []
        for depth in range(self.depth):
            parents = [node for node in range(self.num_nodes) if depths[node] == depth and self.children[node]]
            places = [
                (row, self.paths[child - 1][-1])
                for row, parent in enumerate(parents)
                for child in self.children[parent]
            ]
            width = max(rank for _, rank in places) + 1
            first = self.children[parents[0]][0]
            stages.append(
                Depth(
                    paths=self.root_to_node[parents, : depth + 1],
                    children=slice(first, first + len(places)),
                    picks=torch.tensor([row * width + rank for row, rank in places]),
                    width=width,
                )
            )
        return tuple(stages)

    def to(self, device: torch.device | str) -> Tree:
        """The same tree with its derived tensors on `device` (itself, where they are there already)."""
        if self.depths.device == torch.device(device):
            return self
        moved = Tree(self.paths, self.name)
        for name in ("depths", "ancestors", "root_to_node", "leaf_paths"):
            moved.__dict__[name] = getattr(self, name).to(device)
        stages = []
        for stage in self.expansion:
            tensors: dict[str, Any] = {k: v.to(device) for k, v in vars(stage).items() if isinstance(v, Tensor)}
            stages.append(replace(stage, **tensors))
        moved.__dict__["expansion"] = tuple(stages)
        return moved

    def cut(self, depth: int) -> Tree:
        """The nodes down to `depth` edges below the root: what heads for `depth` tokens can fill."""
        if self.depth <= depth:
            return self
        return Tree([path for path in self.paths if len(path) <= depth], f"{self.name} cut at depth {depth}")

    @classmethod
    def from_json(cls, file: Path) -> Tree:
        """Read a tree from a JSON list of paths, or an object with that list under `paths`.

        Raises:
            TreeError: the file is missing, is not such JSON, or does not describe a tree.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise TreeError(f"tree file {file} does not exist") from None
        except (OSError, ValueError) as error:
            raise TreeError(f"tree file {file} cannot be read as JSON: {error}") from None
        paths = content.get("paths") if isinstance(content, dict) else content
        if not isinstance(paths, list) or not all(
            isinstance(path, list) and all(isinstance(rank, int) for rank in path) for path in paths
        ):
            raise TreeError(f"tree file {file} must hold a list of paths such as [[0], [0, 0], [1]]")
        return cls(paths, name=file.stem)


def _validate(paths: Iterable[Sequence[int]], name: str) -> tuple[tuple[int, ...], ...]:
    given = [tuple(path) for path in paths]
    known = set(given)
    if len(known) < len(given):
        twice = next(path for path in given if given.count(path) > 1)
        raise TreeError(f"tree {name}: path {list(twice)} stands there twice; remove one")
    for path in given:
        if not path or min(path) < 0:
            raise TreeError(f"tree {name}: path {list(path)} is not a list of ranks from 0 up; the root is implied")
        if len(path) > 1 and path[:-1] not in known:
            raise TreeError(f"tree {name}: path {list(path)} has no parent; add {list(path[:-1])}")
        if path[-1] > 0 and (*path[:-1], path[-1] - 1) not in known:
            missing = [*path[:-1], path[-1] - 1]
            raise TreeError(
                f"tree {name}: path {list(path)} leaves a gap; add {missing}, ranks run from 0 without gaps"
            )
    return tuple(sorted(given, key=lambda path: (len(path), path)))
