"""Random shapes, strides and parameters for the two ops that everything else is made of."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edet_kernels.names import ACTIVATIONS, POOLS
from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import DTYPES, FUSION_KINDS, sample

pytestmark = pytest.mark.usefixtures("kernels_only")

seeds = st.integers(0, 2**32)
channels = st.integers(1, 70)
sides = st.integers(1, 24)
sizes = st.tuples(sides, sides)


@st.composite
def resizable(draw, size):
    """A map size that ``size`` can be made from, its max pool without windows of padding only."""

    def larger(n):
        stride = draw(st.integers(1, 4))
        return (n - 1) * stride + draw(st.integers(1, stride))

    kind = draw(st.sampled_from(["same", "smaller", "larger"]))
    if kind == "same":
        return size
    if kind == "smaller":
        return tuple(draw(st.integers(1, n)) for n in size)
    return tuple(larger(n) for n in size)


@st.composite
def strided(draw, x):
    """A tensor equal to ``x`` that is a view of a larger one, its dimensions in any order."""
    steps = draw(st.tuples(*[st.integers(1, 3)] * 4))
    offsets = draw(st.tuples(*[st.integers(0, 2)] * 4))
    order = draw(st.permutations(range(4)))
    shape = [n * step + offset for n, step, offset in zip(x.shape, steps, offsets, strict=True)]
    backing = torch.full([shape[i] for i in order], torch.nan).to(x.dtype)
    wide = backing.permute([order.index(i) for i in range(4)])
    view = wide[tuple(slice(o, None, s) for o, s in zip(offsets, steps, strict=True))]
    view = view[tuple(slice(n) for n in x.shape)]
    assert view.shape == x.shape
    return view.copy_(x)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    data=st.data(),
    size=sizes,
    channels=channels,
    out_channels=channels,
    batch=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    fusion=st.sampled_from(FUSION_KINDS),
    pool=st.sampled_from(POOLS),
    pre_activation=st.sampled_from(ACTIVATIONS),
    post_activation=st.sampled_from(ACTIVATIONS),
    seed=seeds,
)
def test_fusion_node(data, size, channels, out_channels, batch, dtype, fusion, seed, **options):
    torch.manual_seed(seed)
    sources = data.draw(st.lists(resizable(size), min_size=1, max_size=4), label="inputs")
    call = sample(
        "fusion_node",
        dtype,
        batch,
        channels=channels,
        out_channels=out_channels,
        sizes=sources,
        size=size,
        fusion=fusion[0],
        per_channel=fusion[1],
        **options,
    )
    call.check(dtype)
    views = [data.draw(strided(x), label="view") for x in call.maps]
    assert_identical(call(views), call())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    data=st.data(),
    sizes=st.lists(sizes, min_size=1, max_size=5),
    channels=channels,
    out_channels=channels,
    batch=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    per_level=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    seed=seeds,
)
def test_separable_conv(data, batch, dtype, seed, **options):
    torch.manual_seed(seed)
    call = sample("separable_conv", dtype, batch, **options)
    call.check(dtype)
    views = [data.draw(strided(x), label="view") for x in call.maps]
    assert_identical(call(views), call())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    source=sizes,
    size=sizes,
    pool=st.sampled_from(POOLS),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_resize_to_any_size(source, size, pool, dtype, seed):
    # also to sizes whose last windows hold nothing but padding, −inf
    assume((source[0] - size[0]) * (source[1] - size[1]) >= 0)
    torch.manual_seed(seed)
    call = sample("weighted_fusion", dtype, channels=5, sizes=[source], size=size, pool=pool)
    call.check(dtype)
