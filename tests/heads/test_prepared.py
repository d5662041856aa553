"""Heads prepared for decoding on a CPU against the same heads as they are trained."""

import copy

import pytest
import torch

from hydraspec.base.model import BaseModel
from hydraspec.decode.engine import Engine
from hydraspec.heads import KINDS, HeadState, cut_vocabulary, new_heads, protocol, tables
from hydraspec.heads.residual import ResidualHeads
from hydraspec.tree import find_tree
from hydraspec.types import Output, Request
from tests.conftest import make_model

RESIDUAL = [kind for kind, made in KINDS.items() if issubclass(made, ResidualHeads)]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def base(request):
    return BaseModel(make_model("llama").to(request.param), "llama")


def _make(base, kind, **options):
    heads = new_heads(base, kind, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return heads.to(base.dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", RESIDUAL)
@pytest.mark.parametrize("options", [{"num_layers": 1}, {"num_layers": 3}, {"num_layers": 3, "shared_blocks": True}])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("looked_up", [True, False])
def test_guesses_are_the_trained_heads_scores(base, monkeypatch, kind, options, tied, looked_up):
    if not looked_up:
        monkeypatch.setattr(tables, "BYTES_LIMIT", 0)
    trained = _make(base, kind, tied_vocabulary=tied, **options)
    prepared = copy.deepcopy(trained).prepare(base)
    assert (prepared._tables is not None) == (looked_up and prepared.grounded)
    state = HeadState(torch.randn(2, 64).to(base.dtype))
    tolerance = 1e-5 if base.dtype == torch.float32 else 0.05  # deviations
    for head in range(4):
        path = torch.randint(0, 96, (2, 5, head + 1))
        context = state.context[:, None].expand(-1, 5, -1)
        expected = trained.score(head, context, base.embed(path), base)
        error = prepared.guess(head, state, path, base, torch.arange(head + 1).repeat(5, 1)).float() - expected.float()
        assert error.square().mean().sqrt() < tolerance * expected.float().std()


def test_heads_that_share_a_cut_vocabulary_share_its_copy(base):
    heads = cut_vocabulary(_make(base, "hydra", tied_vocabulary=True), torch.arange(96), 20).prepare(base)
    assert len(heads._packed) == 4
    assert len({id(layer) for layer in heads._packed}) == 1


def test_large_heads_are_not_copied(base, monkeypatch):
    monkeypatch.setattr(protocol, "BYTES_LIMIT", 1000)
    heads = _make(base, "medusa").prepare(base)
    assert heads._packed == []
    state, root = HeadState(torch.randn(2, 64).to(base.dtype)), torch.zeros(2, 1, 1).long()
    assert heads.guess(0, state, root, base, torch.zeros(1, 1).long()).shape == (2, 1, 96)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cut", [0, 40])
def test_smaller_heads_guess_nearly_the_same_and_change_no_output(tiny_llama, kind, tied, cut):
    if kind == "eagle" and not tied:
        pytest.skip("its vocabulary layer is always the base's")
    trained = _make(tiny_llama, kind, tied_vocabulary=tied)
    trained = cut_vocabulary(trained, torch.arange(96), cut) if cut else trained
    same, smaller = (copy.deepcopy(trained).prepare(tiny_llama, dtype) for dtype in (None, torch.bfloat16))
    hidden, rows = torch.randn(2, 9, 64), slice(0, 2)
    logits = []
    with torch.inference_mode():
        for heads in (same, smaller):
            state = heads.new_state(2, 40)
            heads.observe(state, hidden, torch.arange(18).view(2, 9), [9, 4], rows)
            path = torch.arange(2).view(2, 1, 1)
            logits.append(heads.guess(0, state, path, tiny_llama, torch.zeros(1, 1).long()).float())
    error = (logits[0] - logits[1]).square().mean().sqrt() / logits[0].std()
    assert 0 < error < 0.03
    requests = [Request((5, 6, 7), 20), Request((9, 8), 14)]
    outputs = [[Output() for _ in requests] for _ in (None, smaller)]
    list(Engine(tiny_llama, None, find_tree("root")).run(requests, outputs[0]))
    list(Engine(tiny_llama, smaller, find_tree("small-16")).run(requests, outputs[1]))
    assert [o.token_ids for o in outputs[1]] == [o.token_ids for o in outputs[0]]
