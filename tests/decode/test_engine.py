import pytest
import torch

from hydraspec.base.model import BaseModel
from hydraspec.config import EngineConfig
from hydraspec.decode.batch import Job, RunningBatch
from hydraspec.decode.engine import Engine, emit
from hydraspec.decode.forwards import EagerForwards
from hydraspec.errors import RequestError, TreeError
from hydraspec.heads import KINDS, cut_vocabulary, new_heads
from hydraspec.tree import find_tree, find_trees
from hydraspec.types import Output, Request
from tests.conftest import Script, ScriptedHeads, generate_plainly, make_model, random_prompts

NEW = 40
PROMPTS = random_prompts([5, 19, 11, 1])
TREES = ["chain-4", "small-16", "published-63"]


@pytest.fixture(scope="module")
def truth(tiny_llama):
    return [generate_plainly(tiny_llama.model, prompt, NEW + 8) for prompt in PROMPTS]


def run(base, heads, tree, requests):
    outputs = [Output() for _ in requests]
    records = list(Engine(base, heads, find_tree(tree)).run(requests, outputs))
    return outputs, records


def scripted(base, truth, rank=None):
    texts = [prompt + new for prompt, new in zip(PROMPTS, truth, strict=True)]
    return ScriptedHeads(base, Script(texts, rank) if rank else Script(texts))


def test_plain_decoding_is_the_tree_of_the_root(tiny_llama, truth):
    outputs, records = run(tiny_llama, None, "root", [Request(tuple(p), NEW) for p in PROMPTS])
    assert [o.token_ids for o in outputs] == [t[:NEW] for t in truth]
    assert all(o.acceptance_length == 1.0 for o in outputs)
    assert len(records) == NEW  # the prefill and NEW - 1 steps


@pytest.mark.parametrize("tree", TREES)
def test_a_ragged_batch_says_what_each_prompt_says_alone(tiny_llama, truth, tree):
    heads = scripted(tiny_llama, truth)
    limits = [NEW, 7, NEW - 9, 23]  # sequences end at different times
    outputs, _ = run(tiny_llama, heads, tree, [Request(tuple(p), n) for p, n in zip(PROMPTS, limits, strict=True)])
    assert [o.token_ids for o in outputs] == [t[:n] for t, n in zip(truth, limits, strict=True)]
    if tree != "chain-4":
        assert max(o.acceptance_length for o in outputs) > 2


def test_perfect_guesses_are_all_accepted(tiny_llama, truth):
    outputs, records = run(
        tiny_llama, scripted(tiny_llama, truth, lambda _: 0), "chain-4", [Request(tuple(PROMPTS[0]), 31)]
    )
    assert outputs[0].token_ids == truth[0][:31]
    assert outputs[0].acceptance_length == 5.0
    assert [r.accepted for r in records[1:]] == [(4,)] * 6


def test_wrong_guesses_cost_nothing_but_time(tiny_llama, truth):
    outputs, _ = run(
        tiny_llama, scripted(tiny_llama, truth, lambda _: None), "small-16", [Request(tuple(PROMPTS[0]), NEW)]
    )
    assert outputs[0].token_ids == truth[0][:NEW]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tree", TREES)
