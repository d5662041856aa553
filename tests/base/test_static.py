import logging

import pytest
import torch

from hydraspec.base.model import BaseModel
from hydraspec.base.static import StaticForward
from hydraspec.tree import Tree
from tests.conftest import WINDOW, make_model

TREE = Tree([[0], [1], [1, 0], [1, 1], [1, 1, 0]])
MODELS = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
    },
    "gpt2": {"n_positions": 256},
}


def prefilled(base, rows=4, slots=200):
    cache = base.new_cache(rows, slots)
    base.prefill(torch.randint(3, 96, (rows, 20)), [20, 11, 15, 3][:rows], cache)
    return cache


@pytest.mark.parametrize("compiler", [None, "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_static_shapes_say_what_the_eager_forward_says(name, compiler, caplog):
    torch._dynamo.reset()
    base = BaseModel(make_model(name, **MODELS[name]), name)
    cache = prefilled(base)
    static = StaticForward(base, cache, compiler)
    with caplog.at_level(logging.WARNING):
        for batch in (3, 1, 4, 3):
            tokens = torch.randint(3, 96, (batch, TREE.num_nodes))
            expected = base.verify(tokens, TREE, cache)
            eager_cache = [slab.clone() for slab in cache.slabs]
            got = static.verify(tokens, TREE)
            torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(got.hidden, expected.hidden, rtol=1e-4, atol=1e-4)
            cache.commit(torch.tensor([[0, 2, 4]] * batch), [3, 1, 2, 3][:batch])
            for now, then in zip(cache.slabs, eager_cache, strict=True):
                assert now.shape == then.shape
    assert not caplog.records
    assert all(shape.forward is not None for shape in static._shapes.values())


def test_a_longer_text_gets_a_longer_view(tiny_llama):
    cache = prefilled(tiny_llama, rows=1, slots=256)
    static = StaticForward(tiny_llama, cache, None)
    static.verify(torch.randint(3, 96, (1, TREE.num_nodes)), TREE)
    tiny_llama.prefill(torch.randint(3, 96, (1, 120)), [120], cache)
    tokens = torch.randint(3, 96, (1, TREE.num_nodes))
    got = static.verify(tokens, TREE).logits
    torch.testing.assert_close(got, tiny_llama.verify(tokens, TREE, cache).logits, rtol=1e-4, atol=1e-4)
    assert sorted(view for _, _, view in static._shapes) == [128, 256]


def test_a_forward_that_is_wrong_is_not_used(tiny_llama, caplog, monkeypatch):
    cache = prefilled(tiny_llama)
    static = StaticForward(tiny_llama, cache, None)
    make_masks = static._make_masks
    monkeypatch.setattr(static, "_make_masks", lambda layout: torch.zeros_like(make_masks(layout)))
    tokens = torch.randint(3, 96, (2, TREE.num_nodes))
    with caplog.at_level(logging.WARNING):
        got = static.verify(tokens, TREE).logits
    torch.testing.assert_close(got, tiny_llama.verify(tokens, TREE, cache).logits)
    assert "verified eagerly" in caplog.text


def test_a_compiler_that_fails_is_not_used(tiny_llama, caplog):
    static = StaticForward(tiny_llama, prefilled(tiny_llama), "no such compiler")
    with caplog.at_level(logging.WARNING):
        static.verify(torch.randint(3, 96, (2, TREE.num_nodes)), TREE)
    assert "verified eagerly" in caplog.text
