"""Trees of guesses: topology and presets."""

from hydraspec.tree.presets import find_tree
from hydraspec.tree.topology import Tree

__all__ = ["Tree", "find_tree"]
