"""Weight layouts: there and back, element by element, and refused shapes."""

import pytest
import torch

from edet_kernels import (
    pack_depthwise,
    pack_pointwise,
    pack_stem,
    unpack_depthwise,
    unpack_pointwise,
    unpack_stem,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 16, 88])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_depthwise(kernel, channels, dtype):
    w = torch.randn(channels, 1, kernel, kernel).to(dtype)
    packed = pack_depthwise(w)
    assert packed.shape == (kernel * kernel, channels)
    assert packed.is_contiguous()
    assert packed[kernel - 1, 0] == w[0, 0, 0, kernel - 1]  # the last column of the first row
    assert packed.dtype == dtype
    assert torch.equal(unpack_depthwise(packed), w)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("c_in", [1, 16, 40])
@pytest.mark.parametrize("c_out", [1, 15, 16, 17, 88])
def test_pointwise(c_out, c_in, dtype):
    w = torch.randn(c_out, c_in, 1, 1).to(dtype)
    packed = pack_pointwise(w)
    assert packed.shape == (-(-c_out // 16), c_in, 16)
    assert packed.is_contiguous()
    assert packed.dtype == dtype
    for o in range(c_out):
        assert torch.equal(packed[o // 16, :, o % 16], w[o, :, 0, 0])
    assert not packed.transpose(1, 2).flatten(0, 1)[c_out:].any()  # zero padded
    assert torch.equal(unpack_pointwise(packed, c_out), w)


@pytest.mark.parametrize("c_out", [1, 16, 40])
def test_stem(c_out):
    w = torch.randn(c_out, 3, 3, 3)
    packed = pack_stem(w)
    assert packed.shape == (-(-c_out // 16), 27, 16)
    for y in range(3):
        for x in range(3):
            for channel in range(3):
                row = (3 * y + x) * 3 + channel
                assert packed[0, row, 0] == w[0, channel, y, x]
    assert torch.equal(unpack_stem(packed, c_out), w)


def test_strided_weights():
    w = torch.randn(3, 3, 8, 20).permute(3, 2, 0, 1)
    assert torch.equal(unpack_depthwise(pack_depthwise(w[:, :1])), w[:, :1])
    assert torch.equal(unpack_pointwise(pack_pointwise(w[..., :1, :1]), 20), w[..., :1, :1])
    assert torch.equal(unpack_stem(pack_stem(w[:, ::3]), 20), w[:, ::3])


def test_packing_does_not_change_its_argument():
    w = torch.randn(20, 8, 1, 1)
    before = w.clone()
    pack_pointwise(w).zero_()
    assert torch.equal(w, before)


@pytest.mark.parametrize("pack", [pack_depthwise, pack_pointwise, pack_stem])
def test_gradients_flow_through_packing(pack):
    shape = {pack_depthwise: (4, 1, 3, 3), pack_pointwise: (4, 5, 1, 1), pack_stem: (4, 3, 3, 3)}
    w = torch.randn(shape[pack], requires_grad=True)
    pack(w).sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))
