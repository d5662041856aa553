"""The recipe of the shipped base model writes a folder like the shipped one, or nothing."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from hydraspec.shipped import find_shipped
from hydraspec.text import TextCodec

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny_base.py"
TALK = {"conversations": [{"from": "human", "value": "A coffee, please."}, {"from": "gpt", "value": "Which size?"}]}


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    (tmp_path / "talks.jsonl").write_text("\n".join([json.dumps(TALK)] * 40))

    def call(*words: object, interrupted: bool = False) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tiny_base.py", *map(str, words)])
        recipe = runpy.run_path(str(RECIPE))
        if interrupted:
            recipe["run"].__globals__["make_model"] = interrupt
        with pytest.raises(SystemExit) as end:
            recipe["run"]()
        return int(end.value.code or 0), capsys.readouterr().err

    data = tmp_path / "talks.jsonl"
    return lambda *words, **options: call("--train", data, "--eval", data, "--steps", 1, *words, **options)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_recipe_writes_what_is_shipped(call, tmp_path):
    out, shipped = tmp_path / "new" / "model", Path(find_shipped("tiny-assistant"))
    assert call("--out", out) == (0, "")
    card = "README.md"  # written by another recipe
    assert {file.name for file in out.iterdir()} == {file.name for file in shipped.iterdir()} - {card}
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (shipped, out))
    del theirs["transformers_version"], ours["transformers_version"]
    assert ours == theirs
    messages = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}]
    codec = TextCodec.load(str(out))
    assert codec.render(messages, answer_follows=True) == TextCodec.load(str(shipped)).render(messages, True)
    assert [
        codec.tokenizer.convert_tokens_to_ids(name) for name in ("<pad>", "<|user|>", "<|assistant|>", "<|end|>")
    ] == [0, 1, 2, 3]
    code, err = call("--out", out)
    assert code == 2
    assert "not empty" in err
    assert err.count("\n") == 1


def test_an_interrupted_recipe_writes_nothing(call, tmp_path):
    assert call("--out", tmp_path / "model", interrupted=True) == (130, "tiny_base: stopped; nothing is saved\n")
    assert [file.name for file in tmp_path.iterdir()] == ["talks.jsonl"]
