"""The benchmark: what is counted, how it is summed up, and that every method decodes the same text."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from hydraspec.base.model import BaseModel
from hydraspec.errors import DataError, RequestError
from hydraspec.evaluate.bench import (
    Method,
    Run,
    Skipped,
    compare,
    compare_sizes,
    count_runs,
    decode_with,
    make_batches,
    summarise,
)
from hydraspec.evaluate.peers import PEERS, check_peers, cut_after_eos, decode_with_transformers, make_peers
from hydraspec.evaluate.suites import DEMO_PROMPTS, find_prompts, read_prompts
from hydraspec.heads import new_heads
from hydraspec.llm import LLM
from hydraspec.text import TextCodec
from hydraspec.types import Seconds
from tests.conftest import VOCABULARY, generate_plainly, make_model, random_prompts

NEW = 12
PROMPTS = random_prompts([5, 19, 11, 8])


@pytest.fixture(scope="module")
def talkative():
    """A tiny model with a token that ends some of its texts early, and what it says to the prompts."""
    plainly = [generate_plainly(make_model("llama"), prompt, NEW) for prompt in PROMPTS]
    eos = plainly[1][NEW // 2]
    model = make_model("llama", eos_token_id=eos)
    # A tokenizer is asked for its size only, where prompts are token ids.
    llm = LLM(BaseModel(model, "tiny"), TextCodec(range(VOCABULARY)), None)
    assert llm.base.eos_token_ids == {eos}
    return llm, [cut_after_eos(tokens, llm.base.eos_token_ids) for tokens in plainly]


def test_texts_are_cut_after_the_first_eos():
    assert cut_after_eos([5, 2, 7, 2, 0], frozenset({2, 9})) == [5, 2]
    assert cut_after_eos([5, 7], frozenset({2})) == [5, 7]
    assert cut_after_eos([2, 0, 0], frozenset({2})) == [2]
    assert cut_after_eos([2, 2], frozenset()) == [2, 2]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_method_says_the_same_at_every_batch_size(talkative, size):
    llm, expected = talkative
    eos = llm.base.eos_token_ids
    drafting = LLM(llm.base, llm.codec, new_heads(llm.base, "hydra").prepare(llm.base), "small-16")
    methods = [decode_with(llm, NEW, size), decode_with(drafting, NEW, size)]
    methods.append(decode_with_transformers(llm.base.model, NEW, eos))
    if size == 1:
        methods.append(decode_with_transformers(llm.base.model, NEW, eos, prompt_lookup_num_tokens=10))
        methods.append(decode_with_transformers(llm.base.model, NEW, eos, assistant_model=make_model("llama")))
    assert len(expected[1]) < NEW
    for decode in methods:
        runs = [decode(batch) for batch in make_batches(PROMPTS, size)]
        assert [tokens for run in runs for tokens in run.token_ids] == expected
        assert all(run.passes <= run.steps <= run.step_tokens for run in runs)
        assert all(run.steps <= run.passes * size for run in runs)


def test_passes_of_transformers_are_counted_as_ours(talkative):
    llm, expected = talkative
    ours = decode_with(llm, NEW, 4)(PROMPTS)
    theirs = decode_with_transformers(llm.base.model, NEW, llm.base.eos_token_ids)(PROMPTS)
    assert ours.passes == theirs.passes == max(map(len, expected)) - 1
    assert ours.steps == theirs.steps == ours.step_tokens == theirs.step_tokens == sum(map(len, expected)) - 4
    assert not llm.base.model._forward_pre_hooks


def test_prompts_met_before_are_read_anew(talkative):
    llm, _ = talkative
    decode = decode_with(llm, NEW)
    read = []
    prefill = llm.base.prefill

    def watch(ids, *rest, **named):
        read.append(ids.shape[1])
        return prefill(ids, *rest, **named)

    llm.base.prefill = watch
    try:
        decode(PROMPTS[1:2])
        decode(PROMPTS[1:2])
    finally:
        del llm.base.prefill
    assert read == [len(PROMPTS[1])] * 2


def test_rows_from_runs():
    stages = Seconds(0.1, 0.6, 0.1, 0.2)
    plain = [[Run([[1, 2, 3], [4, 5]], 2.0)] * 3, [Run([[6], [7, 8]], 2.0)] * 3]
    runs = [
        [Run([[1, 2, 3], [4, 5]], seconds, 2, 3, 6, stages) for seconds in (9.0, 1.0, 0.5)],
        [Run([[6], [7, 9]], seconds, 2, 3, 6, stages) for seconds in (1.0, 1.0, 1.5)],
    ]
    row = summarise("ours", runs, plain)
    assert (row.name, row.batch, row.prompts, row.tokens) == ("ours", 2, 4, 8)
    assert row.tokens_per_second == pytest.approx(8 / 2)  # the medians of both batches are 1 s
    assert row.speedup == pytest.approx(2.0)
    assert (row.identical, row.identical_prompts) == (False, 3)
    assert row.acceptance_length == pytest.approx(2.0)
    assert row.step_milliseconds == pytest.approx(500.0)
    assert row.stage_shares == pytest.approx({"draft": 0.1, "verify": 0.6, "accept": 0.1, "commit": 0.2})
    assert row.round_tokens_per_second == pytest.approx([8 / 10, 8 / 2, 8 / 2])
    assert json.loads(json.dumps(vars(row)))["batch"] == 2
    silent = summarise("plain", plain, plain)
    assert (silent.speedup, silent.identical, silent.step_milliseconds, silent.stage_shares) == (1.0, True, None, {})


def test_methods_take_turns_and_are_warmed_up():
    calls = []

    def make(name):
        def decode(batch):
            calls.append((name, len(batch[0])))
            return Run([[1]] * len(batch), 1.0)

        return Method(name, decode)

    watched = []
    batches = [[[1] * 4], [[1] * 7]]
    rows = compare([make("a"), make("b")], batches, rounds=2, watch=lambda: watched.append(1))
    assert [row.name for row in rows] == ["a", "b"]
    warm, first, second = calls[:2], calls[2:6], calls[6:]
    assert warm == [("a", 7), ("b", 7)]
    assert first == [("a", 4), ("b", 4), ("b", 4), ("a", 4)]
    assert second == [("a", 7), ("b", 7), ("b", 7), ("a", 7)]
    assert len(watched) == 10
    calls.clear()
    compare([make("a")], [*batches, [[1] * 8]])
    assert calls[:2] == [("a", 7), ("a", 8)]
    assert len(calls) == 5


def test_sizes_that_a_method_cannot_take_are_skipped():
    def decode(batch):
        return Run([[1]] * len(batch), 1.0)

    methods = [Method("a", decode), Method("single", decode, largest_batch=1)]
    prompts, watched = [[1]] * 5, []
    rows = compare_sizes(methods, prompts, [1, 2], rounds=3, watch=lambda: watched.append(1))
    assert [(row.name, row.batch) for row in rows] == [("a", 1), ("single", 1), ("a", 2), ("single", 2)]
    assert [isinstance(row, Skipped) for row in rows] == [False, False, False, True]
    assert [row.prompts for row in rows[:3]] == [5, 5, 4]  # the last of five is left out of batches of two
    assert len(watched) == count_runs(methods, prompts, [1, 2], rounds=3) == 2 * (5 * 3 + 1) + 2 * 3 + 1
    with pytest.raises(RequestError, match="a batch of 8 needs as many prompts, but there are 5"):
        compare_sizes(methods, prompts, [1, 8])
    assert len(watched) == count_runs(methods, prompts, [1, 2], rounds=3)


def test_peers_that_cannot_be_made(shipped, tmp_path):
    with pytest.raises(RequestError, match="no peer is called 'vllm'"):
        check_peers(["plain", "vllm"], None)
    with pytest.raises(RequestError, match="name one with --assistant"):
        check_peers(["assisted"], None)
    assert [method.name for method in make_peers(shipped, [], NEW)] == [PEERS["plain"]]
    make_model("llama").save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(shipped.base.name) / file, tmp_path)
    with pytest.raises(RequestError, match="another vocabulary"):
        make_peers(shipped, ["assisted"], NEW, assistant=str(tmp_path))


def test_an_assistant_drafts(shipped):
    methods = make_peers(shipped, ["assisted", "hf"], NEW, assistant="tiny-assistant")
    assert [method.name for method in methods] == [PEERS["plain"], PEERS["hf"], PEERS["assisted"]]
    rows = compare_sizes(methods, [shipped.codec.encode("A large latte, please.")], [1])
    assert all(row.identical for row in rows)
    assert rows[2].acceptance_length > 1.5


# -- prompts ---------------------------------------------------------------------------------------------------------

TALK = {"conversations": [{"from": "human", "value": "Tea?"}, {"from": "gpt", "value": "Yes."}]}


def test_prompt_files(shipped, tmp_path):
    codec = shipped.codec
    lines = [json.dumps("Tea?"), "", json.dumps({"prompt": "Tea?"}), json.dumps({"id": 1, "turns": ["Tea?", "Why?"]})]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines))
    expected = codec.encode("Tea?")
    assert read_prompts(file, codec, 3, 100) == [expected] * 3
    packed = tmp_path / "prompts.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert find_prompts(packed, codec, None, 2, 100) == [expected] * 2
    file.write_text(json.dumps(TALK))
    assert find_prompts(file, codec, None, 2, None) == [expected]
    assert find_prompts(None, codec, 2, 40, None) == [codec.encode(text) for text in DEMO_PROMPTS[:2]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('"Tea?"\n{"prompt": 5}', "line 2 holds no prompt"),
        ('"Tea?"\n{"turns": []}', "line 2 holds no prompt"),
        ('"Tea?"\n"  "', "line 2 holds no prompt"),
        ('"Tea?"\n{"conversations": []}', "line 2 holds no prompt"),
        ('"Tea?"\n{', "line 2 is not JSON"),
        (json.dumps(TALK) + '\n"Tea?"', "line 2 has no list of turns"),
        ('"Tea?"', "gives only 1 prompts of at most 50 tokens, 2 are wanted"),
        (json.dumps("tea " * 200), "gives only 0 prompts"),
        ("", "gives only 0 prompts"),
    ],
)
def test_prompt_files_that_cannot_be_read(shipped, tmp_path, content, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        find_prompts(file, shipped.codec, 2, 40, 50)
    assert "\n" not in str(error.value)


def test_a_prompt_file_that_is_not_there(shipped, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_prompts(tmp_path / "none.jsonl", shipped.codec, 1, 10)
    (tmp_path / "torn.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="cannot be read after line 0"):
        read_prompts(tmp_path / "torn.gz", shipped.codec, 1, 10)
