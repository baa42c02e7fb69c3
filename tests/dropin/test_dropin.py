"""accelerate and restore: other people's models give the same, faster, with the same tensors."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import edet
from edet import dropin
from edet.dropin import effdet
from edet.dropin.trial import tensors
from edet.fused import packed
from edet.fused.describe import (
    Edge,
    FusionNodes,
    HeadLayers,
    Mismatch,
    NodeLayers,
)
from edet.fused.packed import zero_padded_max_pool
from edet_kernels.testing.numeric import check_network, relative_difference
from stand_ins import DetBench, Effdet, TimmBackbone, Zylo, randomise


def flat(outputs):
    return tensors(outputs)


@torch.no_grad()
def errors(model, images):
    """Error of the fused and of the model's own layers against its own layers in float64."""
    own = copy.deepcopy(model).eval()
    edet.restore(own)
    exact = flat(copy.deepcopy(own).double()(images.double()))
    return tuple(relative_difference(flat(m(images)), exact) for m in (model.eval(), own))


EFFDET = {
    "fast": {},
    "softmax": {"methods": ("attn",)},
    "sum": {"methods": ("sum",)},
    "mixed": {"methods": ("sum", "fastattn", "attn")},
    "native": {"pad": "", "bias": False},
    "level first": {"level_first": True},
    "after": {"pre_act": False, "act": nn.ReLU6},
    "six levels": {"levels": 6, "size": 160},
    "hard swish": {"act": nn.Hardswish},
}


@pytest.mark.parametrize("options", EFFDET.values(), ids=EFFDET)
def test_effdet_gives_the_same(options):
    model = Effdet(**options)
    size = model.config.image_size
    report = edet.accelerate(model, rounds=0)
    assert report.replaced == ["fpn", "class_net", "box_net"]
    with torch.no_grad():
        mine, own = errors(model, torch.randn(2, 3, *size))
    check_network("model", mine, own, torch.float32)
    assert 0 < report.largest_difference < 1e-5


@pytest.mark.parametrize(
    "options",
    [{}, {"pad": "symmetric"}, {"act": nn.ReLU6, "squeeze": False}],
    ids=["same", "symmetric", "lite"],
)
def test_timm_backbone_gives_the_same(options):
    model = Effdet(backbone=lambda: TimmBackbone(**options))
    report = edet.accelerate(model, rounds=0)
    assert report.replaced == ["backbone", "fpn", "class_net", "box_net"]
    mine, own = errors(model, torch.randn(2, 3, 96, 96))
    check_network("model", mine, own, torch.float32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: setattr(b, "feature_hooks", 1), "inside of blocks"),
        (lambda b: setattr(b.blocks[0][0].se, "gate", nn.Hardsigmoid()), "Hardsigmoid"),
        (lambda b: setattr(b.blocks[1][0].bn2, "act", nn.ReLU()), "different activations"),
        (lambda b: setattr(b.blocks[1][0], "conv_dw", nn.Sequential(b.blocks[1][0].conv_dw)),
         "a block with Sequential"),
        (lambda b: setattr(b.blocks[1][0], "aa", nn.ReLU()), "a block with ReLU"),
        (lambda b: setattr(b.blocks[1][0].bn3, "act", nn.ReLU()), "after a projection"),
    ],
)  # fmt: skip
def test_other_backbones_are_left_alone(change, reason):
    model = Effdet(backbone=TimmBackbone)
    change(model.backbone)
    part = edet.accelerate(model, rounds=0).parts[0]
    assert part.name == "backbone" and not part.replaced and reason in part.reason


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("p8", [True, False])
def test_zylo_gives_the_same(attention, p8):
    model = Zylo(attention, p8)
    report = edet.accelerate(model, torch.randn(1, 3, 256, 256), rounds=0)
    assert report.replaced == ["bifpn.0", "bifpn.1", "regressor", "classifier"]
    mine, own = errors(model, torch.randn(1, 3, 256, 256))
    check_network("model", mine, own, torch.float32)
    images = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        runs = [model(images) for _ in range(3)]  # recorded and replayed
    for features, boxes, classes in runs:
        assert isinstance(features, tuple) and len(features) == 5 + p8
        assert boxes.shape[-1] == 4 and classes.min() >= 0 and classes.max() <= 1
        assert all(map(torch.equal, flat(features), flat(runs[0][0])))
        assert torch.equal(boxes, runs[0][1]) and torch.equal(classes, runs[0][2])
    assert len(model.regressor._cache.entry.weights.plans) == 1


