import gzip
import json

import pytest

import hydraspec.train.answering as answering_module
from hydraspec.config import EngineConfig, RegenerationConfig, SamplingConfig
from hydraspec.errors import DataError, HydraspecError
from hydraspec.llm import LLM
from hydraspec.train import regenerate as module
from hydraspec.train.regenerate import regenerate

ASKED = [
    "Hi",
    "I want coffee.",
    "Find me a hotel in San Jose.",
    "A bus, please.",
    "What is 2 + 3?",
    "Hi",
    "Book a table.",
]
SHORT = RegenerationConfig(max_new_tokens=30)
GREEDY = SamplingConfig()


@pytest.fixture
def data(tmp_path):
    """Conversations of one to three questions; the last has no answer, one begins with an answer, one is a system's."""
    lines = []
    for number, asked in enumerate(ASKED):
        turns = [{"role": "user", "content": asked}]
        for more in ASKED[number : number + number % 3]:
            turns += [{"role": "assistant", "content": "no"}, {"role": "user", "content": more}]
        lines.append({"id": f"n{number}", "messages": turns})
    lines[3]["messages"].insert(0, {"role": "system", "content": "Be kind."})
    lines[4]["messages"].append({"role": "assistant", "content": "never"})
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


def with_batch(llm, batch, heads=None):
    return LLM(llm.base, llm.codec, heads, None, EngineConfig(max_batch=batch))


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_answer_is_the_base_models_own(shipped, data, tmp_path):
    done = regenerate(with_batch(shipped, 3), data, tmp_path / "out.jsonl", SHORT, GREEDY)
    written, asked = read_lines(tmp_path / "out.jsonl"), read_lines(data)
    assert done.is_complete
    assert [line["id"] for line in written] == [line["id"] for line in asked]
    plain, cut = with_batch(shipped, 1), 0
    for line, source in zip(written, asked, strict=True):
        messages = line["messages"]
        users = [m for m in source["messages"] if m["role"] != "assistant"]
        assert [m for m in messages if m["role"] != "assistant"] == users[: len(messages) - len(messages) // 2]
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                output = plain.generate([messages[:place]], max_new_tokens=30)[0]
                assert message["content"] == output.text
        assert output.finish_reason == line["finish_reason"]
        cut += line["finish_reason"] == "length"
        assert line["finish_reason"] == "length" or len([m for m in messages if m["role"] == "user"]) == sum(
            m["role"] == "user" for m in users
        )
    assert 0 < cut < len(written)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=0.8, seed=5)], ids=["greedy", "sampled"])
def test_batch_heads_and_interruptions_change_no_byte(shipped, data, tmp_path, sampling):
    whole = tmp_path / "whole.jsonl.gz"
    regenerate(with_batch(shipped, 1), data, whole, SHORT, sampling)
    for number, (batch, heads, steps) in enumerate([(2, None, 20), (7, shipped.heads, 3)]):
        out = tmp_path / f"{number}.jsonl.gz"
        part = out.with_name(out.name + ".part")
        llm, calls, done = with_batch(shipped, batch, heads), 0, None
        while done is None or not done.is_complete:
            left = iter(range(steps * 2**calls))
            done = regenerate(llm, data, out, SHORT, sampling, stopped=lambda left=left: next(left, None) is None)
            calls += 1
            if part.exists():  # as a kill in the middle of a line leaves it
                with part.open("a") as file:
                    file.write('{"id": "n1", "number": 6' + "}" * (calls % 2))
        assert calls > 1
        assert out.read_bytes() == whole.read_bytes()
        assert not part.exists()
    lines = [json.loads(line) for line in gzip.decompress(whole.read_bytes()).splitlines()]
    same = lines[0]["messages"][1] == lines[5]["messages"][1]  # the same question in two conversations
    assert same == (sampling is GREEDY)


def test_plain_texts_are_continued(shipped, tmp_path):
    file, out = tmp_path / "data.txt", tmp_path / "out.jsonl"
    file.write_text("I am looking for a bus to San Francisco because I have to be there at ten.\n\nWe want to go to\n")
    regenerate(with_batch(shipped, 2), file, out, RegenerationConfig(max_new_tokens=8, text_tokens=6), GREEDY)
    first, second = read_lines(out)
    ids = shipped.codec.encode("I am looking for a bus to San Francisco because", raw=True)[:6]
    said = with_batch(shipped, 1).generate([ids], max_new_tokens=8)[0]
    assert first["text"] == shipped.codec.decode([*ids, *said.token_ids])
    assert second["text"].startswith("We want to go to")


def test_conversations_end_where_the_context_is_full(shipped, data, tmp_path):
    out = tmp_path / "out.jsonl"
    done = regenerate(with_batch(shipped, 2), data, out, RegenerationConfig(max_length=40), GREEDY)
    written = read_lines(out)
    assert done.conversations == len(ASKED)
    assert all(len(shipped.codec.encode(line["messages"][:-1])) < 40 for line in written)
    assert any(line["finish_reason"] == "length" for line in written)
    assert all(line["messages"][-1]["role"] == "assistant" for line in written)


def test_few_conversations_are_at_hand_at_once(shipped, data, tmp_path, monkeypatch):
    read, most = [0], [0]

    def count(*arguments):
        for conversation in read_all(*arguments):
            read[0] += 1
            yield conversation

    read_all = module.read_conversations
    monkeypatch.setattr(module, "read_conversations", count)
    monkeypatch.setattr(answering_module, "AHEAD", 2)

    def watch(done):
        most[0] = max(most[0], read[0] - done.conversations)

    regenerate(with_batch(shipped, 1), data, tmp_path / "out.jsonl", SHORT, GREEDY, watch)
    assert read[0] == len(ASKED)
    assert most[0] <= 2


def test_a_base_without_answers_is_an_error(shipped, data, tmp_path):
    eos = min(shipped.base.eos_token_ids)
    with pytest.raises(DataError, match=r"no conversation that .* has an answer to"):
        regenerate(
            with_batch(shipped, 2), data, tmp_path / "out.jsonl", SHORT, SamplingConfig(logit_bias=((eos, 1e4),))
        )
    assert [file.name for file in tmp_path.iterdir()] == ["data.jsonl"]


def test_what_was_begun_otherwise_is_not_mixed(shipped, data, tmp_path):
    out, llm = tmp_path / "out.jsonl", with_batch(shipped, 1)
    left = iter(range(20))
    regenerate(llm, data, out, SHORT, GREEDY, stopped=lambda: next(left, None) is None)
    with pytest.raises(HydraspecError, match="begun with another config"):
        regenerate(llm, data, out, RegenerationConfig(max_new_tokens=9), GREEDY)
    with pytest.raises(HydraspecError, match="begun with another sampling"):
        regenerate(llm, data, out, SHORT, SamplingConfig(temperature=1.0))
    before = data.read_text()
    data.write_text(before + before)
    with pytest.raises(HydraspecError, match="begun with another data"):
        regenerate(llm, data, out, SHORT, GREEDY)
    data.write_text(before)
    (tmp_path / "out.jsonl.json").write_text("{")
    with pytest.raises(HydraspecError, match="missing or damaged"):
        regenerate(llm, data, out, SHORT, GREEDY)
    (tmp_path / "out.jsonl.part").unlink()
    out.write_text("mine")
    with pytest.raises(HydraspecError, match="is there already"):
        regenerate(llm, data, out, SHORT, GREEDY)
    assert out.read_text() == "mine"
    with pytest.raises(HydraspecError, match="exact"):
        regenerate(llm, data, tmp_path / "b", SHORT, SamplingConfig(temperature=1.0, acceptance="typical"))
