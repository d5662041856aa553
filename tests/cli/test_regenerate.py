"""`hydraspec regenerate` as a user meets it."""

import json
import os
import signal
import threading
import time

import pytest

from tests.cli.conftest import assert_refused

WORDS = ("--base", "tiny-assistant", "--max-new-tokens", "12", "--batch", "2")


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    talks = [{"messages": [{"role": "user", "content": f"Book a table for {n}."}]} for n in range(40)]
    file.write_text("\n".join(map(json.dumps, talks)))
    return file


def test_ctrl_c_keeps_what_is_written_and_the_same_command_goes_on(call, data, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert call("regenerate", data, *WORDS, "--heads", "hydra", "--out", whole)[0] == 0
    part = tmp_path / "out.jsonl.part"

    def press():
        while not (part.exists() and part.stat().st_size):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    code, said, _ = call("regenerate", data, *WORDS, "--out", out)
    assert code == 130
    assert "the same command goes on" in said
    assert 0 < len(part.read_text().splitlines()) < 40
    code, said, _ = call("regenerate", data, *WORDS, "--out", out)
    assert code == 0
    assert "40 of 40" in said
    assert out.read_bytes() == whole.read_bytes()
    assert json.loads((tmp_path / "out.jsonl.json").read_text())["written"] == 40


def test_mistakes_are_one_line(call, data, tmp_path):
    out = tmp_path / "out.jsonl"
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n{"messages": ')
    for words, message in [
        (["no/such/file.jsonl", *WORDS, "--out", out], "does not exist"),
        ([broken, *WORDS, "--out", out], "line 2 is not JSON"),
        ([data, "--base", "no/such/model", "--out", out], "no model"),
        ([data, *WORDS, "--out", data], "is there already"),
        ([data, *WORDS, "--out", data / "x.jsonl"], "cannot be written"),
        ([data, *WORDS, "--out", out, "--tree", "chain-2"], "needs heads"),
        ([data, *WORDS, "--out", out, "--acceptance", "typical"], "only exact acceptance"),
        ([data, *WORDS, "--out", out, "--text-tokens", "0"], "text_tokens"),
    ]:
        assert_refused(call("regenerate", *words), message)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["broken.jsonl", "data.jsonl"]
