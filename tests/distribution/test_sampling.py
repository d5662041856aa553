"""Sampled tokens against the distribution that they claim to have."""

import math

import pytest
import torch

from hydraspec.accept.noise import exponential_noise, mix_key
from hydraspec.accept.sampling import SampledAcceptance
from hydraspec.config import SamplingConfig
from hydraspec.tree import Tree
from hydraspec.types import Draft, LiveText, Request, Verified
from tests.accept.test_processing import process_plainly

VOCABULARY = 24
SEEDS, SEQUENCES, POSITIONS = 40, 50, 25  # 50,000 draws
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.5, "top_k": 7},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 0.9, "min_p": 0.1, "logit_bias": ((0, 2.0), (5, -3.0))},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.4, "allowed_tokens": tuple(range(3, 20))},
]
# Nodes: the root, its two children, and one grandchild below each of them.
TREE = Tree([[0], [1], [0, 0], [1, 0]])


def chi_square_p_value(counts, probabilities):
    """Pearson's test; cells that expect fewer than 5 are joined, and a token that cannot occur must not."""
    expected = probabilities.double() / probabilities.double().sum() * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(expected) == 1:
        return 1.0  # certain, and always chosen
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2).item()


def follows(tokens, probabilities):
    return chi_square_p_value(torch.bincount(tokens, minlength=len(probabilities)), probabilities) > 0.001


def make_texts(setting):
    prompt = (3, 4, 5)
    configs = [SamplingConfig(seed=seed, **setting) for seed in range(SEEDS)]
    requests = [Request(prompt, 99, sampling=config, sequence=row) for config in configs for row in range(SEQUENCES)]
    return [LiveText(request, list(prompt)) for request in requests]


def draw(setting, logits, rule_class=SampledAcceptance):
    """`[SEEDS * SEQUENCES, POSITIONS]` tokens; the texts grow by a token of the prompt, which changes no penalty."""
    texts, drawn = make_texts(setting), []
    rule = rule_class(texts, VOCABULARY, "cpu")
    for _ in range(POSITIONS):
        drawn.append(rule.choose(logits.expand(len(texts), -1)))
        for text in texts:
            text.tokens.append(3)
    return torch.stack(drawn, 1)


def make_logits(rows, seed=0):
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 1.5


def find_probabilities(setting, tokens, logits):
    return process_plainly(make_texts(setting)[0], tokens, logits).softmax(-1)


@pytest.mark.parametrize("setting", SETTINGS)
def test_choices_follow_the_processed_distribution(setting):
    [logits] = make_logits(1)
    tokens = draw(setting, logits)
    assert tokens.numel() == 50_000
    assert follows(tokens.flatten(), find_probabilities(setting, [3, 4, 5], logits))


def test_consecutive_choices_are_independent():
    [logits] = make_logits(1)
    p = find_probabilities(SETTINGS[0], [3, 4, 5], logits)
    tokens = draw(SETTINGS[0], logits)
    pairs = tokens[:, :-1] * VOCABULARY + tokens[:, 1:]
    # Every other pair: neighbouring pairs share a token.
    assert follows(pairs[:, ::2].flatten(), torch.outer(p, p).flatten())


def accept_many(setting, logits, drafted):
    """What follows each node: of all texts that reached it, the tokens chosen there."""
    texts = make_texts(setting)
    rule = SampledAcceptance(texts, VOCABULARY, "cpu")
    draft = Draft(torch.tensor(drafted).expand(len(texts), -1))
    verified = Verified(logits.expand(len(texts), -1, -1), torch.zeros(len(texts), 1, 1))
    chosen = [[] for _ in range(TREE.num_nodes)]
    for _ in range(POSITIONS):
        accepted = rule.accept(draft, verified, TREE)
        for path, tokens in zip(accepted.path.tolist(), accepted.tokens, strict=True):
            for node, token in zip(path[: len(tokens)], tokens, strict=True):
                chosen[node].append(token)
        for text in texts:
            text.tokens.extend([3] * (TREE.depth + 1))  # the next step's noise is new at every level
    return [torch.tensor(tokens) for tokens in chosen]