@pytest.mark.parametrize("size", [(4, 4), (5, 5), (3, 6), (1, 1)])
def test_zero_padded_pool_differs_from_ours_at_the_border_only(size):
    x = -torch.rand(1, 2, *size) - 1
    out = tuple((n + 1) // 2 for n in size)
    pooled = zero_padded_max_pool(x, out)
    padded = torch.zeros(1, 2, 2 * out[0] + 1, 2 * out[1] + 1)
    top, left = (max((o - 1) * 2 + 3 - n, 0) // 2 for o, n in zip(out, size, strict=True))
    padded[:, :, top : top + size[0], left : left + size[1]] = x
    torch.testing.assert_close(pooled, nn.functional.max_pool2d(padded, 3, 2))
    assert (pooled[:, :, -1, -1] == 0).all()


def test_the_module_stays_and_the_fused_ops_run(monkeypatch):
    model = Effdet()
    fpn, keys = model.fpn, list(model.state_dict())
    tensors = {id(t) for t in (*model.parameters(), *model.buffers())}
    calls = []
    run = packed.PackedNodes.run
    monkeypatch.setattr(packed.PackedNodes, "run", lambda *a: calls.append(0) or run(*a))
    edet.accelerate(model, rounds=0)
    assert model.fpn is fpn and list(model.state_dict()) == keys
    assert {id(t) for t in (*model.parameters(), *model.buffers())} == tensors
    calls.clear()
    with torch.no_grad():
        model.eval()(torch.randn(1, 3, 96, 96))
    assert calls == [0]
    model(torch.randn(1, 3, 96, 96))  # needs gradients
    model.train()
    with torch.no_grad():
        model(torch.randn(2, 3, 96, 96))
    assert calls == [0]


def test_restore_undoes_it():
    model = Effdet().eval()
    before = {name: type(m) for name, m in model.named_modules()}
    own = dict(model.fpn.__dict__)
    with torch.no_grad():
        expected = model(torch.zeros(1, 3, 96, 96))
        edet.accelerate(model, rounds=0)
        assert edet.restore(model) == ["fpn", "class_net", "box_net"]
        found = model(torch.zeros(1, 3, 96, 96))
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert model.fpn.__dict__ == own
    assert all(torch.equal(a, b) for a, b in zip(flat(found), flat(expected), strict=True))
    assert edet.restore(model) == []


def test_training_checkpoints_and_averages_keep_working():
    torch.manual_seed(1)
    model = Effdet()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (model, twin)]
    edet.accelerate(model, rounds=0)
    images = torch.randn(2, 3, 96, 96)
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        m.train()
        for _ in range(2):
            optimizer.zero_grad()
            sum(y.square().mean() for y in flat(m(images))).backward()
            optimizer.step()
    for (key, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    mine, own = errors(model, images)  # the fused ops see the new weights
    check_network("trained", mine, own, torch.float32)
    fresh = Effdet()
    edet.accelerate(fresh, rounds=0)
    fresh.load_state_dict(twin.state_dict())
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(fresh)
    with torch.no_grad():
        expected = flat(twin.eval()(images))
        assert (
            relative_difference(flat(fresh.eval()(images)), [x.double() for x in expected]) < 1e-5
        )
        assert (
            relative_difference(flat(averaged.eval()(images)), [x.double() for x in expected])
            < 1e-5
        )


def test_copies_and_pickles_are_accelerated_too():
    model = Effdet().eval()
    edet.accelerate(model, rounds=0)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = flat(model(images))
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert isinstance(other.fpn, dropin.Fused) and other.fpn is not model.fpn
            assert all(
                torch.equal(a, b) for a, b in zip(flat(other(images)), expected, strict=True)
            )


def test_hooks_and_methods_of_the_module_remain():
    model = Effdet().eval()
    seen = []
    model.fpn.register_forward_hook(lambda *_: seen.append(0))
    edet.accelerate(model, rounds=0)
    seen.clear()
    with torch.no_grad():
        model(torch.randn(1, 3, 96, 96))
    assert seen == [0] and model.fpn.num_levels == 5
    assert isinstance(model.fpn, type(Effdet().fpn))


def test_exchanged_layers_are_used():
    model = Effdet().eval()
    edet.accelerate(model, rounds=0)
    images = torch.randn(1, 3, 96, 96)
    model.fpn.cell[0].fnode[2].combine.weight_method = "attn"
    model.fpn.cell[0].fnode[2].combine.edge_weights = nn.Parameter(torch.tensor([2.0, -1.0]))
    mine, own = errors(model, images)
    check_network("other weights", mine, own, torch.float32)
    model.class_net.predict.conv_dw = nn.Conv2d(24, 24, 3, padding=1)  # not depthwise any more
    mine, own = errors(model, images)
    check_network("other layers", mine, own, torch.float32)


class AddedTo(nn.Conv2d):
    """A convolution with an addition that begins at zero, as adapters do."""

    extra = 0.0

    def forward(self, x):
        return super().forward(x) + self.extra


def test_a_derived_convolution_is_left_alone():
    model = Effdet()
    model.box_net.predict.conv_pw.__class__ = AddedTo
    report = edet.accelerate(model, rounds=0)
    assert report.replaced == ["fpn", "class_net"]
    assert "AddedTo is a convolution with a forward of its own" in report.parts[-1].reason


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


SPOILED = {
    "pruned": lambda head: prune.l1_unstructured(head.predict.conv_pw, "weight", 0.5),
    "parametrised": lambda head: nn.utils.parametrize.register_parametrization(
        head.predict.conv_pw, "weight", Doubled()
    ),
    "hooked": lambda head: head.predict.conv_pw.register_forward_hook(lambda m, args, out: out + 1),
    "derived": lambda head: (
        setattr(head.predict.conv_pw, "__class__", AddedTo),
        setattr(head.predict.conv_pw, "extra", 1.0),
    ),
    "container": lambda head: setattr(
        head.predict, "__class__", type("Other", (type(head.predict),), {"forward": other_forward})
    ),
    "norm": lambda head: setattr(head.bn_rep[0][0], "bn", nn.GroupNorm(8, 24)),
    "epsilon": lambda head: setattr(head.bn_rep[0][0].bn, "eps", 0.5),
}


def other_forward(self, x):
    return 2 * self.conv_pw(self.conv_dw(x))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", SPOILED)
def test_layers_changed_afterwards_run(name, frozen):
    model = Effdet().eval()
    edet.accelerate(model, rounds=0)
    images = torch.randn(1, 3, 96, 96)
    if frozen:
        model.class_net.freeze()
    with torch.no_grad():
        before = [flat(model(images)) for _ in range(3)][-1]  # replayed
        SPOILED[name](model.class_net)
        after = flat(model(images))
    edet.restore(model)
    with torch.no_grad():
        expected = flat(model(images))
    assert any((x - y).abs().max() > 1e-3 for x, y in zip(after, before, strict=True))
    for x, y in zip(after, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4 * float(y.abs().max()))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_an_accelerated_model_can_be_traced():
    model = Effdet().eval()
    edet.accelerate(model, rounds=0)
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = flat(model(images))
        found = flat(torch.jit.trace(model, images, strict=False)(images))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4 * float(y.abs().max()))


def test_wrapped_network():
    bench = DetBench(Effdet())
    report = edet.accelerate(bench, rounds=1)
    assert report.replaced == ["model.fpn", "model.class_net", "model.box_net"]
    assert bench.training and bench.model.fpn.training
    assert bench(torch.randn(2, 3, 96, 96), torch.ones(())).requires_grad


def test_report():
    model = Effdet()
    model.box_net.act = nn.Mish()
    report = edet.accelerate(model, rounds=2)
    assert report.replaced == ["fpn", "class_net"]
    assert report.gain > 0 and all(p.fused_ms > 0 for p in report.parts if p.replaced)
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "part",
        "class",
        "before,",
        "ms",
        "after,",
        "ms",
        "gain",
        "difference",
    ]
    assert lines[3].split() == ["box_net", "EffdetHead", "left", "alone"]
    assert lines[4].startswith("whole network")
    assert "box_net was left alone: the kernels have no activation Mish" in lines
    assert "1×3×96×96, float32, cpu" in str(report)
    again = edet.accelerate(model, rounds=0)
    assert again.replaced == []
    assert [p.reason for p in again.parts[:2]] == ["it is accelerated already"] * 2


