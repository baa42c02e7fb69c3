"""The backbones: scaling, padding, levels, and agreement of the fused ops with the layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edet.models.efficientnet import BACKBONES, Conv2d, EfficientNet, round_channels, scaled_stages

CHANNELS = {
    "efficientnet_b0": [40, 112, 320],
    "efficientnet_b1": [40, 112, 320],
    "efficientnet_b2": [48, 120, 352],
    "efficientnet_b3": [48, 136, 384],
    "efficientnet_b4": [56, 160, 448],
    "efficientnet_b5": [64, 176, 512],
    "efficientnet_b6": [72, 200, 576],
    "efficientnet_b7": [80, 224, 640],
}


@pytest.mark.parametrize(("name", "channels"), CHANNELS.items())
def test_channels(name: str, channels: list[int]) -> None:
    with torch.device("meta"):
        assert EfficientNet(name).channels == channels


def test_round_channels() -> None:
    assert [round_channels(c) for c in (1, 16, 19.2, 28.8, 35.2, 384.0)] == [8, 16, 24, 32, 32, 384]
    for c in range(8, 2000, 7):
        assert round_channels(c) % 8 == 0
        assert round_channels(c) >= 0.9 * c


def test_lite_keeps_the_stem_and_the_ends_shallow() -> None:
    stem, stages = scaled_stages("efficientnet_lite4")
    assert stem == 32
    assert [stage.repeats for stage in stages] == [1, 4, 4, 6, 6, 8, 1]


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (9, 6), (2, 7)])
def test_same_padding_is_tensorflows(kernel: int, size: tuple[int, int]) -> None:
    conv = Conv2d(2, 3, kernel, 2, 1, "same").double()
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    # pad by far too many zeros, then take the windows that TensorFlow's SAME takes
    wide = F.conv2d(F.pad(x, (kernel,) * 4), conv.weight)
    starts = []
    for n in size:
        total = max((-(-n // 2) - 1) * 2 + kernel - n, 0)
        starts.append(kernel - total // 2)
    rows, columns = -(-size[0] // 2), -(-size[1] // 2)
    expected = wide[:, :, starts[0] :: 2, starts[1] :: 2][:, :, :rows, :columns]
    torch.testing.assert_close(conv(x), expected)


def test_symmetric_padding_differs_on_even_sizes_only() -> None:
    same, symmetric = Conv2d(2, 3, 3, 2, 1, "same"), Conv2d(2, 3, 3, 2, 1, "symmetric")
    symmetric.load_state_dict(same.state_dict())
    even, odd = torch.randn(1, 2, 8, 8), torch.randn(1, 2, 9, 9)
    torch.testing.assert_close(same(odd), symmetric(odd))
    assert not torch.allclose(same(even), symmetric(even))


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_lite0"])
def test_fused_agrees_with_layers(
    name: str,
    padding: str,
    randomise: Callable[[nn.Module], nn.Module],
    assert_agrees: Callable[..., None],
) -> None:
    activation = "relu6" if "lite" in name else "swish"
    model = randomise(EfficientNet(name, padding=padding, activation=activation)).eval()
    for size in ((64, 96), (33, 57)):
        assert_agrees(model, torch.randn(2, 3, *size))


def test_levels(fused: Callable[..., list[Tensor]]) -> None:
    model = EfficientNet(levels=(5, 1, 2)).eval()
    maps = fused(model, torch.randn(1, 3, 64, 64))
    assert model.channels == [16, 24, 320]
    assert [tuple(x.shape[1:]) for x in maps] == [(16, 32, 32), (24, 16, 16), (320, 2, 2)]


def test_initial_weights() -> None:
    model = EfficientNet()
    dw = model.blocks[6][0].conv_dw.weight
    pw = model.blocks[6][0].conv_pwl.weight
    assert dw.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert pw.std().item() == pytest.approx((2 / 320) ** 0.5, rel=0.05)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"backbone must be one of efficientnet_b0, .*, got 'b0'"):
        EfficientNet("b0")
    with pytest.raises(ValueError, match="padding must be same or symmetric, got 'valid'"):
        EfficientNet(padding="valid")
    with pytest.raises(ValueError, match=r"levels must be some of 1 … 5, got \(3, 6\)"):
        EfficientNet(levels=(3, 6))
    assert len(BACKBONES) == 13
