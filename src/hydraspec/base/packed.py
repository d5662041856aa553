"""Linear layers for few rows on a CPU: their weights lie in the blocks that oneDNN's kernels read.

The library rearranges the weight of a product of few rows (the nodes of a tree) again for every product. Rearranged
once, float32 products of 8 to 16 rows are two to three times faster, bfloat16 ones of any number of rows as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BYTES_LIMIT = 2 << 30  # copies of weights beyond this cost more memory than they are worth

# Packing for 4 rows or more gives one layout, good for any number of rows; packing for 1 row gives a slower one.
_ROWS = 16
# oneDNN takes some 14 microseconds to find its kernel: float32 weights of fewer entries are faster without it.
_SMALLEST = 1 << 17


@cache
def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of this device and dtype can be packed: float32 on x86, bfloat16 where its instructions are."""
    if device.type != "cpu" or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if dtype == torch.bfloat16:  # oneDNN also emulates it, on processors where float32 is faster
        return torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()
    return dtype == torch.float32


class PackedLinear:
    """`x W^T + b` for frozen weights, packed where `supports` says so and W is large enough; plain elsewhere.

    A packed weight is a copy: the layer that it was made of stays as it is, and later changes to it are not followed.
    It is no module: it takes no gradient, and stays where it is when the layer is moved.

    Attributes:
        num_bytes: memory that the copy takes; 0 where the given weight is used as it is.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        self._packed: Tensor | None = None
        self._weight, self._bias = weight, bias
        if weight.device.type != "cpu":
            self.num_bytes = 0
            return
        if supports(weight.device, weight.dtype) and (weight.dtype != torch.float32 or weight.numel() >= _SMALLEST):
            with torch.no_grad():
                self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
            self._weight = weight.new_empty(0)
        elif weight.dtype == torch.float32:
            self._weight = weight.t().contiguous().t()  # few rows are faster against columns: see store_columns_first
        shared = self._packed is None and self._weight.data_ptr() == weight.data_ptr()
        self.num_bytes = 0 if shared else weight.numel() * weight.itemsize

    @classmethod
    def stack(cls, layers: Sequence[nn.Module]) -> PackedLinear:
        """One layer whose output is the outputs of `layers`, of one input, behind each other."""
        weights: list[Tensor] = [layer.get_parameter("weight") for layer in layers]
        biases = [getattr(layer, "bias", None) for layer in layers]
        if len(layers) == 1:
            return cls(weights[0], biases[0])
        bias = torch.cat([_bias_of(layer) for layer in layers]) if any(b is not None for b in biases) else None
        stacked = cls(torch.cat(weights), bias)
        stacked.num_bytes = sum(weight.numel() * weight.itemsize for weight in weights)
        return stacked

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[..., in]` to `[..., out]`; a `residual` of the output's shape is added within the product."""
        if self._packed is None:
            out = F.linear(x, self._weight, self._bias)
            return out if residual is None else out.add_(residual)
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self._bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._packed, self._bias, "add")

    def silu(self, x: Tensor) -> Tensor:
        """`SiLU(x W^T + b)`, within the product."""
        if self._packed is None:
            return F.silu(F.linear(x, self._weight, self._bias), inplace=True)
        return torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self._bias, "swish", [], "")


def _bias_of(layer: nn.Module) -> Tensor:
    """The bias of a linear layer, zeros where it has none."""
    bias, weight = getattr(layer, "bias", None), layer.get_parameter("weight")
    return weight.new_zeros(len(weight)) if bias is None else bias
