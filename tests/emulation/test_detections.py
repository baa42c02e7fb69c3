"""nms and detect by their CUDA kernels, executed on the host; ``tests/kernels`` has the rest."""

import pytest
import torch
from op_utils import DTYPES, assert_identical, sample

pytestmark = pytest.mark.usefixtures("emulated")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
methods = pytest.mark.parametrize("method", ["hard", "gaussian"])
ops = pytest.mark.parametrize("op", ["nms", "detect"])


@methods
@pytest.mark.parametrize("count", [0, 1, 33, 300])
def test_nms(method, count):
    sample("nms", count=count, method=method, max_detections=20).check(torch.float32)


@dtypes
@methods
@pytest.mark.parametrize("max_candidates", [1, 50, 5000])
def test_detect(method, max_candidates, dtype):
    sample("detect", dtype, method=method, max_candidates=max_candidates).check(dtype)


@dtypes
def test_the_first_of_equal_logits_wins(dtype):
    call = sample("detect", dtype, max_candidates=30)
    for x in call.maps:
        x.round_()  # few values, of either sign
    call.check(dtype)


@dtypes
def test_nan_logits_and_scores_are_never_kept(dtype):
    call = sample("detect", dtype, score_threshold=-1.0, max_candidates=10**6)
    for x in call.maps:
        x[:, ::2] = torch.nan
    call.check(dtype)
    call = sample("nms")
    call.weights[0][:, ::3] = torch.nan
    call.check(torch.float32)


@ops
@pytest.mark.parametrize("batch", [0, 3])
def test_batch(op, batch):
    sample(op, batch=batch).check(torch.float32)


def test_a_level_of_many_parts():
    # more logits than one block looks at, an image that begins at an odd address
    sample("detect", torch.float16, classes=7, sizes=[(35, 37), (2, 2)]).check(torch.float16)


@ops
@methods
def test_results_do_not_depend_on_the_order_of_threads(emulated, op, method):
    call = sample(op, method=method)
    expected = call()
    for seed in (1, 2):
        emulated.set_seed(seed)
        assert_identical(call(), expected)
