"""Small networks built like other people's EfficientDets: their structure and names, own code.

``Effdet*`` have the modules and attributes of effdet (rwightman/efficientdet-pytorch), ``Zylo*``
those of zylo117's Yet-Another-EfficientDet-Pytorch: zero-padded max pools, a sigmoid in the
classifier, predictions of all levels in one tensor.
"""

from __future__ import annotations

import types

import torch
from torch import nn
from torch.nn import functional as F

from edet.models.bifpn import bifpn_nodes

WIDTH = 24
CHANNELS = (16, WIDTH, 40)  # the middle map needs no projection


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def randomise(model: nn.Module) -> nn.Module:
    """Gives every batch norm and edge weight numbers that show when they are left out."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    for name, parameter in model.named_parameters():
        if "edge_weights" in name or "_w" in name.rpartition(".")[2]:
            nn.init.uniform_(parameter, -0.5, 1.5)
    return model


class Backbone(nn.Module):
    """Three maps of strides 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride, 1)
            for a, b, stride in zip((3, *CHANNELS), CHANNELS, (8, 2, 2), strict=False)
        )

    def forward(self, x):
        maps = []
        for conv in self.convs:
            x = conv(x)
            maps.append(x)
        return maps


class NormAct(nn.BatchNorm2d):
    def __init__(self, channels, act):
        super().__init__(channels, eps=1e-3)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(super().forward(x))


NormAct.__name__ = "BatchNormAct2d"  # which is how it is recognised