def change(path, value):
    def apply(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, value)

    return apply


def odd_bias(model):
    model.fpn.cell[0].fnode[0].after_combine.conv.conv_dw.bias = nn.Parameter(torch.ones(24))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (odd_bias, "has a bias"),
        (change("fpn.cell.1.fnode.3.combine.weight_method", "max"), "fusion method 'max'"),
        (change("fpn.resample.3.downsample", nn.AvgPool2d(2)), "downsampling by AvgPool2d"),
        (change("fpn.resample.4.downsample", nn.MaxPool2d(3, 2, 1)), "in different ways"),
        (change("fpn.resample.4.downsample", nn.MaxPool2d(2, 2)), "kernel"),
        (change("fpn.cell.0.fnode.0.combine.resample.4.upsample.mode", "bilinear"), "bilinear"),
        (change("fpn.cell.0.fnode.5.after_combine.conv.bn", nn.GroupNorm(4, 24)), "GroupNorm"),
        (
            change("fpn.cell.0.fnode.5.after_combine.conv", nn.Conv2d(24, 24, 3, padding=1)),
            "not separable",
        ),
        (change("fpn.cell.0.fnode.0.after_combine.act", nn.ReLU()), "different activations"),
        (change("fpn.pack", 1), "attribute pack of its own"),
    ],
)
def test_what_cannot_be_matched_is_left_alone(spoil, reason):
    model = Effdet()
    spoil(model)
    part = edet.accelerate(model, rounds=0).parts[0]
    assert part.name == "fpn" and not part.replaced and reason in part.reason
    assert not isinstance(model.fpn, dropin.Fused)


