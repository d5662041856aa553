import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hydraspec.base.model import BaseModel
from hydraspec.errors import CheckpointError
from hydraspec.heads import KINDS, cut_vocabulary, new_heads
from hydraspec.heads.checkpoint import Provenance, load_heads, save_heads
from tests.conftest import make_model


@pytest.fixture
def folder(tiny_llama, tmp_path):
    heads = new_heads(tiny_llama, "hydra", num_layers=2)
    save_heads(heads, tmp_path / "heads", Provenance("tiny-llama", tiny_llama.fingerprint()))
    return tmp_path / "heads"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded(tiny_llama, tmp_path, kind):
    heads = new_heads(tiny_llama, kind, num_layers=2)
    save_heads(heads, tmp_path / kind, Provenance("tiny-llama", tiny_llama.fingerprint()), dtype=torch.float32)
    loaded = load_heads(str(tmp_path / kind), tiny_llama, dtype=torch.float32)
    assert loaded.config == heads.config
    assert all(
        torch.equal(a, b) for a, b in zip(heads.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert sorted(file.name for file in (tmp_path / kind).iterdir()) == ["config.json", "model.safetensors"]


def test_a_cut_vocabulary_is_saved_with_its_token_ids(tiny_llama, tmp_path):
    heads = cut_vocabulary(new_heads(tiny_llama, "medusa"), torch.arange(96), 30)
    save_heads(heads, tmp_path, Provenance("tiny-llama", tiny_llama.fingerprint()))
    loaded = load_heads(str(tmp_path), tiny_llama)
    assert loaded.name_tokens(torch.tensor([0, 29])).tolist() == [66, 95]


def test_heads_of_another_shape_are_refused_with_both_shapes(folder):
    other = BaseModel(make_model("llama", hidden_size=32), "narrow")
    with pytest.raises(CheckpointError, match=r"hidden size 64 and vocabulary 96.*has 32 and 96"):
        load_heads(str(folder), other)


def test_heads_of_another_base_are_refused_unless_allowed(folder):
    model = make_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    other = BaseModel(model, "fine-tuned")
    with pytest.raises(CheckpointError, match="trained for another model"):
        load_heads(str(folder), other)
    assert load_heads(str(folder), other, allow_other_base=True) is not None


def test_damaged_weights_are_refused(folder, tiny_llama):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_heads(str(folder), tiny_llama)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_heads(str(folder), tiny_llama)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.0.first.linear.bias"), "lacks the tensor blocks.0.first.linear.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "holds a tensor extra"),
        (lambda t: t.update({"blocks.0.first.linear.bias": torch.zeros(3)}), r"has shape \[3\].*asks for \[64\]"),
    ],
)
def test_wrong_tensors_are_named(folder, tiny_llama, change, message):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message):
        load_heads(str(folder), tiny_llama)


def test_configs_that_say_nothing_of_heads_are_refused(folder, tiny_llama):
    for content in ("{", "{}", json.dumps({"format": 1, "heads": {"kind": "hydra", "wings": 2}, "provenance": {}})):
        (folder / "config.json").write_text(content)
        with pytest.raises(CheckpointError):
            load_heads(str(folder), tiny_llama)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_heads(str(folder.parent), tiny_llama)