class Conv2dSame(nn.Conv2d):
    def forward(self, x):
        k, s = self.kernel_size[0], self.stride[0]
        rows, columns = (max((-(-n // s) - 1) * s + k - n, 0) for n in x.shape[-2:])
        pad = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return super().forward(F.pad(x, pad))


def timm_conv(i, o, kernel, stride=1, groups=1, pad="same"):
    if pad == "same" and stride > 1:
        return Conv2dSame(i, o, kernel, stride, groups=groups, bias=False)
    return nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False)


class TimmSqueeze(nn.Module):
    def __init__(self, channels, reduced, act):
        super().__init__()
        self.conv_reduce, self.act1 = nn.Conv2d(channels, reduced, 1), act()
        self.conv_expand, self.gate = nn.Conv2d(reduced, channels, 1), nn.Sigmoid()

    def forward(self, x):
        y = self.conv_reduce(x.mean((2, 3), keepdim=True))
        return x * self.gate(self.conv_expand(self.act1(y)))


class TimmBlock(nn.Module):
    def __init__(self, i, o, kernel, stride, expand, squeeze, pad, act):
        super().__init__()
        middle = i * expand
        self.has_skip, self.aa = stride == 1 and i == o, nn.Identity()
        names = ["conv_dw", "conv_pw"]
        convs = [timm_conv(middle, middle, kernel, stride, middle, pad), timm_conv(middle, o, 1)]
        if expand > 1:
            names, convs = ["conv_pw", "conv_dw", "conv_pwl"], [timm_conv(i, middle, 1), *convs]
        for n, (name, conv) in enumerate(zip(names, convs, strict=True), 1):
            setattr(self, name, conv)
            last = n == len(convs)
            setattr(self, f"bn{n}", NormAct(conv.out_channels, nn.Identity() if last else act()))
        self.se = TimmSqueeze(middle, 4, act) if squeeze else nn.Identity()
        self.names = names

    def forward(self, x):
        y = x
        for n, name in enumerate(self.names, 1):
            y = getattr(self, f"bn{n}")(getattr(self, name)(y))
            y = self.se(y) if name == "conv_dw" else y
        return x + y if self.has_skip else y


class TimmBackbone(nn.Module):
    """A small EfficientNet of timm that returns three maps."""

    def __init__(self, pad="same", act=nn.SiLU, squeeze=True):
        super().__init__()
        self.conv_stem, self.bn1 = timm_conv(3, 8, 3, 2, pad=pad), NormAct(8, act())
        table = ((8, 3, 1, 1), (12, 3, 2, 6), (CHANNELS[0], 5, 2, 6), (CHANNELS[1], 3, 2, 6))
        stages, i = [], 8
        for o, kernel, stride, expand in (*table, (CHANNELS[2], 5, 2, 6)):
            blocks = [TimmBlock(i, o, kernel, stride, expand, squeeze, pad, act)]
            blocks.append(TimmBlock(o, o, kernel, 1, expand, squeeze, pad, act))
            stages.append(nn.Sequential(*blocks))
            i = o
        self.blocks, self.feature_hooks = nn.Sequential(*stages), None
        self._stage_out_idx = {3: 0, 4: 1, 5: 2}

    def forward(self, x):
        x, maps = self.bn1(self.conv_stem(x)), []
        for i, stage in enumerate(self.blocks, 1):
            x = stage(x)
            if i in self._stage_out_idx:
                maps.append(x)
        return maps


# --- effdet ---------------------------------------------------------------------------------------


class MaxPool2dSame(nn.MaxPool2d):
    def forward(self, x):
        rows, columns = (max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in x.shape[-2:])
        pad = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return F.max_pool2d(F.pad(x, pad, value=-torch.inf), 3, 2)


class Nearest(nn.Module):
    def __init__(self, size, mode="nearest"):
        super().__init__()
        self.size, self.mode = size, mode

    def forward(self, x):
        return F.interpolate(x, self.size, mode=self.mode)


class ConvBnAct(nn.Module):
    def __init__(self, i, o, bias):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(i, o, 1, bias=bias), norm(o), None

    def forward(self, x):
        return self.bn(self.conv(x))


def resample(i, o, source, target, pad, bias, mode="nearest"):
    layers = nn.Sequential()
    if i != o:
        layers.add_module("conv", ConvBnAct(i, o, bias))
    if source > target:
        pool = MaxPool2dSame(3, 2) if pad == "same" else nn.MaxPool2d(3, 2, 1)
        layers.add_module("downsample", pool)
    elif source < target:
        layers.add_module("upsample", Nearest((target, target), mode))
    return layers


class Separable(nn.Module):
    def __init__(self, i, o, bias, bn=False, act=None):
        super().__init__()
        self.conv_dw = nn.Conv2d(i, i, 3, padding=1, groups=i, bias=False)
        self.conv_pw = nn.Conv2d(i, o, 1, bias=bias)
        self.bn, self.act = norm(o) if bn else None, act

    def forward(self, x):
        x = self.conv_pw(self.conv_dw(x))
        x = x if self.bn is None else self.bn(x)
        return x if self.act is None else self.act(x)


class EffdetCombine(nn.Module):
    def __init__(self, maps, offsets, size, method, pad, bias):
        super().__init__()
        self.inputs_offsets, self.weight_method = offsets, method
        self.resample = nn.ModuleDict(
            {str(o): resample(maps[o][0], WIDTH, maps[o][1], size, pad, bias) for o in offsets}
        )
        self.edge_weights = None if method == "sum" else nn.Parameter(torch.ones(len(offsets)))

    def forward(self, x):
        maps = [self.resample[str(o)](x[o]) for o in self.inputs_offsets]
        if self.weight_method == "sum":
            return torch.stack(maps).sum(0)
        w = self.edge_weights.to(maps[0].dtype)
        w = w.softmax(0) if self.weight_method == "attn" else w.relu() / (w.relu().sum() + 1e-4)
        return sum(a * m for a, m in zip(w, maps, strict=True))


class Fnode(nn.Module):
    def __init__(self, combine, after):
        super().__init__()
        self.combine, self.after_combine = combine, after

    def forward(self, x):
        return self.after_combine(self.combine(x))


class EffdetCell(nn.Module):
    def __init__(self, maps, sizes, methods, pad, bias, pre_act, act):
        super().__init__()
        maps = list(maps)
        self.fnode, self.levels = nn.ModuleList(), len(sizes)
        for i, (level, edges) in enumerate(bifpn_nodes(len(sizes))):
            method = methods[i % len(methods)]
            combine = EffdetCombine(maps, edges, sizes[level], method, pad, bias)
            after = nn.Sequential()
            if pre_act:
                after.add_module("act", act())
            conv = Separable(WIDTH, WIDTH, bias and pre_act, True, None if pre_act else act())
            after.add_module("conv", conv)
            self.fnode.append(Fnode(combine, after))
            maps.append((WIDTH, sizes[level]))

    def forward(self, x):
        x = list(x)
        for node in self.fnode:
            x.append(node(x))
        return x[-self.levels :]


class EffdetFpn(nn.Module):
    def __init__(self, size, methods, levels=5, pad="same", bias=True, pre_act=True, act=nn.SiLU):
        super().__init__()
        sizes = [-(-size // 2**level) for level in range(3, 3 + levels)]
        self.num_levels, self.resample = levels, nn.ModuleDict()
        maps = list(zip(CHANNELS, sizes, strict=False))
        for i in range(3, levels):
            self.resample[str(i)] = resample(maps[-1][0], WIDTH, sizes[i - 1], sizes[i], pad, bias)
            maps.append((WIDTH, sizes[i]))
        self.cell = nn.Sequential()
        for i in range(2):
            cell = EffdetCell(maps, sizes, methods, pad, bias, pre_act, act)
            self.cell.add_module(str(i), cell)
            maps = [(WIDTH, s) for s in sizes]

    def forward(self, x):
        for layer in self.resample.values():
            x.append(layer(x[-1]))
        return self.cell(x)


class EffdetHead(nn.Module):
    def __init__(self, outputs, levels, bias, level_first, act=nn.SiLU, repeats=2):
        super().__init__()
        self.num_levels, self.bn_level_first, self.act = levels, level_first, act()
        self.conv_rep = nn.ModuleList(Separable(WIDTH, WIDTH, bias) for _ in range(repeats))
        if level_first:
            rows = [[norm(WIDTH) for _ in range(repeats)] for _ in range(levels)]
        else:
            rows = [[nn.Sequential() for _ in range(levels)] for _ in range(repeats)]
            for row in rows:
                for bn in row:
                    bn.add_module("bn", norm(WIDTH))
        self.bn_rep = nn.ModuleList(map(nn.ModuleList, rows))
        self.predict = Separable(WIDTH, outputs, True)

    def forward(self, maps):
        outputs = []
        for level, x in enumerate(maps):
            for i, conv in enumerate(self.conv_rep):
                bn = self.bn_rep[level][i] if self.bn_level_first else self.bn_rep[i][level]
                x = self.act(bn(conv(x)))
            outputs.append(self.predict(x))
        return outputs


class Effdet(nn.Module):
    def __init__(
        self,
        methods=("fastattn",),
        *,
        size=96,
        levels=5,
        bias=True,
        level_first=False,
        backbone=Backbone,
        **fpn,
    ):
        super().__init__()
        self.config = types.SimpleNamespace(image_size=(size, size))
        self.backbone = backbone()
        self.fpn = EffdetFpn(size, methods, levels, bias=bias, **fpn)
        act = fpn.get("act", nn.SiLU)
        self.class_net = EffdetHead(18, levels, bias, level_first, act)
        self.box_net = EffdetHead(36, levels, bias, level_first, act)
        randomise(self)

    def forward(self, x):
        maps = self.fpn(self.backbone(x))
        return self.class_net(maps), self.box_net(maps)


class DetBench(nn.Module):
    """A wrapper that needs more than images."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, target):
        return sum(y.mean() for ys in self.model(x) for y in ys) * target


# --- zylo117 --------------------------------------------------------------------------------------


class PaddedConv(nn.Module):
    def __init__(self, i, o, kernel, groups=1, bias=True):
        super().__init__()
        self.conv = nn.Conv2d(i, o, kernel, groups=groups, bias=bias)

    def forward(self, x):
        pad = self.conv.kernel_size[0] // 2
        return self.conv(F.pad(x, (pad,) * 4))


class ZeroPaddedPool(nn.Module):
    def forward(self, x):
        rows, columns = (max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in x.shape[-2:])
        pad = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return F.max_pool2d(F.pad(x, pad), 3, 2)


class ZyloSeparable(nn.Module):
    def __init__(self, i, o=None, norm_=True):
        super().__init__()
        self.depthwise_conv = PaddedConv(i, i, 3, groups=i, bias=False)
        self.pointwise_conv = PaddedConv(i, o or i, 1)
        self.norm, self.activation = norm_, False
        if norm_:
            self.bn = norm(i)

    def forward(self, x):
        x = self.pointwise_conv(self.depthwise_conv(x))
        return self.bn(x) if self.norm else x


class ZyloBiFPN(nn.Module):
    def __init__(self, first_time, attention, p8=False):
        super().__init__()
        self.first_time, self.attention, self.swish = first_time, attention, nn.SiLU()
        self.top = 8 if p8 else 7
        for level in range(self.top - 1, 2, -1):
            setattr(self, f"conv{level}_up", ZyloSeparable(WIDTH))
            setattr(self, f"p{level}_w1", nn.Parameter(torch.ones(2)))
        for level in range(4, self.top + 1):
            setattr(self, f"conv{level}_down", ZyloSeparable(WIDTH))
            edges = 2 if level == self.top else 3
            setattr(self, f"p{level}_w2", nn.Parameter(torch.ones(edges)))
        if first_time:
            for level, channels in zip((3, 4, 5), CHANNELS, strict=True):
                for suffix in ("", "_2")[: 1 if level == 3 else 2]:
                    layers = nn.Sequential(PaddedConv(channels, WIDTH, 1), norm(WIDTH))
                    setattr(self, f"p{level}_down_channel{suffix}", layers)
            self.p5_to_p6 = nn.Sequential(
                PaddedConv(CHANNELS[2], WIDTH, 1), norm(WIDTH), ZeroPaddedPool()
            )
        self.pool = ZeroPaddedPool()

    def _fuse(self, maps, weights):
        if not self.attention:
            return self.swish(sum(maps))
        w = weights.relu() / (weights.relu().sum() + 1e-4)
        return self.swish(sum(a * m for a, m in zip(w, maps, strict=True)))

    def forward(self, inputs):
        again = {}
        if self.first_time:
            p3, p4, p5 = inputs
            p6 = self.p5_to_p6(p5)
            maps = {3: self.p3_down_channel(p3), 4: self.p4_down_channel(p4)}
            maps |= {5: self.p5_down_channel(p5), 6: p6}
            for level in range(7, self.top + 1):
                maps[level] = self.pool(maps[level - 1])
            again = {4: self.p4_down_channel_2(p4), 5: self.p5_down_channel_2(p5)}
        else:
            maps = dict(enumerate(inputs, 3))
        new = dict(maps)
        for level in range(self.top - 1, 2, -1):
            above = F.interpolate(new[level + 1], scale_factor=2)
            new[level] = getattr(self, f"conv{level}_up")(
                self._fuse([maps[level], above], getattr(self, f"p{level}_w1"))
            )
        for level in range(4, self.top + 1):
            edges = [again.get(level, maps[level])]
            edges += [new[level]] if level < self.top else []
            edges.append(self.pool(new[level - 1]))
            fused = self._fuse(edges, getattr(self, f"p{level}_w2"))
            new[level] = getattr(self, f"conv{level}_down")(fused)
        return tuple(new.values())


class ZyloHead(nn.Module):
    """A Regressor, or with ``num_classes`` a Classifier."""

    def __init__(self, levels, num_classes=None, layers=2):
        super().__init__()
        self.swish, self.values = nn.SiLU(), num_classes or 4
        if num_classes:
            self.num_classes = num_classes
        self.conv_list = nn.ModuleList(ZyloSeparable(WIDTH, norm_=False) for _ in range(layers))
        self.bn_list = nn.ModuleList(
            nn.ModuleList(norm(WIDTH) for _ in range(layers)) for _ in range(levels)
        )
        self.header = ZyloSeparable(WIDTH, 9 * self.values, norm_=False)

    def forward(self, inputs):
        outputs = []
        for x, norms in zip(inputs, self.bn_list, strict=True):
            for conv, bn in zip(self.conv_list, norms, strict=True):
                x = self.swish(bn(conv(x)))
            x = self.header(x).permute(0, 2, 3, 1)
            outputs.append(x.reshape(x.shape[0], -1, self.values))
        flat = torch.cat(outputs, 1)
        return flat.sigmoid() if hasattr(self, "num_classes") else flat


class Zylo(nn.Module):
    def __init__(self, attention=True, p8=False):
        super().__init__()
        self.backbone_net = Backbone()
        self.bifpn = nn.Sequential(*(ZyloBiFPN(i == 0, attention, p8) for i in range(2)))
        levels = 6 if p8 else 5
        self.regressor, self.classifier = ZyloHead(levels), ZyloHead(levels, 7)
        randomise(self)

    def forward(self, x):
        features = self.bifpn(tuple(self.backbone_net(x)))
        return features, self.regressor(features), self.classifier(features)