def test_a_wrong_description_is_found_out_by_the_sample():
    class Wrong(type(Effdet().class_net)):
        def as_head_layers(self):
            right = effdet.head(self)
            return HeadLayers(right.layers, right.norms, right.predict, "relu")

    model = Effdet()
    model.class_net.__class__ = Wrong
    part = edet.accelerate(model, rounds=0).parts[1]
    assert "its result differs by" in part.reason and part.difference > 1e-3
    assert type(model.class_net) is Wrong and not hasattr(model.class_net, "_cache")


class OwnNetwork(nn.Module):
    """Somebody's network: two maps given, a level above them, two ways of fusing."""

    def __init__(self):
        super().__init__()
        self.lateral = nn.Conv2d(12, 8, 1)
        self.dw = nn.ModuleList(nn.Conv2d(8, 8, 3, 1, 1, 1, 8, False) for _ in range(2))
        self.pw = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))
        self.bn = nn.BatchNorm2d(8)
        self.weights = nn.Parameter(torch.rand(2))
        randomise(self)

    def forward(self, maps):
        low, high = maps
        projected = self.lateral(high)
        up = nn.functional.interpolate(projected, scale_factor=2)
        w = self.weights.softmax(0)
        first = self.pw[0](self.dw[0](nn.functional.relu(w[0] * low + w[1] * up)))
        down = nn.functional.max_pool2d(first, 3, 2, 1)
        top = nn.functional.max_pool2d(projected, 3, 2, 1)
        up = nn.functional.interpolate(top, scale_factor=2)
        return first, self.bn(self.pw[1](self.dw[1](nn.functional.relu(projected + down + up))))

    def as_fusion_nodes(self):
        first = [Edge(0), Edge(1, self.lateral)]
        second = [Edge(1, self.lateral), Edge(3), Edge(2)]
        return FusionNodes(
            inputs=2,
            above=[Edge(1, self.lateral)],
            nodes=[
                NodeLayers(0, first, self.dw[0], self.pw[0], None, self.weights, "softmax"),
                NodeLayers(1, second, self.dw[1], self.pw[1], self.bn, None, "sum"),
            ],
            outputs=[3, 4],
            pool="symmetric",
            pre_activation="relu",
            finish=tuple,
        )


class Holder(nn.Module):
    """A network around it."""

    def __init__(self):
        super().__init__()
        self.stem, self.next = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 12, 3, 2, 1)
        self.neck = OwnNetwork()

    def forward(self, x):
        low = self.stem(x)
        return self.neck([low, self.next(low)])


