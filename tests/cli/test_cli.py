"""The command line as a user meets it: one line and exit code 2 for each mistake, nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest

from hydraspec.shipped import find_shipped
from tests.cli.conftest import assert_refused
from tests.conftest import make_model

TALK = json.dumps(
    {
        "conversations": [
            {"from": "human", "value": "A coffee, please."},
            {"from": "gpt", "value": "Which size would you like?"},
        ]
    }
)


def test_generate_prints_the_answer(call, shipped):
    code, out, err = call(
        "generate", "tiny-assistant", "Hello", "--heads", "hydra++", "--max-new-tokens", 12, "--stats"
    )
    assert code == 0
    assert out == shipped.generate("Hello", max_new_tokens=12)[0].text + "\n"
    assert "acceptance length" in err


def test_help_and_version(call):
    assert call("--help")[0] == 0
    assert "hydraspec 0." in call("--version")[1]
    code, out, _ = call("train", "--help")
    assert code == 0
    assert "--learning-rate" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "no/such/folder", "Hello"], "no model"),
        (["generate", "tiny-assistant", ""], "prompt is empty"),
        (["generate", "tiny-assistant", "  \n"], "prompt is empty"),
        (["generate", "tiny-assistant", "Hello", "--heads", "no/such/heads"], "no heads"),
        (["generate", "tiny-assistant", "Hello", "--tree", "oak"], "no tree is called"),
        (["generate", "tiny-assistant", "Hello", "--heads", "hydra", "--tree", "chain-9"], "9 deep"),
        (["generate", "tiny-assistant", "Hello", "--tree", "chain-2"], "no heads to fill it"),
        (["generate", "tiny-assistant", "Hello", "--max-new-tokens", "0"], "max_new_tokens"),
        (["generate", "tiny-assistant", "word " * 2000], "context holds 1024"),
        (["generate", "tiny-assistant", "Hello", "--max-new-tokens", "1024"], "do not fit"),
        (["info", "no/such/folder"], "no model"),
        (["bench", "no/such/folder"], "no model"),
        (["bench", "tiny-assistant", "--peers", "plain,vllm"], "no peer is called 'vllm'"),
        (["bench", "tiny-assistant", "--peers", "assisted"], "name one with --assistant"),
        (["bench", "tiny-assistant", "--peers", "assisted", "--assistant", "no/such/model"], "no model"),
        (["bench", "tiny-assistant", "--batch", "1,none"], "--batch reads sizes"),
        (["bench", "tiny-assistant", "--batch", "16"], "a batch of 16 needs as many prompts, but there are 12"),
        (["bench", "tiny-assistant", "--tree", "small-8"], "name them with --heads"),
        (["bench", "tiny-assistant", "--prompts", "none.jsonl"], "does not exist"),
        (["bench", "tiny-assistant", "--max-new-tokens", "1024"], "leave no room for a prompt"),
        (
            ["train", "--base", "tiny-assistant", "--recipe", "griffin", "--data", "x", "--out", "y"],
            "no recipe is called",
        ),
        (
            ["train", "--base", "tiny-assistant", "--recipe", "hydra", "--data", "x.jsonl", "--out", "y"],
            "does not exist",
        ),
    ],
)
def test_mistakes_are_one_line(call, words, message):
    assert_refused(call(*words), message)


def test_a_tree_with_a_gap_is_one_line(call, tmp_path):
    file = tmp_path / "gap.json"
    file.write_text("[[0], [2]]")
    assert_refused(
        call("generate", "tiny-assistant", "Hello", "--heads", "hydra", "--tree", file), "leaves a gap; add [1]"
    )


def test_heads_of_another_base_are_one_line(call, tmp_path):
    model = make_model("llama", vocab_size=4096, hidden_size=32)
    model.save_pretrained(tmp_path / "other")
    for file in Path(find_shipped("tiny-assistant")).glob("*token*"):
        shutil.copy(file, tmp_path / "other")
    result = call("generate", tmp_path / "other", "Hello", "--heads", "tiny-assistant-hydra")
    assert_refused(result, "hidden size 256 and vocabulary 4096, the model has 32 and 4096")


def test_truncated_weights_are_one_line(call, tmp_path):
    for name in ("tiny-assistant", "tiny-assistant-hydra"):
        shutil.copytree(find_shipped(name), tmp_path / name)
        weights = tmp_path / name / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    assert_refused(call("generate", tmp_path / "tiny-assistant", "Hello"), "weights of")
    assert_refused(call("generate", "tiny-assistant", "Hello", "--heads", tmp_path / "tiny-assistant-hydra"), "damaged")
    assert_refused(call("info", tmp_path / "tiny-assistant-hydra"), "damaged")


def test_recurrent_models_are_one_line(call, tmp_path):
    make_model("mamba", state_size=8, num_attention_heads=None).save_pretrained(tmp_path)
    assert_refused(call("info", tmp_path), "a tree of guesses cannot share")


def test_info_tells_models_from_heads(call):
    code, out, _ = call("info", "tiny-assistant")
    assert code == 0
    assert "5,868,800" in out
    code, out, _ = call("info", "tiny-assistant-hydra++")
    assert code == 0
    assert "4 x 4" in out


def test_training_writes_heads_that_decode(call, tmp_path):
    data, out = tmp_path / "talks.jsonl", tmp_path / "heads"
    data.write_text("\n".join(json.dumps({"id": str(n), **json.loads(TALK)}) for n in range(60)))
    words = [
        "train",
        "--base",
        "tiny-assistant",
        "--recipe",
        "hydra",
        "--data",
        data,
        "--out",
        out,
        "--tied-vocabulary",
    ]
    words += ["--held-out", 0.2, "--held-out-prompts", 2, "--warmup-steps", 2]
    code, shown, _ = call(*words, "--max-tokens", 2000, "--batch-tokens", 512, "--micro-tokens", 512)
    assert code == 0
    assert "predicted" in shown
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]
    assert call("generate", "tiny-assistant", "Hello", "--heads", out, "--max-new-tokens", 5)[0] == 0
    assert_refused(call(*words), "is there already")


def test_folders_that_cannot_be_written_are_refused_before_training(call, tmp_path):
    data, blocked = tmp_path / "talks.jsonl", tmp_path / "file"
    data.write_text(TALK)
    blocked.write_text("")
    words = ["train", "--base", "tiny-assistant", "--recipe", "hydra", "--data", data]
    assert_refused(call(*words, "--out", blocked / "heads"), "cannot be written")
    assert_refused(call(*words, "--out", tmp_path / "heads", "--max-length", 2048), "context of 1024")
    assert not (tmp_path / "heads").exists()


def test_broken_data_is_named_by_its_line_and_nothing_is_written(call, tmp_path):
    data, out = tmp_path / "talks.jsonl", tmp_path / "heads"
    data.write_text(f"{TALK}\n{TALK}\n{{broken\n")
    assert_refused(
        call("train", "--base", "tiny-assistant", "--recipe", "hydra", "--data", data, "--out", out), "line 3"
    )
    assert not out.exists()


def test_the_demo_writes_its_table(call, tmp_path):
    file = tmp_path / "demo.json"
    code, out, _ = call("demo", "--max-new-tokens", 16, "--rounds", 1, "--json", file)
    assert code == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == ["plain", "Medusa", "Hydra", "Hydra++"]
    assert all(row["identical"] for row in rows)
    assert rows[0]["speedup"] == 1.0
    assert all({"tokens_per_second", "acceptance_length"} <= row.keys() for row in rows)
    assert rows[3]["acceptance_length"] > rows[1]["acceptance_length"] > 1.0
    assert "Hydra++" in out


def test_bench_compares_methods_at_several_batch_sizes(call, tmp_path):
    prompts, file = tmp_path / "prompts.jsonl", tmp_path / "bench.json"
    prompts.write_text('{"turns": ["A large latte, please.", "Thanks."]}\n"Book a table for two."\n')
    words = ["bench", "tiny-assistant", "--heads", "hydra", "--tree", "small-8", "--tree", "chain-2"]
    words += ["--prompts", prompts, "--peers", "plain,hf,lookup", "--batch", "1,2", "--max-new-tokens", 8]
    code, out, _ = call(*words, "--rounds", 1, "--json", file)
    assert code == 0
    assert "5 methods in turn, batches of 1, 2, 1 round: 23 runs" in out
    assert "prompt lookup decodes at most 1 at once" in out
    content = json.loads(file.read_text())
    assert content["dtype"] == "float32"
    assert content["machine"]["threads"] == 1
    names = ["plain (our loop)", "transformers", "prompt lookup", "hydra, small-8", "hydra, chain-2"]
    assert [(row["name"], row["batch"]) for row in content["rows"]] == [(name, n) for n in (1, 2) for name in names]
    assert [row["name"] for row in content["rows"] if "skipped" in row] == ["prompt lookup"]
    rows = [row for row in content["rows"] if "skipped" not in row]
    assert all(row["identical"] and row["prompts"] == 2 for row in rows)
    assert rows[3]["acceptance_length"] > rows[0]["acceptance_length"] == 1.0
    assert sum(rows[3]["stage_shares"].values()) == pytest.approx(1.0)


def test_chat_talks_and_starts_over(call, monkeypatch):
    lines = iter(["I want coffee.", "", "/new", "word " * 2000])

    def ask(*_: object, **__: object) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("rich.console.Console.input", ask)
    code, out, _ = call("chat", "tiny-assistant", "--heads", "hydra", "--max-new-tokens", 8)
    assert code == 0
    assert "context holds 1024" in out.replace("\n", " ")
