"""edet.layers outside EfficientDet, and the paper's tables 1, 2 and 5."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import edet
from edet import layers
from edet.models.configs import get_config
from edet_kernels.testing.numeric import check_network, relative_difference

D3 = ((48, 136, 384), 160)


@torch.no_grad()
def compare(module, maps):
    """Checks the fused ops of ``module`` against its own layers in float64."""
    module.eval()
    exact = copy.deepcopy(module).double()
    own = copy.deepcopy(module)
    own.fused = exact.fused = False
    reference = exact([x.double() for x in maps])
    found = module(maps)
    mine, theirs = (relative_difference(y, reference) for y in (found, own(maps)))
    check_network(type(module).__name__, mine, theirs, torch.float32)
    return found


@pytest.mark.parametrize("fusion", ["fast", "softmax", "sum"])
@pytest.mark.parametrize("name", layers.NETWORKS)
def test_feature_networks_are_fused(name, fusion):
    torch.manual_seed(0)
    network = layers.feature_network(name, (12, 20, 24), 20, 2, fusion=fusion, pool="symmetric")
    maps = [torch.randn(1, c, s, s) for c, s in ((12, 20), (20, 10), (24, 5))]
    found = compare(network, maps)
    assert [tuple(x.shape) for x in found] == [(1, 20, s, s) for s in (20, 10, 5, 3, 2)]


@pytest.mark.parametrize("per_channel", [False, True])
def test_any_levels_and_nodes(per_channel):
    nodes = [layers.Node(1, (1, 0)), layers.Node(0, (0, 2, 1))]
    network = layers.BiFPN((8, 24), 24, 2, levels=2, nodes=nodes, fusion_per_channel=per_channel)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_(-1, 1)
    found = compare(network, [torch.randn(2, 8, 9, 12), torch.randn(2, 24, 5, 6)])
    assert [x.shape[-2:] for x in found] == [(9, 12), (5, 6)]


def test_training_reaches_every_weight():
    network = layers.feature_network("nas_fpn", (8, 8, 8), 8, 1)
    maps = [torch.randn(2, 8, s, s) for s in (32, 16, 8)]
    sum(x.square().mean() for x in network(maps)).backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([(0, (0, 1))], "level 1 has none"),
        ([(2, (0, 1))], r"nodes\[0\].level must be 0 to 1, got 2"),
        ([(0, (0, 2)), (1, (1,))], r"nodes\[0\].edges must be of 0 to 1, got \(0, 2\)"),
        ([(0, ()), (1, (1,))], r"nodes\[0\].edges"),
    ],
)
def test_impossible_nodes_are_refused(nodes, message):
    with pytest.raises(ValueError, match=message):
        layers.BiFPN((8, 8), 8, 1, levels=2, nodes=nodes)


def test_unknown_networks_are_refused():
    with pytest.raises(ValueError, match="name must be one of fpn, panet, nas_fpn"):
        layers.feature_network("pafpn", (8, 8))
    with pytest.raises(ValueError, match="levels must be 5 for NAS-FPN, got 6"):
        layers.feature_network("nas_fpn", (8, 8, 8), levels=6)


def test_heads():
    maps = [torch.randn(1, 16, s, s) for s in (7, 4)]
    for head, channels in (
        (layers.ClassNet(16, 5, num_anchors=2, levels=2, repeats=1), 10),
        (layers.BoxNet(16, num_anchors=2, levels=2, repeats=2), 8),
    ):
        assert [x.shape[1] for x in compare(head, maps)] == [channels] * 2
    logits = layers.ClassNet(16, 5, levels=2).eval()([torch.zeros_like(x) for x in maps])
    torch.testing.assert_close(logits[0].sigmoid(), torch.full_like(logits[0], 0.01))


def test_separable_conv_bn_act():
    layer = layers.SeparableConvBNAct(4, 6, activation="relu").eval()
    x = torch.randn(1, 4, 5, 5)
    conv = layer.conv
    expected = nn.functional.relu(conv.bn(conv.conv_pw(conv.conv_dw(x))))
    torch.testing.assert_close(layer(x), expected)


# name: input, width, cells, head repeats, millions of parameters, billions of multiply-adds
TABLE = {
    "d0": (512, 64, 3, 3, 3.9, 2.5),
    "d1": (640, 88, 4, 3, 6.6, 6.1),
    "d2": (768, 112, 5, 3, 8.1, 11),
    "d3": (896, 160, 6, 4, 12, 25),
    "d4": (1024, 224, 7, 4, 21, 55),
    "d5": (1280, 288, 7, 4, 34, 135),
    "d6": (1280, 384, 8, 5, 52, 226),
    "d7": (1536, 384, 8, 5, 52, 325),
    "d7x": (1536, 384, 8, 5, 77, 410),
}


@pytest.mark.parametrize("name", TABLE)
def test_paper_tables_1_and_2(name):
    size, width, cells, repeats, parameters, macs = TABLE[name]
    config = get_config(f"tf_efficientdet_{name}")
    assert config.image_size == (size, size)
    assert (config.width, config.cells, config.head_repeats) == (width, cells, repeats)
    with torch.device("meta"):
        model = edet.create_model(config.name)
    assert edet.count_parameters(model).total == pytest.approx(parameters * 1e6, rel=0.015)
    # the paper counts more than convolutions
    assert edet.count_macs(model).total == pytest.approx(macs * 1e9, rel=0.025)


def cost(name, cells, fusion):
    """Parameters and multiply-adds of a feature network of D3's width at 896×896."""
    network = layers.feature_network(name, *D3, cells, fusion=fusion)
    model = edet.create_model("tf_efficientdet_d3", backbone=nn.Identity(), backbone_channels=D3[0])
    model.fpn = network
    model.backbone = Pyramid()
    return edet.count_parameters(model).fpn, edet.count_macs(model).fpn


class Pyramid(nn.Module):
    """Backbone maps of D3 without a backbone."""

    def forward(self, images):
        height, width = images.shape[2:]
        return [
            images.new_empty(1, c, height // s, width // s, requires_grad=True)
            for c, s in zip(D3[0], (8, 16, 32), strict=True)
        ]


@pytest.mark.parametrize(
    ("name", "cells", "fusion", "parameters", "macs"),
    [
        ("panet", 6, "sum", 1.0, 1.0),
        ("nas_fpn", 6, "sum", 0.71, 0.72),
        ("fully_connected", 6, "sum", 1.24, 1.21),
        ("bifpn", 6, "sum", 0.88, 0.67),
        ("bifpn", 6, "fast", 0.88, 0.68),
    ],
)
def test_paper_table_5(name, cells, fusion, parameters, macs):
    base, found = cost("fpn", 12, "sum"), cost(name, cells, fusion)
    assert found[0] / base[0] == pytest.approx(parameters, abs=0.04)
    assert found[1] / base[1] == pytest.approx(macs, abs=0.07)


def test_table_5_weights_are_a_few_scalars():
    assert cost("bifpn", 6, "fast")[0] - cost("bifpn", 6, "sum")[0] == 6 * (5 * 2 + 3 * 3)
