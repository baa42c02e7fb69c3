"""accelerate on a GPU: other people's models give the same there; run on the CPU too."""

from __future__ import annotations

import copy

import pytest
import torch

import edet
from edet.dropin.trial import tensors
from edet_kernels.testing.numeric import check_network, relative_difference
from stand_ins import Effdet, TimmBackbone, Zylo

MODELS = {
    "effdet": lambda: Effdet(),
    "effdet with timm's backbone": lambda: Effdet(backbone=TimmBackbone),
    "zylo": lambda: Zylo(True, False),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_accelerated_gives_the_same(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = MODELS[name]().eval().to(device)
    side = 256 if name == "zylo" else 96
    images = torch.randn(2, 3, side, side, device=device)
    own = copy.deepcopy(model)
    report = edet.accelerate(model, images[:1], rounds=1)
    assert report.replaced and not [part for part in report.parts if not part.replaced]
    exact = tensors(copy.deepcopy(own).double()(images.double()))
    mine, theirs = (relative_difference(tensors(m(images)), exact) for m in (model, own))
    check_network(name, mine, theirs, torch.float32)
    edet.restore(model)
    restored, before = (tensors(m(images)) for m in (model, own))
    assert relative_difference(restored, [x.double() for x in before]) < 1e-6
