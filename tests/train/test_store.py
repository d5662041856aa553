import json
import shutil

import numpy as np
import pytest

from hydraspec.errors import DataError
from hydraspec.shipped import find_shipped
from hydraspec.text import TextCodec
from hydraspec.train.batch import Example
from hydraspec.train.store import TokenStore, is_held_out, prepare_stores

EXAMPLES = [Example([5, 1, 2, 2], [False, True, True, False]), Example([7, 2], [False, True]), Example([3], [False])]


@pytest.fixture(scope="module")
def codec():
    return TextCodec.load(find_shipped("tiny-assistant"))


def write_talks(file, numbers):
    lines = []
    for n in numbers:
        turns = [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]
        lines.append(json.dumps({"id": f"talk-{n}", "messages": turns}))
    file.write_text("\n".join(lines))
    return str(file)


def read_texts(store, codec):
    return [codec.decode(store[number].ids) for number in range(len(store))]


def test_a_store_gives_back_what_was_written(tmp_path):
    store = TokenStore.build(tmp_path / "tokens", iter(EXAMPLES), 9)
    for again in (store, TokenStore(tmp_path / "tokens")):
        assert [again[number] for number in range(len(again))] == EXAMPLES
        assert again.lengths.tolist() == [4, 2, 1]
        assert again.token_counts.tolist() == [0, 1, 2, 0, 0, 0, 0, 0, 0]
        assert (again.num_tokens, again.num_assistant_tokens, again.digest) == (7, 3, store.digest)
    other = TokenStore.build(tmp_path / "other", [EXAMPLES[0], Example([7, 2], [True, True]), EXAMPLES[2]], 9)
    assert other.digest != store.digest
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["tokens.bin", "mask.bin", "ends.bin", "counts.bin", "facts.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_a_torn_or_changed_store_is_refused(tmp_path, name, how):
    folder = TokenStore.build(tmp_path / "tokens", EXAMPLES, 9).folder
    content = (folder / name).read_bytes()
    if how == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content[:-1] if how == "cut" else bytes([content[0] ^ 1]) + content[1:])
    if (name, how) == ("facts.json", "cut"):
        (folder / name).write_bytes(content[:-4])
    with pytest.raises(DataError, match="remove that folder") as refused:
        TokenStore(folder)
    assert "\n" not in str(refused.value)


def test_nothing_is_left_of_a_store_whose_examples_fail(tmp_path):
    before = TokenStore.build(tmp_path / "tokens", EXAMPLES, 9).digest
    with pytest.raises(DataError, match="belongs to another model"):
        TokenStore.build(tmp_path / "tokens", [EXAMPLES[1], Example([9, 1], [False, True])], 9)
    assert TokenStore(tmp_path / "tokens").digest == before
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_the_split_depends_on_the_id_alone():
    apart = [is_held_out(f"talk-{n}", 0.1) for n in range(2000)]
    assert 150 < sum(apart) < 250
    assert not any(is_held_out(f"talk-{n}", 0.0) for n in range(100))
    assert all(is_held_out(f"talk-{n}", 1.0) for n in range(100))
    assert all(is_held_out(f"talk-{n}", 0.2) for n in range(2000) if apart[n])  # a larger share only adds


def test_held_out_conversations_are_the_same_in_any_order_and_company(tmp_path, codec):
    data = write_talks(tmp_path / "a.jsonl", range(60))
    train, apart = prepare_stores(data, None, codec, tmp_path / "a", 64, 0.2, 4096)
    assert len(train) + len(apart) == 60
    assert apart.num_tokens and not set(read_texts(train, codec)) & set(read_texts(apart, codec))
    more = write_talks(tmp_path / "b.jsonl", [*range(90, 59, -1), *range(59, -1, -1)])
    _, again = prepare_stores(more, None, codec, tmp_path / "b", 64, 0.2, 4096)
    assert set(read_texts(apart, codec)) < set(read_texts(again, codec))


def test_stores_are_used_again_until_something_changes(tmp_path, codec):
    data = write_talks(tmp_path / "a.jsonl", range(30))
    told = []

    def prepare(data=data, length=64, share=0.2):
        told.clear()
        return prepare_stores(data, None, codec, tmp_path / "tokens", length, share, 4096, told.append)

    first = prepare()[0].digest
    assert told[-1] == 30
    assert prepare()[0].digest == first and not told
    assert prepare(share=0.5)[0].digest != first and told
    assert prepare()[0].digest == first and told
    write_talks(tmp_path / "a.jsonl", range(31))
    assert prepare()[0].digest != first and told
    (tmp_path / "tokens" / "train" / "tokens.bin").write_bytes(b"torn")
    assert len(prepare()[0]) and told


def test_evaluation_data_stand_in_for_the_split(tmp_path, codec):
    data, other = write_talks(tmp_path / "a.jsonl", range(9)), write_talks(tmp_path / "b.jsonl", range(100, 104))
    train, apart = prepare_stores(data, other, codec, tmp_path / "tokens", 64, 0.5, 4096)
    assert (len(train), len(apart)) == (9, 4)


def test_a_store_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    store = TokenStore.build(tmp_path / "tokens", EXAMPLES, 9)
    with (store.folder / "tokens.bin").open("r+b") as file:
        file.truncate(8)
    with pytest.raises(DataError, match="became shorter"):
        store.read(1)
    shutil.rmtree(store.folder)
    assert np.array_equal(store.lengths, [4, 2, 1])
