"""Hidden states on disk are the model's own, are checked when read, and train the same heads."""

import json

import pytest
import torch

from hydraspec.base.model import BaseModel
from hydraspec.errors import CheckpointError, HydraspecError
from hydraspec.train import prepare, states_writer
from hydraspec.train.hidden_states import HiddenStates, OnlineStates
from hydraspec.train.packing import load_batch
from hydraspec.train.states_writer import write_hidden_states
from tests.conftest import make_model
from tests.train.conftest import make_store, prepare_small


@pytest.fixture
def written(small_base, tmp_path):
    store = make_store(tmp_path / "tokens")
    folder = tmp_path / "states"
    assert write_hidden_states(small_base, store, folder, shard_bytes=20_000) == store.num_tokens
    return folder, store


def test_what_is_read_is_what_the_model_says(small_base, written):
    folder, store = written
    assert len(list(folder.glob("*.safetensors"))) > 3
    states = HiddenStates.open(folder, small_base, store)
    batch = load_batch(store, [(3, 40), (17,), (59, 0)])
    ours, theirs = states.read(batch), OnlineStates(small_base).read(batch)
    real = batch.segments >= 0
    assert ours.dtype == torch.bfloat16
    assert not ours[~real].any()
    torch.testing.assert_close(ours[real], theirs[real], rtol=2e-2, atol=2e-2)  # one bfloat16 step


def test_a_written_folder_is_used_again_and_missing_shards_are_written(small_base, written):
    folder, store = written
    assert write_hidden_states(small_base, store, folder) == 0
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match="it is missing"):
        HiddenStates.open(folder, small_base, store)
    assert 0 < write_hidden_states(small_base, store, folder) < store.num_tokens
    assert shard.read_bytes() == content


def test_states_of_other_things_are_refused(small_base, written, tmp_path):
    folder, store = written
    with pytest.raises(CheckpointError, match="of another base model"):
        HiddenStates.open(folder, BaseModel(make_model("llama", intermediate_size=64), "other"), store)
    with pytest.raises(CheckpointError, match="of other data"):
        HiddenStates.open(folder, small_base, make_store(tmp_path / "more", 61))
    with pytest.raises(CheckpointError, match="holds no hidden states"):
        HiddenStates.open(tmp_path / "tokens", small_base, store)
    shard = min(folder.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="not what was written"):
        HiddenStates.open(folder, small_base, store)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "shards": index["shards"][:-1]}))
    with pytest.raises(CheckpointError, match="not complete"):
        HiddenStates.open(folder, small_base, store)


def test_a_disk_without_room_is_refused_before_the_first_byte(small_base, tmp_path, monkeypatch):
    store = make_store(tmp_path / "tokens")
    monkeypatch.setattr(states_writer.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(HydraspecError, match=r"need 0 MB, but the disk of .* has 0 MB free"):
        write_hidden_states(small_base, store, tmp_path / "states")
    assert not (tmp_path / "states").exists()


def test_training_from_files_equals_training_online(small_base, tmp_path):
    weights = []
    for folder in (None, tmp_path / "states"):
        prepared = prepare_small(tmp_path / str(folder is None), small_base, hidden_states=folder, learning_rate=1e-3)
        trainer = prepare.make_trainer(prepared)
        trainer.run()
        weights.append(torch.cat([p.detach().flatten() for p in prepared.heads.parameters()]))
    # Hidden states differ where another batch rounds to the other side of a bfloat16 step.
    assert (weights[0] - weights[1]).abs().max() < 2e-3
    assert (weights[0] - weights[1]).norm() < 2e-3 * weights[0].norm()
