"""The paper's table 4: a RetinaNet, its backbone exchanged for EfficientNet-B3, then its FPN."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import edet


def conv_bn(i, o, kernel, stride=1):
    conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU())


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 beside a shortcut (He et al. 2016, figure 5)."""

    def __init__(self, i, middle, stride):
        super().__init__()
        self.convs = nn.Sequential(
            conv_bn(i, middle, 1),
            conv_bn(middle, middle, 3, stride),
            conv_bn(middle, 4 * middle, 1),
        )
        same = stride == 1 and i == 4 * middle
        self.shortcut = nn.Identity() if same else conv_bn(i, 4 * middle, 1, stride)

    def forward(self, x):
        return self.convs(x) + self.shortcut(x)


class ResNet50(nn.Module):
    """The convolutions of ResNet-50 (He et al. 2016, table 1), whose stages 3 to 5 are returned."""

    channels = (512, 1024, 2048)

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1))
        self.stages, i = nn.ModuleList(), 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            layers, middle = [], 64 * 2**stage
            for block in range(blocks):
                layers.append(Bottleneck(i, middle, 2 if stage and not block else 1))
                i = 4 * middle
            self.stages.append(nn.Sequential(*layers))

    def forward(self, x):
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]


class Fpn(nn.Module):
    """RetinaNet's pyramid P3 to P7 of dense convolutions (Lin et al. 2017, section 4)."""

    def __init__(self, channels, width=256):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.outputs = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1) for _ in channels)
        self.above = nn.ModuleList(nn.Conv2d(width, width, 3, 2, 1) for _ in range(2))

    def forward(self, maps):
        fused = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for level in (1, 0):
            fused[level] = fused[level] + nn.functional.interpolate(
                fused[level + 1], scale_factor=2
            )
        pyramid = [conv(x) for conv, x in zip(self.outputs, fused, strict=True)]
        for conv in self.above:
            pyramid.append(conv(pyramid[-1]))
        return pyramid


class Head(nn.Module):
    """Four 3×3 convolutions and a predicting one, shared by all levels."""

    def __init__(self, outputs, width=256):
        super().__init__()
        convs = [nn.Conv2d(width, width, 3, 1, 1) for _ in range(4)]
        self.convs = nn.Sequential(*convs, nn.Conv2d(width, outputs, 3, 1, 1))

    def forward(self, pyramid):
        return [self.convs(x) for x in pyramid]


class RetinaNet(nn.Module):
    """A backbone with RetinaNet's FPN and heads: 9 anchors, 90 classes."""

    def __init__(self, backbone, channels):
        super().__init__()
        self.backbone, self.fpn = backbone, Fpn(channels)
        self.class_net, self.box_net = Head(9 * 90), Head(9 * 4)

    def forward(self, images):
        pyramid = self.fpn(self.backbone(images))
        return self.class_net(pyramid), self.box_net(pyramid)


def cost(model, side):
    """Millions of parameters and billions of multiply-adds of a ``side``×``side`` image."""
    counted = edet.count_parameters(model).total, edet.count_macs(model, (side, side)).total
    return counted[0] / 1e6, counted[1] / 1e9


@pytest.fixture
def d3():
    with torch.device("meta"):
        return edet.create_model("tf_efficientdet_d3")


def test_resnet_50_is_the_published_one():
    with torch.device("meta"):
        backbone = ResNet50()
    # 25 557 032 with its classifier
    assert sum(p.numel() for p in backbone.parameters()) == 25_557_032 - 2048 * 1000 - 1000


# what docs/layers.md says, and the paper's figures
def test_resnet_50_and_fpn():
    with torch.device("meta"):
        model = RetinaNet(ResNet50(), ResNet50.channels)
    assert cost(model, 640) == pytest.approx((34.0, 96.8), rel=0.002)
    assert cost(model, 640) == pytest.approx((34, 97), rel=0.005)


def test_b3_and_fpn(d3):
    with torch.device("meta"):
        model = RetinaNet(d3.backbone, d3.fpn.in_channels)
    assert cost(model, 640) == pytest.approx((19.87, 69.64), rel=0.002)
    assert cost(model, 640) == pytest.approx((21, 75), rel=0.08)


def test_b3_and_bifpn(d3):
    assert cost(d3, 896) == pytest.approx((12.0, 24.6), rel=0.005)
    assert cost(d3, 896) == pytest.approx((12, 24), rel=0.03)