def test_the_protocol():
    model = Holder()
    with pytest.raises(ValueError, match="sample must be images that Holder can run"):
        edet.accelerate(model, torch.zeros(1, 4, 8, 8), rounds=0)
    report = edet.accelerate(model, torch.randn(1, 3, 16, 24), rounds=0)
    assert report.replaced == ["neck"]
    mine, own = errors(model, torch.randn(2, 3, 16, 24))
    check_network("neck", mine, own, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "reflect"}, "pool must be one of"),
        ({"outputs": [0]}, "outputs must be ids of nodes"),
        ({"nodes": []}, "at least one node"),
        ({"above": [Edge(2)]}, r"above\[0\] must read a lower level, got 2"),
    ],
)
def test_wrong_descriptions_are_refused(changes, message):
    with pytest.raises(Mismatch, match=message):
        dataclasses.replace(OwnNetwork().as_fusion_nodes(), **changes).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": 3}, r"nodes\[0\].level must be 0 to 2, got 3"),
        ({"edges": [Edge(3)]}, r"nodes\[0\] must read maps 0 to 2, got 3"),
        ({"edges": [Edge(0)]}, r"edge_weights must hold 1, got \(2,\)"),
        ({"edge_weights": None}, "must have edge weights"),
        ({"edge_weights": torch.ones(2, 8)}, "all of one shape"),
        ({"conv_pw": nn.Conv2d(8, 8, 3)}, "a 3×3 convolution, not 1×1"),
        ({"conv_dw": nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False)}, "not 3×3"),
        ({"bn": nn.BatchNorm2d(8, affine=False)}, "no weights"),
    ],
)
def test_wrong_nodes_are_refused(changes, message):
    graph = OwnNetwork().as_fusion_nodes()
    nodes = [graph.nodes[0]._replace(**changes), *graph.nodes[1:]]
    with pytest.raises(Mismatch, match=message):
        dataclasses.replace(graph, nodes=nodes).check()


def test_unknown_model_is_told_of_the_protocol():
    with pytest.raises(ValueError, match=r"model must hold a BiFPN.*as_fusion_nodes.*docs/dropin"):
        edet.accelerate(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(ValueError, match=r"model must hold a BiFPN.*as_fusion_nodes"):
        edet.accelerate(nn.Sequential(TimmBackbone()))
    with pytest.raises(TypeError, match="model must be"):
        edet.accelerate("tf_efficientdet_d0")
    with pytest.raises(TypeError, match="sample must be"):
        edet.accelerate(Effdet(), 96)


def test_negative_rounds_and_missing_weights_are_refused():
    with pytest.raises(ValueError, match="rounds must be 0 or more, got -1"):
        edet.accelerate(Effdet(), rounds=-1)
    with pytest.raises(ValueError, match=r"model must have weights .* meta device"):
        edet.accelerate(Effdet().to("meta"))


def test_hooks_inside_a_part_keep_it_from_being_fused():
    model = Effdet()
    pruned = model.fpn.cell[1].fnode[0].after_combine.conv.conv_pw
    prune.l1_unstructured(pruned, "weight", 0.5)
    report = edet.accelerate(model, rounds=0)
    assert report.replaced == ["class_net", "box_net"]
    assert "cell.1.fnode.0.after_combine.conv.conv_pw has a forward hook" in report.parts[0].reason


def test_results_that_are_not_finite_are_named():
    model = Effdet()
    model.class_net.bn_rep[0][0].bn.running_var.fill_(float("nan"))
    report = edet.accelerate(model, rounds=0)
    assert report.replaced == ["fpn", "box_net"]
    assert report.parts[1].reason == "its own result for the sample input is not finite"


@pytest.mark.parametrize("compile_first", [True, False])
def test_compiled_models(compile_first):
    model, images = Holder().eval(), torch.randn(1, 3, 16, 24)
    with torch.no_grad():
        expected = flat(model(images))
        if compile_first:
            model.compile(backend="eager")
            model(images)
        assert edet.accelerate(model, images, rounds=0).replaced == ["neck"]
        if not compile_first:
            model.compile(backend="eager", fullgraph=True)
        found = flat(model(images))
    assert relative_difference(found, [x.double() for x in expected]) < 1e-5


def test_own_models_are_left_alone():
    model = edet.create_model("tf_efficientdet_lite0")
    report = edet.accelerate(model)
    assert report.replaced == [] and "by itself" in report.parts[0].reason
