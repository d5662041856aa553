"""Base models whose linear layers are quantised: which library they need, and which fast paths they are not for."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from hydraspec.errors import CheckpointError, UnsupportedModel

# Methods of transformers, and the package each of them needs.
PACKAGES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao"}


def find_quantisation(config: Any, name: str) -> str | None:
    """How a model's config says that its weights are quantised; None: they are not.

    Raises:
        CheckpointError: the library for it is not installed.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    method = str(getattr(method, "value", method))
    package = PACKAGES.get(method)
    missing = [needed for needed in (package, "accelerate") if needed and importlib.util.find_spec(needed) is None]
    if missing:
        raise CheckpointError(f"{name} is quantised with {method}: pip install {' '.join(missing)}")
    return method


def is_plain_weight(weight: Tensor) -> bool:
    """Whether a weight is a tensor of floating-point numbers, rather than packed ones with scales beside them."""
    return type(weight.data) is Tensor and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer is torch's own linear layer with a plain weight, which may be copied and packed."""
    return type(layer) is nn.Linear and is_plain_weight(layer.weight)


def refuse_quantised_output(output: nn.Module, name: str) -> None:
    """Refuse an output layer that heads cannot read.

    Raises:
        UnsupportedModel: its weight is quantised.
    """
    if not is_plain_weight(output.get_parameter("weight")):
        raise UnsupportedModel(
            f"the output layer of {name} is quantised, and heads must read it: quantise all layers but that one"
        )
