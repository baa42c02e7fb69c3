"""What CUDA alone has of nms and detect, on the host; ``tests/kernels`` has the rest."""

import pytest
import torch

from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import sample

pytestmark = pytest.mark.usefixtures("emulated")
methods = pytest.mark.parametrize("method", ["hard", "gaussian"])
ops = pytest.mark.parametrize("op", ["nms", "detect"])


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
