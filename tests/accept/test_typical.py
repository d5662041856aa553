import math

import pytest
import torch

from hydraspec.accept import MixedAcceptance, SampledAcceptance, TypicalAcceptance, make_rule
from hydraspec.accept.greedy import GreedyAcceptance
from hydraspec.tree import Tree
from hydraspec.types import Draft, Verified
from tests.accept.test_processing import process_plainly
from tests.accept.test_sampling import TREES, VOCABULARY, fill_trees, make_texts

TYPICAL = {"acceptance": "typical"}
SETTINGS = [
    TYPICAL | {"temperature": 0.7},
    TYPICAL | {"temperature": 1.0, "top_p": 0.9, "posterior_threshold": 0.02, "posterior_alpha": 0.1},
    TYPICAL | {"temperature": 0.8, "frequency_penalty": -1.5, "repetition_penalty": 1.2},
    TYPICAL | {"temperature": 1.5, "posterior_threshold": 0.5, "posterior_alpha": 1.0},
]


def accept_plainly(text, tokens, logits, tree):
    """The longest typical path, found node by node: parents come before their children."""
    config = text.request.sampling
    paths = {0: (0, 0.0, [0])}  # of each typical node: length, sum of log p, nodes
    for parent, children in enumerate(tree.children):
        if parent not in paths:
            continue
        length, log_p, path = paths[parent]
        context = text.tokens + [int(tokens[node]) for node in path[1:]]
        p = process_plainly(text, context, logits[parent]).double().softmax(-1)
        entropy = -sum(float(x * x.log()) for x in p if x > 0)
        bound = min(config.posterior_threshold, config.posterior_alpha * math.exp(-entropy))
        for child in children:
            if p[tokens[child]] > bound:
                paths[child] = (length + 1, log_p + float(p[tokens[child]].log()), [*path, child])
    return max(paths.values(), key=lambda found: found[:2])[2]


@pytest.mark.parametrize("name", TREES)
def test_the_longest_typical_path_is_found(name):
    tree, texts, lengths = TREES[name], make_texts(SETTINGS), []
    rule, sampled = TypicalAcceptance(texts, VOCABULARY, "cpu"), SampledAcceptance(texts, VOCABULARY, "cpu")
    for step in range(6):
        draft, verified = fill_trees(texts, tree, best=step % 3)
        accepted = rule.accept(draft, verified, tree)
        assert accepted.roots.tolist() == [tokens[-1] for tokens in accepted.tokens]
        for row, text in enumerate(texts):
            count, path = accepted.counts[row], accepted.path[row].tolist()
            best = accept_plainly(text, draft.tokens[row], verified.logits[row], tree)
            assert path == best + best[-1:] * (tree.depth + 1 - count)
            assert accepted.tokens[row][:-1] == draft.tokens[row, best[1:]].tolist()
            text.tokens.extend(accepted.tokens[row][:-1])
        # The root is the one that exact sampling draws after the accepted tokens.
        last = verified.logits[torch.arange(len(texts)), accepted.path[:, -1]]
        assert torch.equal(accepted.roots, sampled.choose(last))
        for text, root in zip(texts, accepted.roots.tolist(), strict=True):
            text.tokens.append(root)
        lengths += accepted.counts
    assert max(lengths) > 2 or tree.depth == 0
    assert min(lengths) == 1


@pytest.mark.parametrize("name", TREES)
def test_it_becomes_greedy_as_the_temperature_goes_to_zero(name):
    tree, texts = TREES[name], make_texts([TYPICAL | {"temperature": 1e-4}] * 4)
    rule, lengths = TypicalAcceptance(texts, VOCABULARY, "cpu"), []
    for _ in range(5):
        draft, verified = fill_trees(texts, tree)
        accepted, expected = rule.accept(draft, verified, tree), GreedyAcceptance().accept(draft, verified, tree)
        assert accepted.tokens == expected.tokens
        assert torch.equal(accepted.path, expected.path)
        assert torch.equal(rule.choose(verified.logits[:, 0]), verified.logits[:, 0].argmax(-1))
        for text, tokens in zip(texts, accepted.tokens, strict=True):
            text.tokens.extend(tokens)
        lengths += accepted.counts
    assert max(lengths) > 1 or tree.depth == 0


def test_length_comes_first_then_probability():
    logits = torch.full((1, 5, VOCABULARY), -30.0)
    logits[0, 0, [1, 2]] = torch.tensor([0.6, 0.4]).log()
    logits[0, 1, [3, 4]] = torch.tensor([0.35, 0.65]).log()
    logits[0, 2, [5]] = 0.0
    tokens = torch.tensor([[0, 1, 2, 3, 5]])
    [text] = make_texts([TYPICAL | {"temperature": 1.0}])
    rule = TypicalAcceptance([text], VOCABULARY, "cpu")

    def find_path(tree, tokens):
        nodes = tree.num_nodes
        accepted = rule.accept(Draft(tokens[:, :nodes]), Verified(logits[:, :nodes], torch.zeros(1, 1, 1)), tree)
        return accepted.path[0, : accepted.counts[0]].tolist()

    assert find_path(Tree([[0], [1]]), tokens) == [0, 1]  # equally long: the likelier one
    assert find_path(Tree([[0], [1], [0, 0], [1, 0]]), tokens) == [0, 2, 4]  # 0.6 * 0.35 < 0.4 * 1
    assert find_path(Tree([[0], [1], [0, 0], [1, 0]]), torch.tensor([[0, 1, 2, 3, 9]])) == [0, 1, 3]
    assert find_path(Tree([[0], [1], [1, 0]]), torch.tensor([[0, 1, 2, 5]])) == [0, 2, 3]  # 0.4 * 1 < 0.6, but longer


def test_make_rule_finds_the_rule():
    def find(*settings, **request):
        return type(make_rule(make_texts(settings, **request), VOCABULARY, "cpu"))

    greedy_typical = TYPICAL | {"temperature": 0.0}
    assert find({}, {"top_p": 0.5}, greedy_typical) is GreedyAcceptance
    assert find({}, processors=(lambda ids, scores: scores,)) is SampledAcceptance
    assert find({}, {"temperature": 1.0}) is SampledAcceptance
    assert find({}, {"presence_penalty": 1.0}) is SampledAcceptance
    assert find(*SETTINGS) is TypicalAcceptance
    assert find(SETTINGS[0], greedy_typical) is MixedAcceptance
    assert find(SETTINGS[0], {"temperature": 1.0}) is MixedAcceptance


@pytest.mark.parametrize("exact", [[{}, {}], [{"temperature": 0.9}, {"frequency_penalty": 0.4}]])
def test_mixed_rules_give_each_row_its_own(exact):
    tree = TREES["small-16"]
    texts = make_texts([SETTINGS[0], exact[0], SETTINGS[2], SETTINGS[3], exact[1]])
    draft, verified = fill_trees(texts, tree)
    rule = make_rule(texts, VOCABULARY, "cpu")
    mixed, chosen = rule.accept(draft, verified, tree), rule.choose(verified.logits[:, 0])
    for row, text in enumerate(texts):
        alone = make_rule([text], VOCABULARY, "cpu")
        rows = slice(row, row + 1)
        accepted = alone.accept(Draft(draft.tokens[rows]), Verified(verified.logits[rows], verified.hidden[rows]), tree)
        assert mixed.tokens[row] == accepted.tokens[0]
        assert mixed.counts[row] == accepted.counts[0]
        assert torch.equal(mixed.path[row], accepted.path[0])
        assert mixed.roots[row] == accepted.roots[0]
        assert chosen[row] == alone.choose(verified.logits[rows, 0])[0]
