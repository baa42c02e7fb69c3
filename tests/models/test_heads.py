"""The heads: shared convolutions, a batch norm per level, initial weights, fused agreement."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from edet.models.heads import CLASS_PRIOR_BIAS, Head

SIZES = [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]


def maps(width: int = 16, levels: int = 5) -> list[Tensor]:
    return [torch.randn(2, width, *size) for size in SIZES[:levels]]


@pytest.mark.parametrize("bn_level_first", [False, True])
@pytest.mark.parametrize("repeats", [0, 1, 3])
def test_fused_agrees_with_layers(
    repeats: int,
    bn_level_first: bool,
    randomise: Callable[[nn.Module], nn.Module],
    assert_agrees: Callable[..., None],
) -> None:
    head = Head(16, 27, repeats=repeats, bn_level_first=bn_level_first)
    assert_agrees(randomise(head).eval(), maps())


@pytest.mark.parametrize("activation", ["swish", "relu6"])
def test_three_levels_without_biases(
    activation: str,
    randomise: Callable[[nn.Module], nn.Module],
    assert_agrees: Callable[..., None],
) -> None:
    head = Head(16, 36, levels=3, redundant_bias=False, activation=activation)
    assert_agrees(randomise(head).eval(), maps(levels=3))


def test_keys() -> None:
    keys = set(Head(8, 9, repeats=2, levels=3).state_dict())
    assert {"bn_rep.1.2.bn.weight", "conv_rep.1.conv_pw.bias", "predict.conv_dw.weight"} <= keys
    level_first = set(Head(8, 9, repeats=2, levels=3, bn_level_first=True).state_dict())
    assert "bn_rep.2.1.bn.weight" in level_first
    assert "bn_rep.1.2.bn.weight" not in level_first


def test_levels_share_convolutions_but_not_batch_norms(
    randomise: Callable[[nn.Module], nn.Module], fused: Callable[..., list[Tensor]]
) -> None:
    head = randomise(Head(16, 9, repeats=1, levels=2)).eval()
    x = torch.randn(1, 16, 4, 4)
    first, second = fused(head, [x, x])
    assert not torch.allclose(first, second)
    head.norm(0, 1).load_state_dict(head.norm(0, 0).state_dict())
    first, second = fused(head, [x, x])
    torch.testing.assert_close(first, second)


def test_initial_weights() -> None:
    head = Head(64, 810, prior_bias=CLASS_PRIOR_BIAS)
    assert torch.full((810,), -math.log(99)).equal(head.predict.conv_pw.bias)
    assert (head.conv_rep[0].conv_pw.bias == 0).all()
    assert head.predict.conv_pw.weight.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert head.predict.conv_dw.weight.std().item() == pytest.approx(1 / 3, rel=0.1)


def test_bad_arguments() -> None:
    head = Head(16, 9).eval()
    with pytest.raises(ValueError, match="maps must be a list of 5 maps, got 4"):
        head(maps(levels=4))
    with pytest.raises(
        ValueError, match=r"maps\[0\] must be \(N, 16, H, W\), got \(2, 8, 12, 20\)"
    ):
        head(maps(8))
    with pytest.raises(TypeError, match=r"maps\[0\] must be torch\.float32 like the weights"):
        head([x.half() for x in maps()])
