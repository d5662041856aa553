import gzip
import json
from pathlib import Path

import pytest

from hydraspec.errors import DataError
from hydraspec.shipped import find_shipped
from hydraspec.text import TextCodec
from hydraspec.train.data import encode_conversation, make_batches, read_conversations, read_examples

TALK = {
    "id": "1",
    "conversations": [
        {"from": "human", "value": "A coffee, please."},
        {"from": "gpt", "value": "Which size?"},
        {"from": "human", "value": "Large."},
        {"from": "gpt", "value": "It is ready."},
    ],
}


@pytest.fixture(scope="module")
def codec():
    return TextCodec.load(find_shipped("tiny-assistant"))


def write(folder: Path, *lines: str, packed: bool = False) -> Path:
    file = folder / ("talks.jsonl.gz" if packed else "talks.jsonl")
    opener = gzip.open if packed else open
    with opener(file, "wt", encoding="utf-8") as out:
        out.write("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize("packed", [False, True])
def test_conversations_are_read_with_their_line_numbers(tmp_path, packed):
    file = write(tmp_path, json.dumps(TALK), "", json.dumps(TALK), packed=packed)
    read = list(read_conversations(file))
    assert [number for number, _ in read] == [1, 3]
    assert read[0][1][1] == {"role": "assistant", "content": "Which size?"}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"id": 3}',
        '{"conversations": []}',
        '{"conversations": [{"from": "dog", "value": "wuff"}]}',
        '{"conversations": [{"from": "gpt"}]}',
        "[1]",
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, line):
    file = write(tmp_path, json.dumps(TALK), line)
    with pytest.raises(DataError, match="line 2") as refused:
        list(read_conversations(file))
    assert "\n" not in str(refused.value)


def test_conversations_that_begin_with_an_answer_begin_after_it(tmp_path):
    talk = {"conversations": [{"from": "gpt", "value": "…and so on."}, *TALK["conversations"]]}
    (_, messages), *_ = read_conversations(write(tmp_path, json.dumps(talk)))
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]


def test_missing_and_truncated_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        list(read_conversations(tmp_path / "none.jsonl"))
    file = write(tmp_path, *[json.dumps({**TALK, "id": str(n)}) for n in range(500)], packed=True)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataError, match="cannot be read after line"):
        list(read_conversations(file))


def test_the_mask_marks_what_the_assistant_wrote(codec, tmp_path):
    (_, messages), *_ = read_conversations(write(tmp_path, json.dumps(TALK)))
    example = encode_conversation(codec, messages, "here")
    marked = [token for token, mine in zip(example.ids, example.mask, strict=True) if mine]
    assert codec.tokenizer.decode(marked) == "Which size?<|end|>It is ready.<|end|>"
    unmarked = [token for token, mine in zip(example.ids, example.mask, strict=True) if not mine]
    assert (
        codec.tokenizer.decode(unmarked)
        == "<|user|>A coffee, please.<|end|><|assistant|><|user|>Large.<|end|><|assistant|>"
    )


def test_a_template_that_rewrites_earlier_turns_is_refused(codec, tmp_path):
    class Odd(TextCodec):
        def render(self, messages, answer_follows=False):
            return f"{len(messages)} turns " + super().render(messages, answer_follows)

    with pytest.raises(DataError, match="line 9: the chat template rewrites"):
        encode_conversation(
            Odd(codec.tokenizer), [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "line 9"
        )


def test_batches_hold_every_example_once_and_keep_the_bound(codec, tmp_path):
    lines = []
    for n in range(120):
        talk = json.loads(json.dumps(TALK))
        talk["conversations"][0]["value"] = "please " * (n % 40) + str(n)
        lines.append(json.dumps(talk))
    examples = list(read_examples(write(tmp_path, *lines), codec, max_length=50))
    batches = make_batches(examples, batch_tokens=300, seed=1)
    assert all(batch.ids.numel() <= 300 for batch in batches)
    assert sum(batch.num_tokens for batch in batches) == sum(len(e.ids) for e in examples)
    assert sum(int(batch.mask.sum()) for batch in batches) == sum(sum(e.mask) for e in examples)
    again = make_batches(examples, batch_tokens=300, seed=1)
    assert all((a.ids == b.ids).all() for a, b in zip(batches, again, strict=True))
