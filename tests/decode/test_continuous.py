import random

import pytest
import torch

from hydraspec.config import EngineConfig, SamplingConfig
from hydraspec.decode.engine import Engine
from hydraspec.errors import RequestError, TreeError
from hydraspec.heads import new_heads
from hydraspec.tree import TreeTable, find_tree, find_trees
from hydraspec.types import Output, Request
from tests.conftest import Script, ScriptedHeads, generate_plainly, random_prompts

NEW = 20
SYSTEM = random_prompts([70], seed=9)[0]
PROMPTS = [*random_prompts([5, 19, 40, 1, 33]), *(SYSTEM + tail for tail in random_prompts([3, 9, 14], seed=5))]


@pytest.fixture(scope="module")
def truth(tiny_llama):
    return [generate_plainly(tiny_llama.model, prompt, NEW + 8) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def scripted(tiny_llama, truth):
    return ScriptedHeads(tiny_llama, Script([prompt + new for prompt, new in zip(PROMPTS, truth, strict=True)]))


def drive(engine, jobs=()):
    """Step until nothing is left; the records."""
    records = []
    while not engine.is_idle:
        records += engine.step()
    return records


@pytest.mark.parametrize("order", range(25))
def test_arrivals_and_aborts_in_any_order_change_nothing(tiny_llama, scripted, truth, order):
    """Of 100 orders a quarter here, each with another mix of limits; the heads and tables change with the order too."""
    for kind in range(4):
        chance = random.Random(100 * order + kind)
        name = "eagle" if order % 2 else "hydra++"
        heads = scripted if kind < 3 else new_heads(tiny_llama, name).prepare(tiny_llama)
        config = EngineConfig(
            max_batch=chance.randint(1, 4),
            max_length=128,
            prefill_tokens=chance.choice([7, 32, 512]),
            share_prefixes=chance.random() < 0.7,
        )
        trees = find_trees(chance.choice(["small-16", "chain-3", "1:small-16,2:small-8,3:root", "2:root,4:chain-2"]))
        engine = Engine(tiny_llama, heads, trees, config)
        arrivals = chance.sample(range(len(PROMPTS)), k=chance.randint(3, len(PROMPTS)))
        running, aborted = {}, set()
        while arrivals or not engine.is_idle:
            if arrivals and chance.random() < 0.5:
                index = arrivals.pop()
                running[index] = engine.submit(Request(tuple(PROMPTS[index]), chance.randint(1, NEW)))
            if running and chance.random() < 0.1:
                index = chance.choice(list(running))
                if running[index].output.finish_reason is None:
                    aborted.add(index)
                engine.abort(running[index])
            engine.step()
        for index, job in running.items():
            tokens = job.output.token_ids
            assert tokens == truth[index][: len(tokens)], (index, kind)
            assert job.output.finish_reason == ("abort" if index in aborted else "length")
            assert index in aborted or len(tokens) == job.request.max_new_tokens


def test_a_long_prompt_does_not_stall_the_others(tiny_llama, truth):
    engine = Engine(tiny_llama, None, find_tree("root"), EngineConfig(max_batch=2, prefill_tokens=8))
    short = engine.submit(Request(tuple(PROMPTS[0]), NEW))
    engine.step()
    long = engine.submit(Request(tuple(PROMPTS[2]), 4))
    for step in range(4):  # 40 tokens in pieces of 8: at the fifth step the prompt is read
        before = len(short.output.token_ids)
        engine.step()
        assert len(short.output.token_ids) == before + 1, step
        assert long.output.token_ids == []
    engine.step()
    assert long.output.token_ids == truth[2][:2]


def test_requests_start_in_the_order_in_which_they_came(tiny_llama):
    engine = Engine(tiny_llama, None, find_tree("root"), EngineConfig(max_batch=2))
    jobs = [engine.submit(Request(tuple(prompt), 3 + n)) for n, prompt in enumerate(PROMPTS[:5])]
    firsts = [number for record in drive(engine) if record.nodes == 0 for number in record.sequences]
    assert firsts == [job.number for job in jobs]


def test_an_abort_frees_the_slot_at_once(tiny_llama, truth):
    engine = Engine(tiny_llama, None, find_tree("root"), EngineConfig(max_batch=1))
    first = engine.submit(Request(tuple(PROMPTS[0]), 20))
    waiting = engine.submit(Request(tuple(PROMPTS[1]), 20))
    last = engine.submit(Request(tuple(PROMPTS[2]), 5))
    engine.step()
    engine.abort(first)
    engine.abort(waiting)
    engine.abort(waiting)
    drive(engine)
    assert (first.output.finish_reason, waiting.output.finish_reason) == ("abort", "abort")
    assert waiting.output.token_ids == []
    assert last.output.token_ids == truth[2][:5]
    engine.abort(last)
    assert last.output.finish_reason == "length"


def test_closing_the_iterator_aborts_what_is_left(tiny_llama):
    engine = Engine(tiny_llama, None, find_tree("root"))
    output = Output()
    steps = engine.run([Request((3, 4, 5), 20)], [output])
    next(steps)
    steps.close()
    assert output.finish_reason == "abort"
    assert engine.is_idle


def test_run_wants_the_engine_for_itself(tiny_llama):
    engine = Engine(tiny_llama, None, find_tree("root"))
    engine.submit(Request((3, 4, 5), 3))
    with pytest.raises(RequestError, match="other requests"):
        next(engine.run([Request((3, 4), 3)], [Output()]))


def test_a_common_beginning_is_copied_not_read_again(tiny_llama, scripted, truth):
    engine = Engine(tiny_llama, scripted, find_tree("small-16"), EngineConfig(max_batch=3))
    read = []
    prefill = tiny_llama.prefill

    def count(ids, counts, cache, rows):
        read.append(sum(counts))
        return prefill(ids, counts, cache, rows)

    tiny_llama.prefill = count
    try:
        jobs = [engine.submit(Request(tuple(PROMPTS[index]), NEW)) for index in (5, 6, 7)]
        drive(engine)
        assert sum(read) == 73 + 9 + 14  # the system prompt once
        jobs.append(engine.submit(Request(tuple(PROMPTS[6]), NEW)))  # a free row holds it still
        drive(engine)
        assert sum(read) == 73 + 9 + 14 + 1
    finally:
        del tiny_llama.prefill
    assert [job.output.token_ids for job in jobs] == [truth[index][:NEW] for index in (5, 6, 7, 6)]


def test_tokens_beyond_the_end_of_a_text_are_not_shared(tiny_llama, truth):
    prompt, new = PROMPTS[1], truth[1]
    heads = ScriptedHeads(tiny_llama, Script([prompt + new], lambda _: 0))
    engine = Engine(tiny_llama, heads, find_tree("chain-4"), EngineConfig(max_batch=1))
    engine.submit(Request(tuple(prompt), 3))  # the first step accepts more than these
    drive(engine)
    held = engine._running.held(0)
    assert held == (prompt + new)[: len(held)]
    other = (*prompt, *new[:3], 7, 7, 7)
    job = engine.submit(Request(other, 5))
    drive(engine)
    assert job.output.token_ids == generate_plainly(tiny_llama.model, other, 5)


def test_the_tree_follows_the_load(tiny_llama, scripted, truth):
    engine = Engine(tiny_llama, scripted, find_trees("1:small-16,2:chain-2,4:root"), EngineConfig(max_batch=4))
    jobs = [engine.submit(Request(tuple(PROMPTS[n]), 2 + 5 * n)) for n in range(4)]
    nodes = {len(record.sequences): record.nodes for record in drive(engine) if record.nodes}
    assert nodes == {4: 1, 3: 1, 2: 3, 1: 16}
    assert [job.output.token_ids for job in jobs] == [truth[n][: 2 + 5 * n] for n in range(4)]


@pytest.mark.parametrize("kind", ["hydra++", "eagle"])
def test_heads_read_what_they_missed_while_nobody_drafted(tiny_llama, kind):
    """These remember every position: after plain steps it is as in an engine that always drafted."""
    heads = new_heads(tiny_llama, kind).prepare(tiny_llama)
    contexts = []
    for trees in ("2:root", "2:chain-1"):
        engine = Engine(tiny_llama, heads, TreeTable([*find_trees(trees).entries, (3, find_tree("chain-1"))]))
        for n in (0, 1):
            engine.submit(Request(tuple(PROMPTS[n]), 190))
        while len(engine._running.job(1).output.token_ids if engine._running.active else []) < 170:
            engine.step()
        with torch.inference_mode():
            engine._running.catch_up()
        memory = engine._running.heads.memory
        keys = getattr(memory, "cache", memory).slabs[0]
        texts = [tuple(engine._running.held(row)) for row in (0, 1)]
        contexts.append({text: keys[:, row, :, : len(text)] for row, text in enumerate(texts)})
    shared = contexts[0].keys() & contexts[1].keys()
    assert shared
    for text in shared:
        torch.testing.assert_close(contexts[0][text], contexts[1][text], rtol=1e-4, atol=1e-4)


def test_memory_is_planned_and_limits_are_kept(tiny_llama):
    # 4 layers x (keys and values) x 2 heads x 16 values x 4 bytes = 1024 bytes a token
    engine = Engine(tiny_llama, None, find_tree("root"), EngineConfig(max_batch=8, max_length=99, memory=350_000))
    assert engine.plan.bytes_per_sequence == 100 * 1024
    assert (engine.plan.max_batch, engine.plan.bytes) == (3, 3 * 100 * 1024)
    assert sum(slab.nbytes for slab in engine._running.cache.slabs) == engine.plan.bytes
    assert "3 sequences of 99 tokens" in engine.plan.describe()
    with pytest.raises(RequestError, match=r"90 tokens and 10 new ones do not fit max_length.* 99"):
        engine.submit(Request(tuple(random_prompts([90])[0]), 10))
    with pytest.raises(RequestError, match="does not hold one sequence of 99 tokens, which takes 102,400"):
        Engine(tiny_llama, None, find_tree("root"), EngineConfig(max_length=99, memory=100_000))


def test_the_plan_counts_the_heads_caches(tiny_llama):
    for kind in ("hydra++", "eagle"):
        heads = new_heads(tiny_llama, kind).prepare(tiny_llama)
        engine = Engine(tiny_llama, heads, find_tree("chain-2"), EngineConfig(max_batch=2, max_length=50))
        memory = engine._running.heads.memory
        tensors = [*engine._running.cache.slabs, *getattr(memory, "cache", memory).slabs]
        tensors += [memory.before] if kind == "eagle" else []
        assert engine.plan.bytes == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("heads", [None, "scripted"])
def test_sampled_and_greedy_requests_share_a_batch(tiny_llama, scripted, truth, heads):
    sampling = SamplingConfig(temperature=0.9, top_k=20, seed=11)
    requests = [Request(tuple(PROMPTS[0]), NEW), Request(tuple(PROMPTS[1]), NEW, sampling=sampling)]
    alone = []
    for request in requests:
        job = (engine := Engine(tiny_llama, None, find_tree("root"), EngineConfig(max_batch=1))).submit(request)
        drive(engine)
        alone.append(job.output.token_ids)
    tree = find_tree("small-16" if heads else "root")
    outputs = [Output(), Output()]
    list(Engine(tiny_llama, scripted if heads else None, tree).run(requests, outputs))
    assert [output.token_ids for output in outputs] == alone
    assert alone[0] == truth[0][:NEW]
    assert alone[1] != truth[1][:NEW]


@pytest.mark.parametrize("text", ["a:small-16", "2:small-16,1:root", "0:root", ":root", "2:nosuch"])
def test_a_wrong_table_of_trees_is_refused(text):
    with pytest.raises(TreeError):
        find_trees(text)
