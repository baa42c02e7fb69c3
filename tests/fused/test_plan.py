"""Modules replay recorded op calls, until their weights may have changed."""

import copy
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import edet
import edet_kernels
from edet.fused.module import MAX_PLANS, PackedModule
from edet.fused.plan import record

MODEL = "tf_efficientdet_lite0"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return edet.create_model(MODEL, image_size=64).eval()


def _flat(outputs):
    return [x for part in outputs for x in part]


def _parts(model):
    return [m for m in model.modules() if isinstance(m, PackedModule)]


def _plans(part):
    return part._cache.entry.weights.plans


def test_freezing_imports_no_compiler():
    """torch.compile's machinery takes a second and more memory than the network."""
    code = f"""
import sys, torch, edet
model = edet.create_model("{MODEL}", image_size=64).eval().freeze()
with torch.inference_mode():
    model(torch.randn(1, 3, 64, 64))
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("frozen", [True, False])
@torch.no_grad()
def test_every_shape_gives_the_same_as_at_first(model, frozen):
    images = [torch.randn(1, 3, 64, 64), torch.randn(2, 3, 96, 64)]
    expected = [_flat(model(x)) for x in images]
    if frozen:
        assert model.freeze() is model
    for _ in range(3):
        for x, wanted in zip(images, expected, strict=True):
            found = _flat(model(x))
            assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
    assert all(len(_plans(part)) == len(images) for part in _parts(model))


@pytest.mark.parametrize("frozen", [True, False])
@torch.no_grad()
def test_a_replay_runs_no_python_of_the_ops(model, frozen, monkeypatch):
    x = torch.randn(1, 3, 64, 64)
    if frozen:
        model.freeze()
    expected = _flat(model(x))
    model(x)  # recorded
    for op in ("stem", "mbconv", "lateral", "bifpn", "head"):
        monkeypatch.setattr(edet_kernels, op, lambda *_, **__: pytest.fail("not replayed"))
    found = _flat(model(x + 1))
    assert not any(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_results_of_a_replay_are_new_tensors(model):
    model.freeze()
    x = torch.randn(1, 3, 64, 64)
    first = _flat(model(x))
    kept = [t.clone() for t in first]
    second = _flat(model(torch.randn(1, 3, 64, 64)))
    assert all(torch.equal(f, k) for f, k in zip(first, kept, strict=True))
    assert not {t.data_ptr() for t in first} & {t.data_ptr() for t in second}


@pytest.mark.parametrize(
    "undo",
    [
        lambda m: m.train(),
        lambda m: m.to(torch.float64),
        lambda m: m.load_state_dict(m.state_dict()),
        lambda m: m.unfreeze(),
    ],
    ids=["train", "to", "load_state_dict", "unfreeze"],
)
def test_what_undoes_freezing(model, undo):
    trained = [p.requires_grad for p in model.parameters()]
    model.freeze()
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    undo(model)
    assert all(part._frozen is None for part in _parts(model))
    assert [p.requires_grad for p in model.parameters()] == trained


@torch.no_grad()
def test_weights_are_constants_until_unfrozen(model):
    x = torch.randn(1, 3, 64, 64)
    before = _flat(model.freeze()(x))
    model.class_net.predict.conv_pw.bias += 1
    assert torch.equal(_flat(model(x))[0], before[0])
    model.unfreeze()
    torch.testing.assert_close(_flat(model(x))[0], before[0] + 1)


def test_gradients_of_inputs_and_other_backends(model):
    model.freeze()
    x = torch.randn(1, 3, 64, 64)
    expected = _flat(model(x))
    with edet_kernels.backend("reference"):
        found = _flat(model(x))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-3, atol=1e-4)
    image = x.clone().requires_grad_()
    model(image)[0][0].sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_frozen_and_can_be_trained(model, how):
    parameters = sum(p.requires_grad for p in model.parameters())
    model.freeze()
    x = torch.randn(1, 3, 64, 64)
    expected = _flat(model(x))
    copied = how(model)
    for _ in range(2):
        assert all(torch.equal(f, e) for f, e in zip(_flat(copied(x)), expected, strict=True))
    assert all(part._frozen is not None for part in _parts(copied))
    assert [len(_plans(part)) for part in _parts(copied)] == [1] * len(_parts(copied))
    copied.train()
    assert sum(p.requires_grad for p in copied.parameters()) == parameters
    assert not any(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_what_a_frozen_module_does_see(model, monkeypatch):
    x = torch.randn(1, 3, 64, 64)
    before = _flat(model.freeze()(x))
    model.class_net.predict.conv_pw.bias.add_(1)
    model.class_net.repack()
    torch.testing.assert_close(_flat(model(x))[0], before[0] + 1)
    model.class_net.fused = False
    monkeypatch.setattr(edet_kernels, "head", None)
    monkeypatch.setattr(model.box_net, "fused", False)
    assert len(_flat(model(x))) == len(before)


@torch.no_grad()
def test_threads_may_share_a_module(model):
    fpn = model.fpn
    maps = [
        [torch.randn(1, c, s, s) for c, s in zip(model.backbone.channels, sizes, strict=True)]
        for sizes in ([(8 + n) * 4, (8 + n) * 2, 8 + n] for n in range(MAX_PLANS + 2))
    ]
    maps = [x for x in maps for _ in range(4)]  # more shapes than there are plans
    expected = [fpn(x) for x in maps]
    fpn.repack()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(torch.no_grad()(fpn), maps))
    for f, e in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(f, e, strict=True))


@torch.no_grad()
def test_plans_are_bounded(model):
    fpn = model.fpn.freeze() or model.fpn
    channels = model.backbone.channels
    for n in range(MAX_PLANS + 3):
        size = [(8 + n) * 4, (8 + n) * 2, 8 + n]
        maps = [torch.randn(1, c, s, s) for c, s in zip(channels, size, strict=True)]
        fpn(maps)
        fpn(maps)
    assert len(_plans(fpn)) == MAX_PLANS


@torch.no_grad()
def test_record():
    x, weight = torch.randn(3), torch.randn(3)

    def function():
        unused = x.exp()
        assert unused is not None
        return [(x.float() + weight.exp()) * 2, torch.stack([x, weight, x])]

    outputs, plan = record(function, [x])
    assert plan.refusal is None
    assert len(plan._steps) == 3
    y = torch.randn(3)
    for found, wanted in zip(
        plan([y]), [(y + weight.exp()) * 2, torch.stack([y, weight, y])], strict=True
    ):
        assert torch.equal(found, wanted)
    assert torch.equal(outputs[0], plan([x])[0])


@torch.no_grad()
def test_a_replay_lets_go_of_what_it_needs_no_more():
    x = torch.randn(3)
    _, plan = record(lambda: [((x + 1) * 2).exp()], [x])
    results, alive = [], []

    def watched(func):
        def call(*args):
            alive.append([result() is not None for result in results])
            found = func(*args)
            results.append(weakref.ref(found))
            return found

        return call

    plan._steps = [step._replace(func=watched(step.func)) for step in plan._steps]
    (found,) = plan([x])
    assert alive == [[], [True], [False, True]]
    assert torch.equal(found, ((x + 1) * 2).exp())


class Marked(torch.Tensor):
    """A tensor of a class of its own."""


@torch.no_grad()
def test_what_is_not_replayed(model):
    """Inputs for which the ops' Python does something else than for those recorded."""
    fpn, channels = model.fpn, model.backbone.channels
    maps = [torch.randn(1, c, 8 >> i, 8 >> i) for i, c in enumerate(channels)]
    expected = [fpn(maps) for _ in range(3)][-1]
    assert len(_plans(fpn)) == 1
    with pytest.raises(ValueError, match="dense"):
        fpn([x.to_sparse() for x in maps])
    with torch.enable_grad():
        for p in fpn.parameters():
            p.requires_grad_(False)
        fpn([x.requires_grad_() for x in maps])[0].sum().backward()
    assert all(x.grad is not None for x in maps)
    marked = fpn([x.detach().as_subclass(Marked) for x in maps])
    assert all(isinstance(x, Marked) for x in marked)
    assert all(map(torch.equal, [x.as_subclass(torch.Tensor) for x in marked], expected))
    strided = [x.detach().mT.contiguous().mT for x in maps]  # the same plan, of other strides
    assert all(map(torch.equal, fpn(strided), expected))
    assert len(_plans(fpn)) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [x.add_(1)],
        lambda x: [x + torch.rand(3)],
        lambda x: [x * float(x.sum())],
        lambda x: [torch.ones(3)],
    ],
    ids=["in place", "random", "number", "constant"],
)
@torch.no_grad()
def test_what_cannot_be_repeated_is_refused(function):
    x = torch.randn(3)
    _, plan = record(lambda: function(x), [x])
    assert plan.refusal


@torch.no_grad()
def test_another_view_of_an_input_is_no_constant():
    x = torch.randn(3)
    view = x[:]  # made where no plan sees it
    _, plan = record(lambda: [x + view], [x])
    assert "another view" in plan.refusal


@torch.no_grad()
def test_tf32_is_a_plan_of_its_own(model):
    """Recorded calls keep the operator that they found, which with TF32 is another one."""
    fpn = model.freeze().fpn
    maps = [torch.randn(1, c, 8 >> i, 8 >> i) for i, c in enumerate(fpn.in_channels)]
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = precision
            fpn(maps)
            fpn(maps)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(_plans(fpn)) == 2