@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[2], SETTINGS[3]])
def test_tokens_accepted_from_a_tree_follow_the_processed_distribution(setting):
    logits = make_logits(TREE.num_nodes, seed=1)
    first, second = logits[0].topk(2).indices.tolist()
    drafted = [9, first, second, logits[1].argmax().item(), logits[2].argmax().item()]
    chosen = accept_many(setting, logits, drafted)
    assert len(chosen[0]) == 50_000
    for node in range(TREE.num_nodes):
        assert len(chosen[node]) > 500
        assert follows(chosen[node], find_probabilities(setting, [3, 4, 5], logits[node]))


def test_an_unlikely_draft_is_as_good_as_a_likely_one():
    logits = make_logits(TREE.num_nodes, seed=2)
    drafted = [9, *logits[0].topk(12).indices[[6, 11]].tolist(), 1, 2]
    chosen = accept_many(SETTINGS[0], logits, drafted)
    for node in range(3):
        assert follows(chosen[node], find_probabilities(SETTINGS[0], [3, 4, 5], logits[node]))


def test_wrong_samplers_fail_the_same_check():
    [logits] = make_logits(1)
    p = find_probabilities({"temperature": 0.9}, [3, 4, 5], logits)
    right = draw({"temperature": 0.9}, logits).flatten()
    assert follows(right, p)
    assert not follows(draw({"temperature": 1.0}, logits).flatten(), p)  # temperature ignored
    assert not follows(draw({"temperature": 0.9, "top_p": 0.98}, logits).flatten(), p)  # a tail left out

    generator = torch.Generator().manual_seed(0)
    best = int(p.argmax())
    drafted = torch.rand(len(right), generator=generator) < 0.05 * p[best]  # "accept the draft if u < p", now and then
    assert not follows(torch.where(drafted, best, right), p)

    class WithoutSeeds(SampledAcceptance):
        def make_keys(self, levels):
            return torch.full_like(super().make_keys(levels), 7) + len(self.texts[0].tokens)

    assert not follows(draw({"temperature": 0.9}, logits, WithoutSeeds).flatten(), p)

    class WithoutPositions(SampledAcceptance):
        def make_keys(self, levels):
            return torch.tensor(self._keys)[:, None].expand(-1, levels)

    tokens = draw({"temperature": 0.9}, logits, WithoutPositions)
    pairs = (tokens[:, :-1] * VOCABULARY + tokens[:, 1:])[:, ::2].flatten()
    assert not follows(pairs, torch.outer(p, p).flatten())


def test_noise_is_exponential_and_uncorrelated():
    seeds, sequences, positions, tokens = 8, 8, 32, 512
    keys = [
        mix_key(seed, sequence, position)
        for seed in range(seeds)
        for sequence in range(sequences)
        for position in range(positions)
    ]
    noise = exponential_noise(torch.tensor(keys), torch.arange(tokens)[None]).double()
    count = noise.numel()
    uniform = -torch.expm1(-noise)
    assert chi_square_p_value(torch.histc(uniform, 1000, 0, 1), torch.ones(1000)) > 0.001
    gumbel = -noise.log().view(seeds, sequences, positions, tokens)
    assert abs(gumbel.mean() - 0.5772157) < 4 * math.pi / math.sqrt(6 * count)
    normal = (gumbel - gumbel.mean()) / gumbel.std()
    for dimension in range(4):
        for lag in (1, 2, 7):
            size = normal.shape[dimension]
            pairs = normal.narrow(dimension, 0, size - lag) * normal.narrow(dimension, lag, size - lag)
            assert abs(pairs.mean()) < 4 / math.sqrt(pairs.numel()), (dimension, lag)
    diagonal = (normal[:, :, :-1, 1:] * normal[:, :, 1:, :-1]).mean()  # position up, token down
    assert abs(diagonal) < 4 / math.sqrt(count)
