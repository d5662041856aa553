import copy

import pytest
import torch

from hydraspec.base.fused import fuse
from hydraspec.base.model import BaseModel
from hydraspec.tree import Tree
from hydraspec.types import Verified
from tests.conftest import WINDOW, make_model
from tests.tiny_models import EXACT

TREE = Tree([[0], [1], [2], [0, 0], [1, 0], [1, 1], [1, 0, 0]])
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
FUSED = {
    "llama, grouped heads": ("llama", {}),
    "llama, one head a group": ("llama", {"num_key_value_heads": 4}),
    "llama, odd widths": ("llama", {"intermediate_size": 77, "head_dim": 10, "vocab_size": 91}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama 3 positions": ("llama", {"rope_parameters": LLAMA3}),
    "llama, yarn positions": ("llama", {"rope_parameters": YARN}),
    "llama, wide enough to pack": ("llama", {"intermediate_size": 1200, "vocab_size": 2100, "num_hidden_layers": 2}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, sliding": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2, mixed": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 256}
REFUSED = {
    **{
        name: config
        for name, config in EXACT.items()
        if config[0] not in ("llama", "mistral", "qwen2", "qwen3", "seed_oss")
    },
    "granite, only its logits": ("granite", {"logits_scaling": 4.0}),
    "granite, only its residuals": ("granite", {"residual_multiplier": 0.5}),
    "llama, another activation": ("llama", {"hidden_act": "gelu"}),
    "llama, changing positions": ("llama", {"rope_parameters": DYNAMIC}),
    "gemma, SiLU": ("gemma", {"head_dim": 16, "hidden_act": "silu", "hidden_activation": "silu"}),
}


@torch.inference_mode()
def _read(base, fused):
    """Ragged prompts, a tree, its commit and a token more, then one sequence alone: all logits and hidden states."""
    generator = torch.Generator().manual_seed(2)
    prompts, tokens, more = (torch.randint(3, 90, (2, n), generator=generator) for n in (19, TREE.num_nodes, 1))
    base.fused, cache = fused, base.new_cache(3, 40)
    prefilled = base.prefill(prompts, [19, 12], cache)
    real = Verified(prefilled.logits, prefilled.hidden[:, :12])  # padding may be anything
    found = [real, base.verify(tokens, TREE, cache)]
    cache.commit(torch.tensor([[0, 2, 5, 7], [0, 1, 4, 4]]), [4, 3])
    found.append(base.verify(more, Tree([]), cache))
    alone = base.new_cache(1, 40)
    base.prefill(prompts[:1, :9], [9], alone)
    found.append(base.verify(tokens[:1], TREE, alone))
    return [tensor.float() for verified in found for tensor in (verified.logits, verified.hidden)]


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_forward_is_the_models_own(name):
    model_type, options = FUSED[name]
    base = BaseModel(make_model(model_type, **options), name)
    fused = fuse(base.model)
    assert fused is not None
    fast, plain = _read(base, fused), _read(base, None)
    for found, expected in zip(fast, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FUSED)
def test_in_bfloat16_it_rounds_no_more_than_the_model(name):
    model_type, options = FUSED[name]
    half = BaseModel(make_model(model_type, **options).to(torch.bfloat16), name)
    fused = fuse(half.model)
    assert fused is not None
    exact = _read(BaseModel(copy.deepcopy(half.model).float(), name), None)
    fast, plain = _read(half, fused), _read(half, None)
    errors = [
        sum(float((found - truth).square().mean() / truth.var()) for found, truth in zip(results, exact, strict=True))
        for results in (fast, plain)
    ]
    assert errors[0] < 3 * errors[1]


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_compute_something_else_are_left_to_their_class(name, dtype):
    model_type, options = REFUSED[name]
    assert fuse(make_model(model_type, **options).to(dtype)) is None


def test_a_bare_decoder_has_no_output_layer():
    decoder = make_model("llama", num_hidden_layers=2).model
    fused = fuse(decoder)
    hidden = torch.randn(1, 6, 64)
    cache = BaseModel(make_model("llama", num_hidden_layers=2)).new_cache(1, 8)
    layout = cache.layout_chain(6, slice(0, 1))
    with torch.no_grad():
        found, expected = fused.forward(hidden, layout, layout.positions, cache), decoder(inputs_embeds=hidden)
    torch.testing.assert_close(found, expected.last_hidden_state, rtol=1e-4, atol=1e-4)
    assert fused.output is None


def test_caches_of_any_length_are_served():
    base = BaseModel(make_model("llama"), "llama")
    ids = torch.randint(3, 96, (1, 30))
    for length in (34, 60, 40):  # the table of angles grows with the longest
        cache = base.new_cache(1, length)
        base.prefill(ids[:, :29], [29], cache)
        logits = base.verify(ids[:, 29:], Tree([]), cache).logits[0, 0]
        torch.testing.assert_close(logits, base.model(ids, use_cache=False).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_copies_beyond_the_limit_are_not_made():
    model = make_model("llama")
    fused = fuse(model)
    linears = sum(p.numel() for name, p in model.named_parameters() if "proj" in name or "lm_head" in name)
    assert fused.num_bytes == 4 * linears
    assert fuse(model, limit=4 * linears - 1) is None


def test_a_window_that_a_model_class_ignores_is_ignored():
    model = make_model("llama", sliding_window=4)
    assert fuse(model) is not None


def test_the_model_is_left_as_it_was():
    model = make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert fuse(model) is not None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config._attn_implementation == make_model("llama").config._attn_implementation
