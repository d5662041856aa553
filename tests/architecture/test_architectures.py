"""Exactness on random models of real architectures: scripted heads accept long paths, Hydra++ brings its layer."""

import pytest

from hydraspec.base.model import BaseModel
from hydraspec.decode.engine import Engine
from hydraspec.heads import new_heads
from hydraspec.tree import find_tree
from hydraspec.types import Output, Request
from tests.conftest import WINDOW, Script, ScriptedHeads, generate_plainly, make_model, random_prompts

MIXED = ["sliding_attention", "full_attention"] * 2
ARCHITECTURES = {
    "Llama": ("llama", {}),
    "Mistral": ("mistral", {"sliding_window": WINDOW}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {"head_dim": 16}),
    "Gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "Phi3": ("phi3", {}),
    "GPT-NeoX": ("gpt_neox", {}),
    "Mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "GPT-2": ("gpt2", {"n_positions": 256}),
    "GPT-OSS": (
        "gpt_oss",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": MIXED,
        },
    ),
}
NEW = 24
PROMPTS = random_prompts([5, 19, 11])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trees_say_what_plain_decoding_says(name):
    model_type, options = ARCHITECTURES[name]
    base = BaseModel(make_model(model_type, **options), name)
    truth = [generate_plainly(base.model, prompt, NEW + 6) for prompt in PROMPTS]
    expected = [new[:NEW] for new in truth]
    scripted = ScriptedHeads(base, Script([p + new for p, new in zip(PROMPTS, truth, strict=True)]))
    drafts = {
        kind: new_heads(base, kind, tied_vocabulary=True).prepare(base) for kind in ("medusa", "hydra", "hydra++")
    }
    accepted = []
    for tree in ("chain-4", "small-16", "published-63"):
        for heads in (scripted, *drafts.values()):
            if heads is not scripted and tree == "chain-4":
                continue  # chains of untrained heads accept nothing
            outputs = _run(base, heads, tree, PROMPTS)
            assert [o.token_ids for o in outputs] == expected, f"{tree}, {heads.config.kind}, ragged batch"
            accepted.append(max(o.acceptance_length for o in outputs))
    alone = ScriptedHeads(base, Script([PROMPTS[1] + truth[1]]))
    assert _run(base, alone, "small-16", PROMPTS[1:2])[0].token_ids == expected[1]
    assert max(accepted) > 2


def _run(base, heads, tree, prompts):
    outputs = [Output() for _ in prompts]
    requests = [Request(tuple(prompt), NEW) for prompt in prompts]
    for _ in Engine(base, heads, find_tree(tree)).run(requests, outputs):
        pass
    return outputs
