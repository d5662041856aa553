import pytest
import torch
from torch.nn import functional as F

from hydraspec.base.model import BaseModel
from hydraspec.errors import HydraspecError, UnsupportedModel
from hydraspec.heads import KINDS, HeadState, cut_vocabulary, new_heads
from hydraspec.heads.residual import ResidualHeads
from tests.conftest import make_model

RESIDUAL = [kind for kind, made in KINDS.items() if issubclass(made, ResidualHeads)]


def _tokens(hidden):
    """Any tokens to go with hidden states: these heads do not read them."""
    return torch.zeros(hidden.shape[:2], dtype=torch.long)


def _scramble(heads):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return heads.eval()


def _block(block, x, project):
    residual = x @ block.residual.weight.T + block.residual.bias if project else x
    return residual + F.silu(x @ block.linear.weight.T + block.linear.bias)


@pytest.mark.parametrize("shared", [False, True])
def test_a_hydra_head_is_the_published_formula(tiny_llama, shared):
    heads = _scramble(new_heads(tiny_llama, "hydra", num_layers=3, shared_blocks=shared))
    context, path = torch.randn(2, 64), torch.randn(2, 3, 64)  # head 2 sees the root and two guesses
    x = _block(heads.blocks[2].first, torch.cat([context, path[:, 0], path[:, 1], path[:, 2]], -1), project=True)
    rest = heads.blocks[2].rest
    for block in [rest[0], rest[0]] if shared else [rest[0], rest[1]]:
        x = _block(block, x, project=False)
    expected = x @ heads.vocabulary[2].weight.T + heads.vocabulary[2].bias
    torch.testing.assert_close(heads.score(2, context, path, tiny_llama), expected, rtol=1e-5, atol=1e-5)


def test_a_medusa_head_sees_the_hidden_state_alone(tiny_llama):
    heads = _scramble(new_heads(tiny_llama, "medusa", num_layers=1))
    context = torch.randn(2, 64)
    x = _block(heads.blocks[3].first, context, project=False)
    expected = x @ heads.vocabulary[3].weight.T + heads.vocabulary[3].bias
    torch.testing.assert_close(heads.score(3, context, None, tiny_llama), expected, rtol=1e-5, atol=1e-5)


def test_fresh_medusa_heads_pass_the_hidden_state_on(tiny_llama):
    heads = new_heads(tiny_llama, "medusa", num_layers=2)
    context = torch.randn(2, 64)
    torch.testing.assert_close(heads.score(0, context, None, tiny_llama), tiny_llama.project(context))


def test_a_tied_vocabulary_layer_is_the_base_models(tiny_llama):
    heads = _scramble(new_heads(tiny_llama, "medusa", tied_vocabulary=True))
    assert not any(name.startswith("vocabulary") for name, _ in heads.named_parameters())
    context = torch.randn(2, 64)
    expected = tiny_llama.project(heads.blocks[0](context))
    torch.testing.assert_close(heads.score(0, context, None, tiny_llama), expected)


@pytest.mark.parametrize("kind", RESIDUAL)
def test_contexts_grow_step_by_step_as_in_one_pass(tiny_llama, kind):
    heads = _scramble(new_heads(tiny_llama, kind)).requires_grad_(False)
    prompt, more = torch.randn(2, 7, 64), torch.randn(2, 3, 64)
    state = heads.new_state(3, 40)
    heads.observe(state, prompt, _tokens(prompt), [7, 4], slice(1, 3))
    heads.observe(state, more, _tokens(more), [1, 3], slice(1, 3))
    state.swap(0, 1)
    state.swap(1, 2)
    heads.observe(state, more, _tokens(more), [2, 2], slice(0, 2))
    state.swap(0, 1)
    texts = [
        torch.cat([prompt[1, :4], more[1, :3], more[1, :2]]),
        torch.cat([prompt[0], more[0, :1], more[0, :2]]),
    ]
    for row, text in enumerate(texts):
        expected = heads.read_contexts(text[None])[0, -1]
        torch.testing.assert_close(state.context[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_the_fast_prefix_layer_is_the_models_own(bias):
    base = BaseModel(make_model("llama", attention_bias=bias, mlp_bias=bias), "llama")
    heads = _scramble(new_heads(base, "hydra++")).prepare(base)
    fused = heads.prefix.fused
    assert fused is not None
    hidden, more = torch.randn(2, 9, 64), torch.randn(2, 4, 64)
    contexts = {}
    for heads.prefix.fused in (fused, None):
        state, rows = heads.new_state(2, 40), slice(0, 2)
        heads.observe(state, hidden, _tokens(hidden), [9, 5], rows)
        heads.observe(state, more, _tokens(more), [2, 4], rows)
        heads.observe(state, more[:, :1], _tokens(more[:, :1]), [1, 1], rows)
        contexts[heads.prefix.fused is None] = state.context
    torch.testing.assert_close(contexts[True], contexts[False], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 3])
def test_looked_up_first_blocks_are_the_computed_ones(tiny_llama, layers):
    heads = _scramble(new_heads(tiny_llama, "hydra", num_layers=layers)).prepare(tiny_llama)
    tables = heads._tables
    assert tables is not None
    state = HeadState(torch.randn(2, 64))
    for head in range(4):
        path = torch.randint(0, 96, (2, 5, head + 1))
        nodes = torch.arange(head + 1).repeat(5, 1)
        heads._tables = tables
        fast = heads.guess(head, state, path, tiny_llama, nodes)
        heads._tables = None
        torch.testing.assert_close(fast, heads.guess(head, state, path, tiny_llama, nodes), rtol=1e-5, atol=1e-5)


def test_prefix_attention_looks_back(tiny_llama):
    heads = _scramble(new_heads(tiny_llama, "hydra++"))
    hidden = torch.randn(1, 6, 64)
    changed = hidden.clone()
    changed[0, 0] += 1
    before, after = heads.read_contexts(hidden), heads.read_contexts(changed)
    assert (before[0, 5] - after[0, 5]).abs().max() > 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_a_cut_vocabulary_proposes_the_frequent_tokens_only(tiny_llama, tied):
    heads = _scramble(new_heads(tiny_llama, "hydra", tied_vocabulary=tied))
    counts = torch.randperm(96)
    cut = cut_vocabulary(heads, counts, 20).prepare(tiny_llama)
    context, path = torch.randn(2, 1, 64), torch.randn(2, 1, 1, 64)
    frequent = (counts >= 76).nonzero().flatten()
    assert cut.name_tokens(torch.arange(20)).tolist() == frequent.tolist()
    whole = heads.score(0, context, path, tiny_llama)
    torch.testing.assert_close(cut.score(0, context, path, tiny_llama), whole[..., frequent])


def test_rotary_frequencies_stay_float32(tiny_llama):
    heads = new_heads(tiny_llama, "hydra++").prepare(BaseModel(make_model("llama").to(torch.bfloat16)))
    assert {p.dtype for p in heads.parameters()} == {torch.bfloat16}
    assert heads.prefix.decoder.rotary_emb.inv_freq.dtype == torch.float32


def test_a_prefix_layer_that_cannot_be_made_is_refused(tiny_llama):
    with pytest.raises(UnsupportedModel, match="no prefix layer"):
        new_heads(tiny_llama, "hydra++", prefix_layer={"model_type": "no such model"})


def test_unknown_kinds_are_refused(tiny_llama):
    with pytest.raises(HydraspecError, match="choose medusa, hydra"):
        new_heads(tiny_llama, "cerberus")
