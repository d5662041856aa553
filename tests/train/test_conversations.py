import gzip
import json
import sys
from pathlib import Path

import pytest

from hydraspec.errors import DataError
from hydraspec.train import conversations
from hydraspec.train.conversations import read_conversations, read_objects

TALK = {
    "id": "1",
    "conversations": [
        {"from": "human", "value": "A coffee, please."},
        {"from": "gpt", "value": "Which size?"},
    ],
}
MESSAGES = [{"role": "user", "content": "A coffee, please."}, {"role": "assistant", "content": "Which size?"}]


def write(file: Path, text: str) -> Path:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "wt", encoding="utf-8") as out:
        out.write(text)
    return file


@pytest.mark.parametrize("name", ["talks.jsonl", "talks.jsonl.gz", "talks.json", "talks"])
@pytest.mark.parametrize("turns", [{"conversations": TALK["conversations"]}, {"messages": MESSAGES}])
def test_conversations_are_read_from_lines_of_either_form(tmp_path, name, turns):
    line = json.dumps({"id": 7, **turns})
    first, second = read_conversations(write(tmp_path / name, f"{line}\n\n{line}\n"))
    assert list(first.messages) == MESSAGES
    assert (first.id, first.text) == ("7", None)
    assert second.where.endswith("talks.jsonl, line 3") or name != "talks.jsonl"


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("name", ["talks.json", "talks.json.gz"])
def test_a_json_list_is_read_piece_by_piece(tmp_path, monkeypatch, chunk, name):
    monkeypatch.setattr(conversations, "CHUNK", chunk)
    talks = [{**TALK, "id": f"é{n}", "more": [n, {"a": "]}"}]} for n in range(20)]
    file = write(tmp_path / name, "\n " + json.dumps(talks, indent=1))
    read = list(read_conversations(file))
    assert [talk.id for talk in read] == [f"é{n}" for n in range(20)]
    assert read[4].where == f"{file}, entry 5"
    assert len(list(read_conversations(file, limit=3))) == 3


def test_a_broken_json_list_is_named_by_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(conversations, "CHUNK", 16)
    whole = json.dumps([TALK] * 3, indent=1)
    lines = whole.splitlines()
    broken = next(n for n in range(15, len(lines)) if '"value"' in lines[n])
    lines[broken] = lines[broken].replace('"value":', '"value"')
    with pytest.raises(DataError, match=rf"line {broken + 1} \(entry 2\) is not JSON"):
        list(read_conversations(write(tmp_path / "talks.json", "\n".join(lines))))
    with pytest.raises(DataError, match="cut short"):
        list(read_conversations(write(tmp_path / "talks.json", whole.rstrip("]\n"))))


def test_plain_text_is_read_by_documents(tmp_path):
    file = write(tmp_path / "book.txt.gz", "\n\nOne\ntwo.\n \nThree.\n\n\nFour.")
    read = list(read_conversations(file))
    assert [document.text for document in read] == ["One\ntwo.", "Three.", "Four."]
    assert [document.where.rsplit(", ")[1] for document in read] == ["line 3", "line 6", "line 9"]
    assert len({document.id for document in read}) == 3
    (document,) = read_conversations(write(tmp_path / "texts.jsonl", json.dumps({"text": "One."})))
    assert (document.text, document.messages) == ("One.", ())


def test_an_id_follows_from_the_content_alone(tmp_path):
    one, two = ({"messages": [{"role": "user", "content": text}]} for text in "ab")
    first = [c.id for c in read_conversations(write(tmp_path / "a.jsonl", f"{json.dumps(one)}\n{json.dumps(two)}"))]
    again = [c.id for c in read_conversations(write(tmp_path / "b.json", json.dumps([two, one])))]
    assert first == again[::-1]
    assert len(set(first)) == 2


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ('{"id": 3}', "has id"),
        ('{"conversations": []}', "no list of turns"),
        ('{"messages": {"role": "user"}}', "no list of turns"),
        ('{"conversations": [{"from": "dog", "value": "wuff"}]}', 'role "dog"'),
        ('{"messages": [{"role": "tool", "content": "4"}]}', 'role "tool"'),
        ('{"conversations": [{"from": "gpt"}]}', '"value"'),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', '"content"'),
        ('{"messages": [{"role": "user", "content": " "}]}', "a turn of user is empty"),
        ('{"text": "  "}', "no words"),
        ("[1]", "no object"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, line, why):
    file = write(tmp_path / "talks.jsonl", f"{json.dumps(TALK)}\n{line}\n")
    with pytest.raises(DataError, match="line 2") as refused:
        list(read_conversations(file))
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


def test_conversations_that_begin_with_an_answer_begin_after_it(tmp_path):
    answer = {"from": "gpt", "value": "…and so on."}
    lines = [{"conversations": [answer, *TALK["conversations"]]}, {"conversations": [answer]}]
    begun, nothing = read_conversations(write(tmp_path / "talks.jsonl", "\n".join(map(json.dumps, lines))))
    assert list(begun.messages) == MESSAGES
    assert nothing.messages == ()


def test_missing_and_truncated_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        list(read_conversations(tmp_path / "none.jsonl"))
    lines = "\n".join(json.dumps({**TALK, "id": str(n)}) for n in range(500))
    file = write(tmp_path / "talks.jsonl.gz", lines)
    file.write_bytes(file.read_bytes()[:-40])
    for read in (read_conversations, read_objects):
        with pytest.raises(DataError, match="cannot be read after line"):
            list(read(file))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt cannot be read"):
        list(read_conversations(tmp_path / "latin.txt"))


def test_a_folder_is_streamed_through_the_datasets_library(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", f"{json.dumps(TALK)}\n" * 3)
    read = list(read_conversations(folder, limit=2))
    assert [list(talk.messages) for talk in read] == [MESSAGES] * 2
    assert read[1].where == f"{folder}, row 2"
    with pytest.raises(DataError, match="split none, cannot be read"):
        list(read_conversations(f"datasets:{folder}:none"))


def test_data_sets_are_named_by_config_and_split(monkeypatch):
    asked = []

    class Library:
        @staticmethod
        def load_dataset(path, config, split, streaming):
            asked.append((path, config, split, streaming))
            return [{"messages": MESSAGES}]

    monkeypatch.setitem(sys.modules, "datasets", Library)
    for name in ("org/talks", "org/talks:test", "org/talks:small:test"):
        assert len(list(read_conversations(f"datasets:{name}"))) == 1
    none, test = ("org/talks", None), "test"
    assert asked == [(*none, "train", True), (*none, test, True), ("org/talks", "small", test, True)]
    with pytest.raises(DataError, match="names no data set"):
        list(read_conversations("datasets:a:b:c:d"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install hydraspec\[train\]"):
        list(read_conversations("datasets:org/talks"))
