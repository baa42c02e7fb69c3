"""The ops that multiply, by the products that not every GPU has: TF32, and Turing's."""

import pytest
import torch

from edet_kernels.names import TF32_OPS
from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import sample, tensors

ops = pytest.mark.parametrize("op", TF32_OPS)
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.mark.parametrize("channels", [1, 7, 88, 112])
@ops
@pytest.mark.usefixtures("tf32")
def test_tf32(op, channels):
    sample(op, channels=channels).check_tf32()


@pytest.mark.parametrize("out_channels", [15, 160, 300])
@pytest.mark.usefixtures("tf32")
def test_tf32_of_wide_maps(out_channels):
    # columns of one block, of the widest one, of two; weights that stay and weights that stream
    options = {"channels": 72, "out_channels": out_channels, "sizes": [(9, 6)]}
    sample("separable_conv", **options).check_tf32()


@pytest.mark.usefixtures("tf32")
def test_tf32_of_many_pixels():
    # tiles of 64 rows
    sample("fusion_node", channels=40, sizes=[(33, 30)]).check_tf32()
    sample("lateral", channels=40, size=(20, 19)).check_tf32()
    sample("mbconv", channels=40, size=(20, 19)).check_tf32()


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.usefixtures("tf32")
def test_tf32_of_non_finite_inputs(value):
    for op in ("fusion_node", "lateral"):
        call = sample(op)
        for x in tensors(call.maps):
            x[0, 1, x.shape[2] // 2, x.shape[3] // 3] = value
        call.check_tf32()


@ops
def test_tf32_rounds_and_only_where_it_is_asked_for(emulated, op, monkeypatch):
    call = sample(op, channels=64)
    exact = call()
    monkeypatch.setattr(torch.ops, "edet_kernels", torch.ops.edet_emulation_tf32)
    rounded = call()
    pairs = zip(tensors(exact), tensors(rounded), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    monkeypatch.setattr(torch.ops, "edet_kernels", torch.ops.edet_emulation)
    assert_identical(call(), exact)


@pytest.mark.usefixtures("tf32")
def test_tf32_changes_nothing_for_16_bits():
    sample("fusion_node", torch.float16).check(torch.float16)


def test_tf32_needs_a_newer_gpu(turing, monkeypatch):
    monkeypatch.setattr(torch.ops, "edet_kernels", torch.ops.edet_emulation_tf32)
    with pytest.raises(RuntimeError, match=r"fusion_node on a map .*invalid argument"):
        sample("fusion_node")()


@halves
@ops
@pytest.mark.usefixtures("turing")
def test_turing(op, dtype):
    sample(op, dtype, channels=40).check(dtype)


@halves
@pytest.mark.usefixtures("turing")
def test_turing_of_many_columns(dtype):
    sample("separable_conv", dtype, channels=40, out_channels=200, sizes=[(9, 6)]).check(dtype)
