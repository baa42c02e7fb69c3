"""The BiFPN: its graph, and agreement of the fused ops with the layers for all its options."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from edet.models.bifpn import BiFPN, bifpn_nodes


def test_nodes_of_five_levels() -> None:
    edges = [node.edges for node in bifpn_nodes(5)]
    # P6' P5' P4' P3'' P4'' P5'' P6'' P7''
    assert edges == [(3, 4), (2, 5), (1, 6), (0, 7), (1, 7, 8), (2, 6, 9), (3, 5, 10), (4, 11)]
    assert [node.level for node in bifpn_nodes(5)] == [3, 2, 1, 0, 1, 2, 3, 4]


def test_nodes_of_six_levels() -> None:
    nodes = bifpn_nodes(6)
    assert sorted(len(node.edges) for node in nodes) == [2] * 6 + [3] * 4
    assert [node.level for node in nodes[-6:]] == list(range(6))


def pyramid(channels: list[int], size: tuple[int, int] = (12, 20), batch: int = 2) -> list[Tensor]:
    maps = []
    for c in channels:
        maps.append(torch.randn(batch, c, *size))
        size = (size[0] + 1) // 2, (size[1] + 1) // 2
    return maps


@pytest.mark.parametrize(
    ("fusion", "per_channel"),
    [*itertools.product(["fast", "softmax", "unbounded"], [False, True]), ("sum", False)],
)
@pytest.mark.parametrize("pool", ["same", "symmetric"])
def test_fused_agrees_with_layers(
    fusion: str,
    per_channel: bool,
    pool: str,
    randomise: Callable[[nn.Module], nn.Module],
    assert_agrees: Callable[..., None],
) -> None:
    model = BiFPN([8, 20, 24], 16, 1, fusion=fusion, fusion_per_channel=per_channel, pool=pool)
    assert_agrees(randomise(model).eval(), pyramid([8, 20, 24]))


@pytest.mark.parametrize(
    ("channels", "levels"),
    [
        ([8, 20, 24], 6),  # P8
        ([16, 20, 24], 5),  # no projection of the lowest map
        ([8, 16, 24], 5),  # nor of the middle one
        ([8, 20, 16], 5),  # nor of the one that the levels above are pooled from
        ([16, 16, 16], 5),
        ([8, 20, 24], 3),  # no level above
        ([24], 4),
        ([8, 12, 20, 24, 28], 5),
        ([8, 24], 2),
    ],
)
def test_levels_and_channels(
    channels: list[int],
    levels: int,
    randomise: Callable[[nn.Module], nn.Module],
    assert_agrees: Callable[..., None],
) -> None:
    model = randomise(BiFPN(channels, 16, 2, levels=levels, activation="relu6")).eval()
    maps = pyramid(channels)
    assert_agrees(model, maps)
    assert len(model(maps)) == levels
    assert not any(".resample." in key for key in model.state_dict() if "cell.1" in key)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3), (33, 7)])
def test_odd_sizes(
    size: tuple[int, int],
    randomise: Callable[[nn.Module], nn.Module],
    assert_agrees: Callable[..., None],
) -> None:
    model = randomise(BiFPN([8, 20, 24], 16, 1)).eval()
    assert_agrees(model, pyramid([8, 20, 24], size))


def test_empty_batch(fused: Callable[..., list[Tensor]]) -> None:
    outputs = fused(BiFPN([8, 20, 24], 16, 1).eval(), pyramid([8, 20, 24], batch=0))
    assert [tuple(x.shape) for x in outputs[:2]] == [(0, 16, 12, 20), (0, 16, 6, 10)]


def test_initial_weights() -> None:
    model = BiFPN([40, 112, 320])
    assert all((w == 1).all() for k, w in model.state_dict().items() if k.endswith("edge_weights"))
    limit = (6 / (64 + 64)) ** 0.5
    weights = model.cells[0].nodes[0].after_combine.conv.conv_pw.weight
    assert limit * 0.95 < weights.abs().max() <= limit
    depthwise = model.cells[0].nodes[0].after_combine.conv.conv_dw.weight
    assert (6 / 18) ** 0.5 * 0.95 < depthwise.abs().max() <= (6 / 18) ** 0.5


def test_gradients_reach_every_parameter(randomise: Callable[[nn.Module], nn.Module]) -> None:
    model = randomise(BiFPN([8, 20, 24], 16, 2)).train()
    sum((x**2).sum() for x in model(pyramid([8, 20, 24]))).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None]
    assert not still


def test_bad_arguments() -> None:
    model = BiFPN([8, 20, 24], 16, 1).eval()
    maps = pyramid([8, 20, 24])
    with pytest.raises(ValueError, match="maps must be a list of 3 maps, got 2"):
        model(maps[:2])
    with pytest.raises(ValueError, match=r"maps must be a list of 3 maps, got a tensor \(2, 8,"):
        model(maps[0])
    with pytest.raises(ValueError, match=r"maps\[1\] must be \(N, 20, H, W\), got \(2, 24, 3, 5\)"):
        model([maps[0], maps[2], maps[2]])
    with pytest.raises(TypeError, match=r"maps\[0\] must be a tensor, got int"):
        model([1, *maps[1:]])
    with pytest.raises(TypeError, match=r"maps\[2\] must be torch\.float32 .*, got torch\.float64"):
        model([*maps[:2], maps[2].double()])
    with pytest.raises(ValueError, match=r"maps\[0\] must be on cpu like the weights, got meta"):
        model([maps[0].to("meta"), *maps[1:]])
    with pytest.raises(ValueError, match="fusion_per_channel must be False for fusion 'sum'"):
        BiFPN([8], 16, fusion="sum", fusion_per_channel=True)
    with pytest.raises(ValueError, match="got 5 levels and 6 maps"):
        BiFPN([8] * 6, 16)
    with pytest.raises(ValueError, match="cells must be at least 1, got 0"):
        BiFPN([8], 16, 0)
    with pytest.raises(ValueError, match=r"fusion must be one of .*, got 'mean'"):
        BiFPN([8], 16, fusion="mean")
