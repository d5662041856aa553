import math
import random
import zlib

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor

from hydraspec.accept import make_rule
from hydraspec.accept.greedy import GreedyAcceptance
from hydraspec.accept.noise import exponential_noise, mix_key
from hydraspec.accept.sampling import SampledAcceptance
from hydraspec.config import SamplingConfig
from hydraspec.tree import Tree
from hydraspec.tree.presets import PRESETS, make_chain
from hydraspec.types import Draft, LiveText, Request, Verified
from tests.accept.test_processing import process_plainly

VOCABULARY = 24


def grow_tree(seed):
    """A random tree of 12 nodes."""
    generator, paths = random.Random(seed), []
    while len(paths) < 12:
        parent = generator.choice([(), *paths])
        paths.append((*parent, sum(path[:-1] == parent for path in paths)))
    return Tree(paths, f"random-{seed}")


TREES = {
    "root": PRESETS["root"],
    "chain-3": make_chain(3),
    "random-1": grow_tree(1),
    "random-2": grow_tree(2),
    "small-16": PRESETS["small-16"],
    "published-63": PRESETS["published-63"],
}
SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 6, "top_p": 0.8},
    {},
    {"repetition_penalty": 1.5},
    {"temperature": 0.9, "frequency_penalty": 0.6, "presence_penalty": 0.4},
    {"temperature": 1.0, "min_p": 0.1, "logit_bias": ((2, 3.0),)},
    {"temperature": 0.8, "allowed_tokens": (1, 2, 3, 5, 8, 13, 21)},
]
MASK = (1 << 64) - 1


def language_model(context):
    """Logits [V] that depend on all tokens before."""
    generator = torch.Generator().manual_seed(zlib.crc32(bytes(context)))
    return torch.randn(VOCABULARY, generator=generator) * 2


def fill_tree(text, tree, best=0):
    """The likeliest tokens after each node, or those from rank `best` on, and the base model's logits there."""
    tokens, contexts = [text.tokens[-1]], [text.tokens]
    for node in range(1, tree.num_nodes):
        parent, rank = tree.parents[node], tree.paths[node - 1][-1] + best
        tokens.append(int(language_model(contexts[parent]).argsort(descending=True)[rank]))
        contexts.append([*contexts[parent], tokens[-1]])
    return tokens, torch.stack([language_model(context) for context in contexts])


def fill_trees(texts, tree, best=0):
    filled = [fill_tree(text, tree, best) for text in texts]
    logits = torch.stack([logits for _, logits in filled])
    return Draft(torch.tensor([tokens for tokens, _ in filled])), Verified(logits, torch.zeros(len(texts), 1, 1))


def splitmix(state):
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    return state, state ^ (state >> 31)


def draw_plainly(key, token):
    before_last_shift, _ = splitmix((key + token * 0x9E3779B97F4A7C15) & MASK)
    return -math.log1p(-((before_last_shift >> 32) + 0.5) / 2**32)


def choose_plainly(text, gained):
    """The token after a text and what it has gained, one at a time."""
    context, request = text.tokens + gained, text.request
    scores = process_plainly(text, context, language_model(context)).tolist()
    if request.sampling.temperature:
        key = mix_key(request.sampling.seed, request.sequence, len(context))
        scores = [score - math.log(draw_plainly(key, token)) for token, score in enumerate(scores)]
    return max(range(VOCABULARY), key=scores.__getitem__)


def make_texts(settings=SETTINGS, seed=5, **request):
    return [
        LiveText(Request((1, 7, 2), 99, sampling=SamplingConfig(seed=seed, **setting), sequence=row, **request), tokens)
        for row, setting in enumerate(settings)
        for tokens in [[1, 7, 2, 7, 7, row]]
    ]


def decode_plainly(text, count):
    gained = []
    while len(gained) < count:
        gained.append(choose_plainly(text, gained))
    return gained


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("name", TREES)
def test_any_tree_says_what_plain_sampling_says(name, on_host):
    tree, texts = TREES[name], make_texts()
    expected = [decode_plainly(text, 30) for text in texts]
    starts = [len(text.tokens) for text in texts]
    rule = SampledAcceptance(texts, VOCABULARY, "cpu")
    rule._on_host = on_host  # False: the walk of other devices, which never looks at what it has found so far
    lengths = []
    while min(len(text.tokens) - start for text, start in zip(texts, starts, strict=True)) < 20:
        draft, verified = fill_trees(texts, tree)
        accepted = rule.accept(draft, verified, tree)
        assert accepted.roots.tolist() == [tokens[-1] for tokens in accepted.tokens]
        assert accepted.path.shape == (len(texts), tree.depth + 1)
        for row, text in enumerate(texts):
            count, path = accepted.counts[row], accepted.path[row].tolist()
            assert draft.tokens[row, path[1:count]].tolist() == accepted.tokens[row][:-1]
            assert [tree.parents[node] for node in path[1:count]] == path[: count - 1]
            assert path[count:] == [path[count - 1]] * (tree.depth + 1 - count)
            text.tokens.extend(accepted.tokens[row])
        lengths += accepted.counts
    for text, start, tokens in zip(texts, starts, expected, strict=True):
        gained = text.tokens[start:][:30]
        assert gained == tokens[: len(gained)]
    assert max(lengths) > min(tree.depth, 2)
    assert min(lengths) == 1


