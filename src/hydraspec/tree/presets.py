"""Trees by name."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from hydraspec.errors import TreeError
from hydraspec.tree.topology import Tree

# The tree that Hydra publishes for Vicuna-7B: 10, 28, 23 and 2 nodes at depths 1 to 4, and the root.
_PUBLISHED_63 = (
    "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 40 21 004 005 0000 "
    "011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021 90 060 0001 16 070"
)
# Small trees for machines on which every further node costs time: of a large tree the nodes that the shipped Hydra++
# heads had accepted most often, on training conversations.
_SMALL_16 = "0 00 000 0000 1 01 10 010 100 001 0100 2 0001 1000 0010"
_SMALL_8 = "0 00 000 0000 1 01 10"


def _parse(text: str) -> list[list[int]]:
    return [[int(rank) for rank in path] for path in text.split()]


PRESETS = MappingProxyType(
    {
        "root": Tree([], "root"),
        "small-8": Tree(_parse(_SMALL_8), "small-8"),
        "small-16": Tree(_parse(_SMALL_16), "small-16"),
        "published-63": Tree(_parse(_PUBLISHED_63), "published-63"),
    }
)


def make_chain(length: int) -> Tree:
    """The tree of one path: the `length` most likely tokens in a row."""
    return Tree([[0] * depth for depth in range(1, length + 1)], f"chain-{length}")


def find_tree(name: str | Tree) -> Tree:
    """The tree called `name`: a preset, `chain-K`, or a JSON file of child-rank paths. A tree is returned as it is.

    Raises:
        TreeError: there is no such preset or file, or the file does not describe a tree.
    """
    if isinstance(name, Tree):
        return name
    if name in PRESETS:
        return PRESETS[name]
    if name.startswith("chain-") and name[6:].isdecimal() and 1 <= int(name[6:]) <= 64:
        return make_chain(int(name[6:]))
    if name.endswith(".json"):
        return Tree.from_json(Path(name))
    raise TreeError(
        f"no tree is called {name!r}: choose {', '.join(PRESETS)}, chain-K (K from 1 to 64) or a .json file"
    )
