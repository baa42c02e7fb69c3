"""The models compute what effdet computes, in float64 and through the fused ops in float32."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import edet_kernels
from golden_utils import NAMES, Golden, golden, run

CASES = [
    pytest.param(name, marks=pytest.mark.slow if name[-2:] in ("d6", "7x") else ())
    for name in NAMES
]


def assert_taps(fixture: Golden, errors: dict[str, float], bounds: dict[str, float]) -> None:
    over = {name: (error, bounds[name]) for name, error in errors.items() if error > bounds[name]}
    assert len(errors) == len(fixture.meta["taps"])
    assert not over


@pytest.mark.parametrize("name", CASES)
def test_layers_in_float64(name: str) -> None:
    fixture = golden(name)
    # gradients are on because the layers run then; what they would need, 5 GB of D7x, is not kept
    with saved_tensors_hooks(lambda _: None, lambda _: pytest.fail("no gradient is asked for")):
        outputs = run(fixture.model().double(), fixture.images().double())
    assert outputs["class.0"].requires_grad
    assert_taps(fixture, fixture.errors(outputs), dict.fromkeys(outputs, 1e-9))


# the reference ops are the same for all models: the smallest of each kind of padding and fusion
@pytest.mark.parametrize("name", NAMES[:3])
def test_ops_in_float64(name: str) -> None:
    fixture = golden(name)
    with torch.no_grad():
        outputs = run(fixture.model().double(), fixture.images().double())
    assert_taps(fixture, fixture.errors(outputs), dict.fromkeys(outputs, 1e-9))


@pytest.mark.parametrize("name", CASES)
def test_fused_in_float32(name: str) -> None:
    torch.set_num_threads(2)
    fixture = golden(name)
    with torch.no_grad():
        outputs = run(fixture.model(), fixture.images())
    assert_taps(fixture, fixture.errors(outputs), fixture.float32_bounds())


@pytest.mark.parametrize("name", NAMES[:3])
def test_reference_backend_in_float32(name: str) -> None:
    fixture = golden(name)
    with torch.no_grad(), edet_kernels.backend("reference"):
        outputs = run(fixture.model(), fixture.images())
    assert_taps(fixture, fixture.errors(outputs), fixture.float32_bounds())


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_keys_and_order(name: str) -> None:
    fixture = golden(name)
    with torch.device("meta"):
        state = fixture.new_model().state_dict()
    found = [(key, list(tensor.shape)) for key, tensor in state.items()]
    assert found == list(fixture.meta["state_dict"].items())
