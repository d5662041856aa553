"""Training and decoding see the same: teacher-forced states against what `observe` and `guess` find step by step."""

import copy

import pytest
import torch
from torch.nn import functional as F

from hydraspec.base.attention import layout_packed
from hydraspec.base.model import BaseModel
from hydraspec.errors import HydraspecError
from hydraspec.heads import KINDS, new_heads
from hydraspec.tree import Tree
from tests.conftest import make_model

# Branches at every depth, and leaves between them.
TREE = Tree([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 1, 0], [1, 0, 0], [1, 0, 1], [0, 1, 0, 0], [1, 0, 1, 0]])
NONE = torch.zeros(0, dtype=torch.long)


def make(base, kind, **options):
    if not KINDS[kind].count_decoder_layers(1):
        options.pop("prefix_window", None)
    heads = new_heads(base, kind, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in heads.parameters():
            noise = torch.randn_like(parameter) * 0.1
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return heads.eval()


def guess_tree(base, heads, state, nodes):
    """What the heads say below each node of a tree filled with `nodes` `[B, N]`: logits by row and path."""
    state = state.first(len(nodes), heads.count_view(state, len(nodes), TREE.num_nodes))
    found = {}
    for head, stage in enumerate(TREE.expansion):
        logits = heads.guess(head, state, nodes[:, stage.paths], base, stage.paths).expand(-1, len(stage.paths), -1)
        for place, path in enumerate(stage.paths.tolist()):
            found.update({(row, *path): logits[row, place] for row in range(len(nodes))})
    return found


def score_anchor(base, heads, ids, hidden, head):
    """What a head says at the position before the last `head + 1` tokens of a text, teacher-forced."""
    anchors = [NONE] * heads.num_heads
    anchors[head] = torch.tensor([len(ids) - head - 2])
    state = heads.draft_states(hidden[None], base.embed(ids)[None], anchors)[head]
    return F.linear(state, *heads.vocabulary_weight(head, base))[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 3},
        {"prefix_layer": "plain"},
        {"prefix_layer": "plain", "prefix_window": 3, "num_layers": 2},
        {"token_ids": torch.arange(5, 80, 3)},
    ],
    ids=str,
)
def test_decoding_says_what_training_says(tiny_llama, kind, options):
    trained = make(tiny_llama, kind, **options)
    heads = copy.deepcopy(trained).prepare(tiny_llama)
    ids, hidden = torch.randint(0, 96, (3, 12)), torch.randn(3, 12, 64)
    with torch.inference_mode():
        state, done = heads.new_state(4, 40), [0, 0, 0]
        state.swap(0, 3)
        for counts in ([1, 4, 2], [5, 1, 3], [2, 3, 1]):
            parts = [slice(start, start + max(counts)) for start in done]
            pieces = [torch.stack([row[part] for row, part in zip(x, parts, strict=True)]) for x in (hidden, ids)]
            heads.observe(state, *pieces, counts, slice(0, 3))
            done = [start + count for start, count in zip(done, counts, strict=True)]
            nodes = torch.randint(0, 96, (3, TREE.num_nodes))
            found = guess_tree(tiny_llama, heads, state, nodes)
        for (row, *path), logits in found.items():
            text = torch.cat([ids[row, : done[row]], nodes[row, path]])
            seen = torch.cat([hidden[row, : done[row]], torch.randn(len(path), 64)])  # unknown while decoding
            expected = score_anchor(tiny_llama, trained, text, seen, len(path) - 1)
            assert (logits - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_move_or_share_a_beginning_keep_their_guesses(tiny_llama, kind):
    heads = make(tiny_llama, kind).prepare(tiny_llama)
    ids, hidden = torch.randint(0, 96, (2, 9)), torch.randn(2, 9, 64)
    ids[1, :4], hidden[1, :4] = ids[0, :4], hidden[0, :4]
    nodes = torch.randint(0, 96, (2, TREE.num_nodes))
    with torch.inference_mode():
        plain, moved = heads.new_state(2, 40), heads.new_state(3, 40)
        heads.observe(plain, hidden, ids, [9, 9], slice(0, 2))
        heads.observe(moved, hidden[:1, :6], ids[:1, :6], [6], slice(1, 2))
        moved.copy_beginning(1, 0, 4)
        heads.observe(moved, hidden[1:, 4:], ids[1:, 4:], [5], slice(0, 1))
        moved.reset(1, 5)
        moved.swap(0, 1)
        heads.observe(moved, hidden[:1, 5:], ids[:1, 5:], [4], slice(0, 1))
        expected, found = (guess_tree(tiny_llama, heads, state, nodes) for state in (plain, moved))
    for key, logits in expected.items():
        torch.testing.assert_close(found[key], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 3])
