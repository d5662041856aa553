import importlib.util

import pytest
import torch
from torch import nn

from hydraspec.base.model import BaseModel
from hydraspec.base.quantised import find_quantisation, is_plain_linear
from hydraspec.decode.engine import Engine
from hydraspec.errors import CheckpointError, UnsupportedModel
from hydraspec.heads import new_heads
from hydraspec.tree import find_tree
from hydraspec.types import Output, Request
from tests.conftest import generate_plainly, make_model, random_prompts


class ByteLinear(nn.Linear):
    """A linear layer whose weight is kept in bytes, with a scale for each row, as quantising libraries do it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantise(model, also_output=False):
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if type(child) is nn.Linear:
                    setattr(part, name, ByteLinear(child))
    if also_output:
        model.lm_head = ByteLinear(model.lm_head)
    return model


@pytest.mark.parametrize("kind", ["hydra", "hydra++", "eagle"])
def test_a_quantised_base_is_run_as_it_is_and_decodes_exactly(kind):
    model = quantise(make_model("llama"))
    base = BaseModel(model, "bytes")
    assert base.fused is None
    prompts = random_prompts([9, 5, 14])
    engine = Engine(base, new_heads(base, kind).prepare(base), find_tree("small-16"))
    outputs = [Output() for _ in prompts]
    for _ in engine.run([Request(tuple(prompt), 20) for prompt in prompts], outputs):
        pass
    assert [output.token_ids for output in outputs] == [generate_plainly(model, prompt, 20) for prompt in prompts]


def test_an_output_layer_that_heads_cannot_read_is_refused():
    with pytest.raises(UnsupportedModel, match="output layer of bytes is quantised"):
        BaseModel(quantise(make_model("llama"), also_output=True), "bytes")


def test_only_plain_linear_layers_are_copied():
    layer = nn.Linear(4, 4)
    assert is_plain_linear(layer)
    assert not is_plain_linear(ByteLinear(layer))
    assert not is_plain_linear(nn.Linear(4, 4, dtype=torch.float64))


@pytest.mark.parametrize(("method", "package"), [("torchao", "torchao"), ("bitsandbytes", "bitsandbytes")])
def test_a_missing_library_is_named(tmp_path, monkeypatch, method, package):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    config = model.config.to_dict() | {"quantization_config": {"quant_method": method, "load_in_8bit": True}}
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find_spec(name))
    with pytest.raises(CheckpointError, match=f"is quantised with {method}: pip install {package}"):
        find_quantisation(type(model.config)(**config), "mine")
    assert find_quantisation(model.config, "mine") is None


def test_torchao_weights_decode_exactly(tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    make_model("llama").save_pretrained(tmp_path / "plain")
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    )
    quantised.save_pretrained(tmp_path / "bytes")
    base = BaseModel.load(str(tmp_path / "bytes"))
    engine = Engine(base, new_heads(base, "hydra").prepare(base), find_tree("small-16"))
    output, (prompt,) = Output(), random_prompts([9])
    for _ in engine.run([Request(tuple(prompt), 20)], [output]):
        pass
    assert output.token_ids == generate_plainly(base.model, prompt, 20)
