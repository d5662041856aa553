from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hydraspec.base.facts import store_columns_first
from hydraspec.base.model import BaseModel
from hydraspec.errors import CheckpointError, UnsupportedModel
from hydraspec.shipped import find_shipped
from tests.conftest import make_model


def test_the_model_is_left_as_it_was(tiny_llama):
    before = tiny_llama.model.config._attn_implementation
    cache = tiny_llama.new_cache(1, 10)
    tiny_llama.prefill(torch.tensor([[3, 4, 5]]), [3], cache)
    assert tiny_llama.model.config._attn_implementation == before
    assert not tiny_llama.output_layer._forward_pre_hooks


def test_prefill_gives_all_hidden_states_and_the_last_logits(tiny_llama):
    ids = torch.randint(3, 96, (2, 6))
    verified = tiny_llama.prefill(ids, [6, 4], tiny_llama.new_cache(2, 10))
    out = tiny_llama.model(ids, output_hidden_states=True, use_cache=False)
    assert verified.logits.shape == (2, 1, 96)
    torch.testing.assert_close(verified.hidden, out.hidden_states[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(verified.logits[1, 0], out.logits[1, 3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {}),
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": 3.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_project_gives_the_models_own_logits(model_type, options):
    base = BaseModel(make_model(model_type, **options))
    verified = base.prefill(torch.randint(3, 96, (1, 6)), [6], base.new_cache(1, 10))
    torch.testing.assert_close(base.project(verified.hidden[:, -1:]), verified.logits, rtol=1e-4, atol=1e-4)


def test_weights_stored_by_columns_give_the_same_products():
    layer = nn.Linear(8, 5)
    x, before = torch.randn(3, 8), layer.weight.clone()
    expected = layer(x)
    store_columns_first(layer)
    assert layer.weight.stride() == (1, 5)
    assert torch.equal(layer.weight, before)
    torch.testing.assert_close(layer(x), expected)


def test_fingerprint_is_of_the_model_not_of_its_dtype(tiny_llama):
    assert tiny_llama.fingerprint() == BaseModel(make_model("llama")).fingerprint()
    other = make_model("llama")
    with torch.no_grad():
        other.get_input_embeddings().weight[7] += 1
    assert tiny_llama.fingerprint() != BaseModel(other).fingerprint()
    half = BaseModel(make_model("llama").to(torch.bfloat16))
    assert half.fingerprint() == tiny_llama.fingerprint()


def test_recurrent_models_are_refused_in_one_line():
    with pytest.raises(UnsupportedModel, match="a tree of guesses cannot share") as refused:
        BaseModel(make_model("mamba", state_size=8, num_attention_heads=None))
    assert "\n" not in str(refused.value)


def test_models_whose_attention_ignores_the_tree_are_refused():
    with pytest.raises(UnsupportedModel, match="cannot verify trees"):
        BaseModel(make_model("gpt_neo", attention_types=[[["global", "local"], 2]], window_size=8))


@pytest.mark.parametrize(("kind", "options"), [("bloom", {"n_layer": 4, "n_head": 4}), ("mpt", {}), ("falcon", {})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_that_come_from_slots_are_refused(kind, options, dtype):
    options = {"alibi": True, "new_decoder_architecture": False} if kind == "falcon" else options
    with pytest.raises(UnsupportedModel, match="ALiBi"):
        BaseModel(make_model(kind, **options).to(dtype))


def test_broken_model_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no config"):
        BaseModel.load(str(tmp_path))
    shipped = Path(find_shipped("tiny-assistant"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((shipped / "config.json").read_text())
    with pytest.raises(CheckpointError, match="weights"):
        BaseModel.load(str(folder))
    tensors = load_file(shipped / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of its tensors, the first is model\.norm\.weight"):
        BaseModel.load(str(folder))
    whole = (shipped / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="weights"):
        BaseModel.load(str(folder))