def test_packed_conversations_do_not_see_each_other(tiny_llama, kind, window):
    heads = make(tiny_llama, kind, prefix_layer="plain", prefix_window=window, num_layers=2)
    ids, hidden = torch.randint(0, 96, (1, 15)), torch.randn(1, 15, 64)
    embeddings = tiny_llama.embed(ids)
    positions = torch.cat([torch.arange(8), torch.arange(5), torch.zeros(2).long()])[None]
    segments = torch.tensor([[0] * 8 + [1] * 5 + [-1] * 2])
    layout = layout_packed(segments, positions, torch.float32, torch.device("cpu"))
    packed = heads.draft_states(hidden, embeddings, [torch.tensor([1, 2, 8, 9])] * 3 + [NONE], layout)
    first = heads.draft_states(hidden[:, :8], embeddings[:, :8], [torch.tensor([1, 2])] * 4)
    second = heads.draft_states(hidden[:, 8:13], embeddings[:, 8:13], [torch.tensor([0, 1])] * 3 + [NONE])
    for states, *apart in zip(packed[:3], first[:3], second[:3], strict=True):
        torch.testing.assert_close(states, torch.cat(apart), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_takes_part_even_without_anchors(tiny_llama, kind):
    heads = make(tiny_llama, kind, num_layers=2, dropout=0.1).train()
    hidden = torch.randn(2, 7, 64)
    sum(state.sum() for state in heads.draft_states(hidden, hidden, [NONE] * 4)).backward()
    others = [p for name, p in heads.named_parameters() if not name.startswith("vocabulary")]
    assert all(p.grad is not None and not p.grad.any() for p in others)
    states = heads.draft_states(hidden, hidden, [torch.arange(2)] * 4)
    sum(state.square().sum() for state in states).backward()
    assert all(p.grad.any() for p in others)


def test_an_eagle_chain_learns_through_all_of_its_steps(tiny_llama):
    heads = make(tiny_llama, "eagle")
    hidden, embeddings = torch.randn(1, 9, 64), torch.randn(1, 9, 64).requires_grad_()
    states = heads.draft_states(hidden, embeddings, [torch.tensor([3])] * 4)
    states[3].sum().backward()
    used = embeddings.grad[0].abs().sum(-1) > 0
    assert used.tolist() == [True] * 8 + [False]  # x_0 … x_4 are true entries, x_5 … x_7 are its path


def see_far(decoder, hidden):
    """Which positions of a text the last one depends on."""
    hidden = hidden.clone().requires_grad_()
    decoder(hidden)[0, -1].sum().backward()
    return (hidden.grad[0].abs().sum(-1) > 1e-9).tolist()


@pytest.mark.parametrize("choice", ["base", "plain"])
@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "gemma2", "gpt_oss"])
def test_a_window_limits_what_is_seen(model_type, choice):
    base = BaseModel(make_model(model_type, head_dim=16), model_type, self_check=False)
    hidden = torch.randn(1, 9, 64)
    for window in (2, 5):
        heads = new_heads(base, "hydra++", prefix_layer=choice, prefix_window=window)
        assert see_far(heads.prefix, hidden) == [False] * (9 - window) + [True] * window
        heads.prepare(base)
        fused, heads.prefix.fused = heads.prefix.fused, None
        contexts = []
        for heads.prefix.fused in (None, fused):
            state = heads.new_state(1, 20)
            with torch.inference_mode():
                for part in (slice(0, 4), slice(4, 9)):
                    heads.observe(state, hidden[:, part], NONE, [part.stop - part.start], slice(0, 1))
            contexts.append(state.context)
        expected = heads.read_contexts(hidden)[:, -1]
        for context in contexts:
            torch.testing.assert_close(context, expected, rtol=1e-4, atol=1e-4)


def test_wrong_prefix_options_are_refused(tiny_llama):
    with pytest.raises(HydraspecError, match="of llama have no sliding window: choose prefix_layer plain"):
        new_heads(tiny_llama, "hydra++", prefix_window=4)
    with pytest.raises(HydraspecError, match="hydra heads have no prefix attention"):
        new_heads(tiny_llama, "hydra", prefix_window=4)
    with pytest.raises(HydraspecError, match="must be base or plain, not 'fancy'"):
        new_heads(tiny_llama, "eagle", prefix_layer="fancy")
    with pytest.raises(HydraspecError, match="leave tied_vocabulary on"):
        new_heads(tiny_llama, "eagle", tied_vocabulary=False)
