import json

import pytest
import torch

from hydraspec.errors import TreeError
from hydraspec.tree import Tree, find_tree
from hydraspec.tree.presets import PRESETS


def test_everything_is_derived_from_the_paths():
    tree = Tree([[0, 1], [0], [1], [0, 0], [1, 0], [0, 0, 0]])
    assert tree.paths == ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
    assert tree.num_nodes == 7
    assert tree.depth == 3
    assert tree.parents == (0, 0, 0, 1, 1, 2, 3)
    assert tree.depths.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert tree.children == ((1, 2), (3, 4), (5,), (6,), (), (), ())
    assert tree.ancestors[6].nonzero().flatten().tolist() == [0, 1, 3, 6]
    assert tree.root_to_node[6].tolist() == [0, 1, 3, 6]
    assert tree.leaf_paths.tolist() == [[0, 1, 4, 4], [0, 2, 5, 5], [0, 1, 3, 6]]
    root, first, second = tree.expansion
    assert (root.paths.tolist(), root.children, root.picks.tolist(), root.width) == ([[0]], slice(1, 3), [0, 1], 2)
    assert first.paths.tolist() == [[0, 1], [0, 2]]
    assert first.children == slice(3, 6)
    assert first.picks.tolist() == [0, 1, 2]
    assert second.paths.tolist() == [[0, 1, 3]]


def test_ancestors_match_a_walk_over_the_paths():
    tree = PRESETS["published-63"]
    for node, path in enumerate(tree.paths, start=1):
        above = {0} | {n for n, other in enumerate(tree.paths, start=1) if path[: len(other)] == other}
        assert set(tree.ancestors[node].nonzero().flatten().tolist()) == above


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([[0], [0]], "twice"),
        ([[]], "root is implied"),
        ([[-1]], "ranks from 0"),
        ([[0], [1, 0]], r"no parent; add \[1\]"),
        ([[0], [2]], r"gap; add \[1\]"),
        ([[0], [0, 0], [0, 2]], r"gap; add \[0, 1\]"),
    ],
)
def test_what_is_no_tree_is_refused(paths, message):
    with pytest.raises(TreeError, match=message):
        Tree(paths)


def test_the_published_tree_has_the_published_counts():
    tree = find_tree("published-63")
    assert tree.num_nodes == 64
    assert torch.bincount(tree.depths).tolist() == [1, 10, 28, 23, 2]


def test_presets_have_the_sizes_that_their_names_say():
    assert find_tree("root").num_nodes == 1
    assert find_tree("small-8").num_nodes == 8
    assert find_tree("small-16").num_nodes == 16
    assert find_tree("chain-5").depth == 5 == find_tree("chain-5").num_nodes - 1


def test_cut_keeps_the_upper_part():
    assert find_tree("published-63").cut(1).num_nodes == 11
    assert find_tree("chain-3").cut(7) is not None


def test_trees_load_from_json(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"paths": [[0], [1], [0, 0]]}))
    tree = find_tree(str(file))
    assert (tree.num_nodes, tree.name) == (4, "mine")
    file.write_text("[[0], [1]]")
    assert find_tree(str(file)).num_nodes == 3


@pytest.mark.parametrize("content", ["[[0], [", '{"nodes": 3}', '[["a"]]', "7"])
def test_broken_tree_files_are_refused(tmp_path, content):
    file = tmp_path / "broken.json"
    file.write_text(content)
    with pytest.raises(TreeError, match=r"broken\.json"):
        find_tree(str(file))


@pytest.mark.parametrize("name", ["nothing", "chain-0", "chain-x", "missing.json"])
def test_unknown_trees_are_refused(name):
    with pytest.raises(TreeError):
        find_tree(name)