def test_the_choice_after_the_prefill_is_the_plain_one():
    texts = make_texts()
    logits = torch.stack([language_model(text.tokens) for text in texts])
    chosen = SampledAcceptance(texts, VOCABULARY, "cpu").choose(logits)
    assert chosen.tolist() == [choose_plainly(text, []) for text in texts]


def test_processors_are_called_along_the_walk_only():
    tree, contexts = TREES["small-16"], []

    def record(input_ids, scores):
        contexts.append(input_ids[0].tolist())
        return scores

    texts = make_texts([{"temperature": 0.6}, {}], processors=(NoRepeatNGramLogitsProcessor(1), record))
    rule = SampledAcceptance(texts, VOCABULARY, "cpu")
    for _ in range(2):
        contexts.clear()
        accepted = rule.accept(*fill_trees(texts, tree), tree)
        called = sorted(contexts)
        assert accepted.tokens == [
            decode_plainly(text, count) for text, count in zip(texts, accepted.counts, strict=True)
        ]
        assert called == sorted(
            text.tokens + tokens[:level]
            for text, tokens in zip(texts, accepted.tokens, strict=True)
            for level in range(len(tokens))
        )
        for text, tokens in zip(texts, accepted.tokens, strict=True):
            text.tokens.extend(tokens)
            assert len(set(text.tokens[6:])) == len(text.tokens[6:])


def test_rows_do_not_depend_on_the_batch():
    tree, texts = TREES["published-63"], make_texts()
    draft, verified = fill_trees(texts, tree)
    together = SampledAcceptance(texts, VOCABULARY, "cpu").accept(draft, verified, tree)
    for row, text in enumerate(texts):
        alone = Draft(draft.tokens[row : row + 1]), Verified(verified.logits[row : row + 1], verified.hidden)
        accepted = SampledAcceptance([text], VOCABULARY, "cpu").accept(*alone, tree)
        assert accepted.tokens[0] == together.tokens[row]
        assert torch.equal(accepted.path[0], together.path[row])


def test_seed_sequence_and_position_change_the_choice():
    def choose(seed, sequence, length):
        config = SamplingConfig(temperature=1.0, seed=seed)
        texts = [LiveText(Request((1,), 9, sampling=config, sequence=sequence), [1] * length)]
        return SampledAcceptance(texts, 5000, "cpu").choose(torch.zeros(1, 5000)).item()

    keys = [(3, 0, 1), (4, 0, 1), (3, 1, 1), (3, 0, 2), (-3, 0, 1), (0, 3, 1), (1, 3, 0), (1, 0, 3)]
    assert len({choose(*key) for key in keys}) == len(keys)
    assert choose(*keys[0]) == choose(*keys[0]) == choose(3 + 2**64, 0, 1)


def test_greedy_settings_that_change_nothing_equal_the_greedy_rule():
    tree, texts = TREES["published-63"], make_texts([{}, {"logit_bias": ((0, 0.0),)}, {"top_k": 3}])
    draft, verified = fill_trees(texts, tree)
    expected = GreedyAcceptance().accept(draft, verified, tree)
    accepted = make_rule(texts, VOCABULARY, "cpu").accept(draft, verified, tree)
    assert accepted.tokens == expected.tokens
    assert torch.equal(accepted.path, expected.path)


def test_the_noise_is_splitmix64_for_any_subset_of_tokens():
    keys = [mix_key(1, 0, 5), mix_key(-1, 3, 0), mix_key(2**63, 0, 10**6)]
    assert all(-(2**63) <= key < 2**63 for key in keys)
    noise = exponential_noise(torch.tensor(keys), torch.arange(300)[None])
    for row, key in enumerate(keys):
        expected = torch.tensor([draw_plainly(key, token) for token in range(300)])
        winning = expected < 0.5  # small noise keeps its full resolution
        torch.testing.assert_close(noise[row, winning], expected[winning], rtol=1e-6, atol=0)
        torch.testing.assert_close(noise[row], expected, rtol=1e-3, atol=0)
    subset = torch.tensor([[299, 0, 17], [4, 4, 100], [1, 2, 3]])
    assert torch.equal(exponential_noise(torch.tensor(keys), subset), noise.gather(1, subset))
    # Leaving out the last xor-shift does not reach the upper 31 bits.
    assert all(a >> 33 == b >> 33 for a, b in map(splitmix, range(1, 2**60, 2**55)))


def test_the_noise_is_finite_and_positive_at_both_ends():
    # Run the hash backwards: the states whose upper bits are all 1 and all 0.
    for bits, expected in ((MASK, 24 * math.log(2)), (0, 2.0**-33)):
        state = bits * pow(0x94D049BB133111EB, -1, 2**64) & MASK
        state ^= state >> 27 ^ state >> 54
        state = state * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK
        state ^= state >> 30 ^ state >> 60
        key = state - 2**64 if state >> 63 else state
        drawn = exponential_noise(torch.tensor([key]), torch.tensor([[0]])).item()
        assert drawn == pytest.approx(expected, rel=1e-6)


def test_a_sampled_request_without_a_seed_is_a_mistake_of_the_caller():
    with pytest.raises(AssertionError, match="resolve the seed"):
        SampledAcceptance(make_texts([{"temperature": 1.0}], seed=None), VOCABULARY, "cpu")
