"""Trees of guesses: topology, presets, tables by load."""

from hydraspec.tree.presets import PRESETS, find_tree
from hydraspec.tree.table import TreeTable, find_trees
from hydraspec.tree.topology import Tree

__all__ = ["PRESETS", "Tree", "TreeTable", "find_tree", "find_trees"]
