"""Checkpoints are whole or passed over."""

import errno
import json

import pytest
import torch

from hydraspec.errors import HydraspecError
from hydraspec.train import checkpoint
from hydraspec.train.checkpoint import has_checkpoints, load_checkpoint, save_checkpoint


def tensors(step: int) -> dict[str, torch.Tensor]:
    weight = torch.full((3, 2), float(step))
    return {"model.weight": weight, "model.same": weight.t(), "random.0.cpu": torch.arange(5, dtype=torch.uint8)}


def test_the_newest_comes_back_and_the_last_two_are_kept(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, step, tensors(step), {"tokens": 7 * step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    found = load_checkpoint(tmp_path)
    assert (found.step, found.facts["tokens"]) == (100, 700)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors(100).items())


@pytest.mark.parametrize("damage", ["cut", "flip", "no json", "half json", "no weights"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, damage):
    save_checkpoint(tmp_path, 1, tensors(1), {})
    last = save_checkpoint(tmp_path, 2, tensors(2), {})
    weights, facts = last / "state.safetensors", last / "state.json"
    content = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(content[:-3])
    elif damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no json":
        facts.unlink()
    elif damage == "half json":
        facts.write_text(facts.read_text()[:20])
    else:
        weights.unlink()
    assert load_checkpoint(tmp_path).step == 1
    assert "step-00000002 is damaged" in caplog.text


def test_an_unfinished_checkpoint_is_none(tmp_path):
    save_checkpoint(tmp_path, 1, tensors(1), {})
    (tmp_path / ".unfinished-step-00000002").mkdir()
    (tmp_path / ".unfinished-step-00000002" / "state.json").write_text(json.dumps({"step": 2}))
    assert load_checkpoint(tmp_path).step == 1
    assert has_checkpoints(tmp_path)


def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_so(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, tensors(1), {})

    def fill(_: object, file: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fill)
    with pytest.raises(HydraspecError, match="no space is left on the disk"):
        save_checkpoint(tmp_path, 2, tensors(2), {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(tmp_path).step == 1
