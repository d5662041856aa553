"""Exactness on random models of real architectures: scripted heads accept long paths, Hydra++ brings its layer."""

import pytest

from hydraspec.base.model import BaseModel
from hydraspec.decode.engine import Engine
from hydraspec.heads import new_heads
from hydraspec.tree import find_tree
from hydraspec.types import Output, Request
from tests.conftest import Script, ScriptedHeads, generate_plainly, make_model, random_prompts
from tests.tiny_models import EXACT

# A cut of them, for each way of attending; benchmarks/architectures.py goes over all.
NAMES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Phi3", "GPT-NeoX", "Mixtral", "GPT-2", "GPT-OSS")
NEW = 24
PROMPTS = random_prompts([5, 19, 11])


@pytest.mark.parametrize("name", NAMES)
def test_trees_say_what_plain_decoding_says(name):
    model_type, options = EXACT[name]
    base = BaseModel(make_model(model_type, **options), name)
    truth = [generate_plainly(base.model, prompt, NEW + 6) for prompt in PROMPTS]
    expected = [new[:NEW] for new in truth]
    assert min(len(set(new)) for new in expected) > 4, "text that repeats itself would show no mistake"
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
