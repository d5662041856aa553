import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hydraspec.base.packed import PackedLinear, supports

CPU = torch.device("cpu")
SHAPES = [(1, 1), (5, 3), (33, 17), (64, 96), (127, 255), (300, 700)]  # [in, out]; the last is packed in float32 too
TOLERANCES = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def _make(width_in, width, dtype, bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(width_in, width, bias=bias).to(dtype).requires_grad_(False)
    return layer, PackedLinear.stack([layer])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("width_in", "width"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_layer_for_any_number_of_rows(width_in, width, dtype, bias):
    layer, packed = _make(width_in, width, dtype, bias)
    for shape in [(), (0,), (1,), (2, 3), (16,), (64,), (130,)]:
        x, residual = torch.randn(*shape, width_in).to(dtype), torch.randn(*shape, width).to(dtype)
        kept = residual.clone()
        torch.testing.assert_close(packed(x), layer(x), **TOLERANCES[dtype])
        torch.testing.assert_close(packed(x, residual), layer(x) + residual, **TOLERANCES[dtype])
        torch.testing.assert_close(packed.silu(x), F.silu(layer(x)), **TOLERANCES[dtype])
        assert torch.equal(residual, kept)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rows_may_lie_apart_and_weights_by_columns(dtype):
    layer, _ = _make(300, 700, dtype)
    layer.weight.data = layer.weight.t().contiguous().t()
    packed = PackedLinear.stack([layer])
    x, residual = torch.randn(6, 900).to(dtype)[:, 300:600], torch.randn(700, 6).to(dtype).t()
    torch.testing.assert_close(packed(x, residual), layer(x) + residual, **TOLERANCES[dtype])


@pytest.mark.parametrize("width", [40, 700])
def test_stacked_layers_answer_behind_each_other(width):
    layers = [_make(300, width, torch.float32, bias)[0] for bias in (True, False)]
    packed, x = PackedLinear.stack(layers), torch.randn(4, 300)
    torch.testing.assert_close(packed(x), torch.cat([layer(x) for layer in layers], -1), rtol=1e-5, atol=1e-5)
    assert packed.num_bytes == 2 * width * 300 * 4


def test_a_copy_is_counted_and_the_layer_stays_as_it_is():
    layer, packed = _make(300, 700, torch.float32)
    before, x = layer.weight.clone(), torch.randn(2, 300)
    expected = packed(x)
    assert packed.num_bytes == layer.weight.numel() * 4
    assert layer.weight.is_contiguous()
    assert torch.equal(layer.weight, before)
    layer.weight.zero_()
    assert torch.equal(packed(x), expected)


def test_small_float32_weights_by_columns_are_shared():
    layer, _ = _make(8, 8, torch.float32)
    layer.weight.data = layer.weight.t().contiguous().t()
    packed = PackedLinear.stack([layer])
    assert packed.num_bytes == 0
    torch.testing.assert_close(packed(torch.ones(1, 8)), layer(torch.ones(1, 8)))


def test_other_dtypes_and_devices_stay_plain():
    assert not supports(CPU, torch.float16)
    assert not supports(CPU, torch.float64)
    assert not supports(torch.device("cuda"), torch.float32)
    assert not supports(torch.device("meta"), torch.float32)
    layer, packed = _make(300, 700, torch.float64)
    x, residual = torch.randn(3, 300).double(), torch.randn(3, 700).double()
    torch.testing.assert_close(packed(x, residual), layer(x) + residual)
    assert packed.num_bytes == 0
    assert PackedLinear(torch.empty(4, 3, device="meta"))(torch.empty(2, 3, device="meta")).shape == (2, 4)