def test_untrained_heads_change_nothing(tiny_llama, truth, kind, tree):
    heads = new_heads(tiny_llama, kind).prepare(tiny_llama)
    for chosen in (slice(0, 4), slice(1, 2)):
        outputs, _ = run(tiny_llama, heads, tree, [Request(tuple(p), NEW) for p in PROMPTS[chosen]])
        assert [o.token_ids for o in outputs] == [t[:NEW] for t in truth[chosen]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forward", ["eager", "static"])
def test_every_draft_is_what_the_text_alone_would_get(tiny_llama, truth, kind, forward):
    """Accepted tokens, rows that come and go and what others in the batch say leave no trace in what heads remember."""
    heads = new_heads(tiny_llama, kind, prefix_layer="plain", prefix_window=0).prepare(tiny_llama)
    tree = find_tree("small-16")
    limits = [NEW, 7, NEW - 9, 23]
    engine = Engine(tiny_llama, heads, tree, EngineConfig(forward=forward, max_batch=3))
    for prompt, limit in zip(PROMPTS, limits, strict=True):
        engine.submit(Request(tuple(prompt), limit))
    seen, draft = {}, engine._forwards.draft

    def watch(tree):
        drafted = draft(tree)
        for row, tokens in enumerate(drafted.tokens.tolist()):
            text = (*engine._running.held(row), tokens[0])
            seen[text] = tokens
        return drafted

    engine._forwards.draft = watch
    while not engine.is_idle:
        engine.step()
    assert len(seen) > 60
    for text in list(seen)[::9]:
        alone = RunningBatch(tiny_llama, heads, 1, 120)
        with torch.inference_mode():
            ids = torch.tensor([text])
            hidden = tiny_llama.prefill(ids[:, :-1], [len(text) - 1], alone.cache).hidden
            alone.observe(hidden, ids[:, :-1], [len(text) - 1], slice(0, 1))
            alone.active, alone.root[0] = 1, text[-1]
            assert EagerForwards(tiny_llama, heads, alone).draft(tree).tokens[0].tolist() == seen[text]


@pytest.mark.parametrize("tree", ["root", "small-16", "1:small-16,2:chain-2,3:root"])
def test_static_shapes_change_nothing(tiny_llama, truth, tree):
    limits = [NEW, 7, NEW - 9, 23]
    requests = [Request(tuple(p), n) for p, n in zip(PROMPTS, limits, strict=True)]
    outputs = [Output() for _ in requests]
    heads = scripted(tiny_llama, truth) if tree != "root" else None
    list(Engine(tiny_llama, heads, find_trees(tree), EngineConfig(forward="static")).run(requests, outputs))
    assert [o.token_ids for o in outputs] == [t[:n] for t, n in zip(truth, limits, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_vocabulary_changes_nothing(tiny_llama, truth, kind):
    heads = cut_vocabulary(new_heads(tiny_llama, kind), torch.arange(96), 20).prepare(tiny_llama)
    outputs, _ = run(tiny_llama, heads, "published-63", [Request(tuple(p), NEW) for p in PROMPTS])
    assert [o.token_ids for o in outputs] == [t[:NEW] for t in truth]


@pytest.mark.parametrize("place", [0, 1, 2, 3, 4, 9])
def test_end_of_text_cuts_inside_an_accepted_block(tiny_llama, truth, place):
    end = truth[1][place]
    expected = truth[1][: truth[1].index(end) + 1]
    request = Request(tuple(PROMPTS[1]), NEW, frozenset([end]))
    heads = ScriptedHeads(tiny_llama, Script([PROMPTS[1] + truth[1]], lambda _: 0))
    outputs, _ = run(tiny_llama, heads, "chain-4", [request])
    assert outputs[0].token_ids == expected
    assert outputs[0].finish_reason == "eos"


@pytest.mark.parametrize("limit", range(1, 8))
def test_the_limit_counts_tokens_not_steps(tiny_llama, truth, limit):
    outputs, _ = run(
        tiny_llama, scripted(tiny_llama, truth, lambda _: 0), "chain-4", [Request(tuple(PROMPTS[0]), limit)]
    )
    assert outputs[0].token_ids == truth[0][:limit]
    assert outputs[0].finish_reason == "length"


def test_decoding_goes_up_to_the_last_position_of_the_context(tiny_llama):
    prompt = random_prompts([250])[0]
    text = prompt + generate_plainly(tiny_llama.model, prompt, 6)
    heads = ScriptedHeads(tiny_llama, Script([text], lambda _: 0))
    outputs, _ = run(tiny_llama, heads, "chain-4", [Request(tuple(prompt), 6)])
    assert prompt + outputs[0].token_ids == text


@pytest.mark.parametrize("kind", ["medusa", "hydra++", "eagle"])
def test_learned_positions_are_never_asked_for_beyond_the_context(kind):
    base = BaseModel(make_model("gpt2", n_positions=64), "gpt2")
    prompts = random_prompts([58, 12])
    heads = new_heads(base, kind).prepare(base)
    requests = [Request(tuple(prompts[0]), 6), Request(tuple(prompts[1]), 40)]
    outputs, _ = run(base, heads, "published-63", requests)
    for prompt, request, output in zip(prompts, requests, outputs, strict=True):
        assert output.token_ids == generate_plainly(base.model, prompt, request.max_new_tokens)


def test_longrope_models_stay_within_their_original_context():
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model = make_model(
        "phi3",
        rope_parameters=factors,
        original_max_position_embeddings=32,
        max_position_embeddings=256,
    )
    base = BaseModel(model, "phi3")
    assert base.max_length == 32
    prompt = random_prompts([24])[0]
    truth = generate_plainly(model, prompt, 8)
    heads = ScriptedHeads(base, Script([prompt + truth], lambda _: 0))
    outputs, _ = run(base, heads, "chain-4", [Request(tuple(prompt), 8)])
    assert outputs[0].token_ids == truth


def test_what_cannot_fit_is_refused_before_anything_starts(tiny_llama):
    outputs = [Output(), Output()]
    requests = [Request((3, 4), 5), Request(tuple(random_prompts([200])[0]), 57)]
    with pytest.raises(RequestError, match=r"200 tokens and 57 new ones do not fit.*256"):
        list(Engine(tiny_llama, None, find_tree("root")).run(requests, outputs))
    assert outputs[0].token_ids == []
    with pytest.raises(RequestError, match="empty"):
        list(Engine(tiny_llama, None, find_tree("root")).run([Request((), 5)], outputs))


def test_a_tree_that_the_heads_cannot_fill_is_refused(tiny_llama):
    with pytest.raises(TreeError, match="5 deep, but the heads guess 4"):
        Engine(tiny_llama, ScriptedHeads(tiny_llama, Script([])), find_tree("chain-5"))
    narrow = cut_vocabulary(new_heads(tiny_llama, "medusa"), torch.arange(96), 3).prepare(tiny_llama)
    with pytest.raises(TreeError, match="asks for 10 tokens of one head, but only 3"):
        Engine(tiny_llama, narrow, find_tree("published-63"))
    with pytest.raises(TreeError, match="no heads"):
        Engine(tiny_llama, None, find_tree("chain-1"))


def test_records_tell_what_each_step_did(tiny_llama, truth):
    outputs, records = run(
        tiny_llama, scripted(tiny_llama, truth), "small-16", [Request(tuple(p), NEW) for p in PROMPTS]
    )
    assert records[0].nodes == 0
    assert {r.nodes for r in records[1:]} == {16}
    for index, output in enumerate(outputs):
        mine = [r.emitted[r.sequences.index(index)] for r in records if index in r.sequences]
        assert [token for tokens in mine for token in tokens] == output.token_ids
        assert output.steps == len(mine) - 1
    assert all(r.seconds.verify > 0 for r in records[1:])


def test_emit_asks_the_stop_check_about_new_tokens_only():
    seen = []

    def check(tokens, new):
        seen.append((list(tokens), new))
        return 4 if len(tokens) >= 5 else None

    output = Output()
    job = Job(0, Request((1,), 10, stop_check=check), output)
    assert emit(job, [1, 2, 3]) == (1, 2, 3)
    assert emit(job, [4, 5]) == (4,)
    assert (output.token_ids, output.finish_reason) == ([1, 2, 3, 4], "stop")
    assert job.live.tokens == [1, 1, 2, 3, 4]
    assert seen == [([1, 2, 3], 3), ([1, 2, 3, 4, 5], 2)]


def test_ties_and_repeats_do_not_confuse_the_walk(tiny_llama):
    heads = ScriptedHeads(tiny_llama, Script([[3] * 60], lambda _: 0))
    outputs, _ = run(tiny_llama, heads, "published-63", [Request((3, 3, 3), 20)])
    assert outputs[0].token_ids == generate_plainly(tiny_llama.model, [3, 3, 3], 20)
