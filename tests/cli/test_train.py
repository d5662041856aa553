"""`hydraspec train` in the hands of a user: what is shown, what stops it, and what is refused."""

import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from hydraspec.shipped import find_shipped
from tests.cli.conftest import assert_refused

WORDS = [
    "train",
    "--base",
    "tiny-assistant",
    "--recipe",
    "hydra",
    "--num-heads",
    "2",
    "--tied-vocabulary",
    "--draft-vocabulary",
    "300",
    "--max-length",
    "64",
    "--batch-tokens",
    "256",
    "--micro-tokens",
    "256",
    "--held-out-prompts",
    "1",
]


def write_talks(file, count, word="table"):
    talks = [
        {
            "id": str(n),
            "messages": [
                {"role": "user", "content": f"Book a {word} for {n}."},
                {"role": "assistant", "content": f"For which day would you like {n} of them?"},
            ],
        }
        for n in range(count)
    ]
    file.write_text("\n".join(map(json.dumps, talks)))
    return file


@pytest.fixture
def data(tmp_path):
    return write_talks(tmp_path / "data.jsonl", 60)


def test_a_preview_sets_apart_what_is_learned(call, data, tmp_path):
    code, said, _ = call(*WORDS, "--data", data, "--preview", 2)
    assert code == 0
    assert "example 2" in said
    assert "example 3" not in said
    assert "⟦For which day would you like 1 of them?<|end|>⟧" in " ".join(said.split())
    assert not (tmp_path / "heads").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_can_go_on(call, data, tmp_path, number):
    out, whole = tmp_path / "heads", tmp_path / "whole"
    assert call(*WORDS, "--data", data, "--epochs", 3, "--out", whole)[0] == 0

    def press():
        while not (out / "training").is_dir() or not list((out / "training").glob("step-*")):
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    threading.Thread(target=press).start()
    words = [*WORDS, "--data", data, "--epochs", 3, "--out", out, "--checkpoint-steps", 1]
    code, said, err = call(*words)
    assert code == 130
    assert "--resume goes on" in " ".join(said.split())
    assert "stopped" in err
    assert (out / "model.safetensors").exists()
    assert_refused(call(*words), "go on with --resume")
    assert_refused(call(*words, "--resume", "--seed", 3), "begun with seed 0, not 3")
    code, said, _ = call(*words, "--resume")
    assert code == 0
    assert "resumed after step" in said
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]
    ended, expected = (load_file(folder / "model.safetensors") for folder in (out, whole))
    assert all(torch.equal(ended[name], expected[name]) for name in expected)
    assert_refused(call(*words, "--resume"), "complete")


def test_a_loss_that_is_no_number_keeps_the_checkpoints(call, data, tmp_path):
    out = tmp_path / "heads"
    words = [*WORDS, "--data", data, "--epochs", 3, "--out", out, "--checkpoint-steps", 1, "--warmup-steps", 0]
    code, _, err = call(*words, "--learning-rate", 1e30)
    assert code == 2
    assert "the loss is nan at step" in err
    assert "lower --learning-rate" in err
    steps = sorted((out / "training").glob("step-*"))
    assert steps
    for step in steps[1:]:  # its weights are beyond repair: go back by one
        shutil.rmtree(step)
    (said,) = [call(*words, "--resume", "--learning-rate", 1e-4)[1]]
    assert "learning_rate is 0.0001 from here on; it was 1e+30" in said


def test_a_base_whose_weights_are_damaged_is_refused(call, data, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(find_shipped("tiny-assistant"), base)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    out = tmp_path / "heads"
    assert_refused(call(*WORDS, "--base", base, "--data", data, "--out", out), "its weights are damaged")
    assert not out.exists()


def test_hidden_states_of_something_else_are_refused(call, data, tmp_path):
    states, out = tmp_path / "states", tmp_path / "heads"
    words = [*WORDS, "--hidden-states", states, "--out", out]
    assert call(*words, "--data", data)[0] == 0
    shutil.rmtree(out)
    code, _, err = call(*words, "--data", write_talks(tmp_path / "other.jsonl", 60, "room"))
    assert code == 2
    assert "are of other data" in err
    assert not out.exists()


def test_a_full_disk_is_told_before_the_first_step(call, data, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    out = tmp_path / "heads"
    code, _, err = call(*WORDS, "--data", data, "--out", out)
    assert code == 2
    assert "two checkpoints need" in err
    assert not out.exists()
    code, _, err = call(*WORDS, "--data", data, "--out", out, "--hidden-states", tmp_path / "states")
    assert code == 2
    assert "need 1 MB, but the disk" in err
    assert not (tmp_path / "states").exists()


def test_trackers_follow_the_run(call, data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "heads"
    assert call(*WORDS, "--data", data, "--out", out, "--track", "tensorboard")[0] == 0
    events = EventAccumulator(str(out / "logs" / "hydraspec")).Reload()
    names = events.Tags()["scalars"]
    assert {"loss/all", "loss/head_1", "learning_rate", "gradient_norm"} <= set(names)
    assert any(name.endswith("/predicted") for name in names)


def test_a_tracker_that_is_not_there_is_named(call, data, tmp_path, monkeypatch):
    from hydraspec.cli import train

    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None if name == "wandb" else name)
    words = [*WORDS, "--data", data, "--out", tmp_path / "heads", "--track"]
    assert_refused(call(*words, "wandb"), "--track wandb needs the package wandb")
    assert_refused(call(*words, "paper"), "choose tensorboard or wandb")
