from itertools import pairwise

import torch

from hydraspec.accept.greedy import GreedyAcceptance, follow_choices
from hydraspec.tree import Tree
from hydraspec.tree.presets import PRESETS
from hydraspec.types import Draft, Verified


def test_the_documented_example():
    tree = Tree([[0], [0, 0]])
    accepted = follow_choices(tree, torch.tensor([[5, 6, 7]]), torch.tensor([[6, 9, 8]]))
    assert accepted.counts == [2]
    assert accepted.tokens == [[6, 9]]
    assert accepted.path.tolist() == [[0, 1, 1]]


def test_each_row_takes_its_own_path():
    tree = Tree([[0], [1], [1, 0], [1, 1]])
    tokens = torch.tensor([[1, 2, 3, 4, 5]] * 3)
    chosen = torch.tensor([[3, 0, 5, 0, 8], [9, 0, 0, 0, 0], [2, 7, 0, 0, 0]])
    accepted = follow_choices(tree, tokens, chosen)
    assert accepted.counts == [3, 1, 2]
    assert accepted.tokens == [[3, 5, 8], [9], [2, 7]]
    assert accepted.path.tolist() == [[0, 2, 4], [0, 0, 0], [0, 1, 1]]


def test_the_longest_matching_path_is_found_on_random_trees():
    tree = PRESETS["published-63"]
    torch.manual_seed(0)
    tokens = torch.stack([_fill_with_distinct_siblings(tree) for _ in range(50)])
    logits = torch.randn(50, tree.num_nodes, 12)
    accepted = GreedyAcceptance().accept(Draft(tokens), Verified(logits, torch.zeros(50, tree.num_nodes, 1)), tree)
    chosen = logits.argmax(-1)
    for row in range(50):
        best: list[int] = [0]
        for node in range(tree.num_nodes):
            path = sorted(set(tree.root_to_node[node].tolist()), key=lambda n: int(tree.depths[n]))
            agreed = all(tokens[row, b] == chosen[row, a] for a, b in pairwise(path))
            if agreed and len(path) > len(best):
                best = path
        assert accepted.path[row, : accepted.counts[row]].tolist() == best
        assert accepted.tokens[row] == chosen[row, best].tolist()
    assert max(accepted.counts) > 2


def _fill_with_distinct_siblings(tree):
    tokens = torch.zeros(tree.num_nodes, dtype=torch.long)
    for children in tree.children:
        if children:
            tokens[list(children)] = torch.randperm(12)[: len(children)]
    return tokens
