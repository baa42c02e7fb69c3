"""Repeated calls use no more memory than one."""

import copy
import ctypes
import io
import os
import re
from pathlib import Path

import pytest
import torch

import edet_kernels
from edet_kernels.testing.samples import bifpn_graph, map_tree, sample

STATM = Path("/proc/self/statm")

pooled = pytest.mark.skipif(torch.__version__ < "2.11", reason="torch 2.11 can hand memory back")


def resident_bytes():
    """Memory of this process that is in RAM, without what the C library keeps of freed memory."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not STATM.exists(), reason="needs Linux's /proc")
@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("thread_count", [1, 2])
def test_repeated_bifpn_calls_leave_the_memory_as_it_was(thread_count, threads):
    threads(thread_count)
    call = sample("bifpn", batch=1, channels=32, graph=bifpn_graph((64, 64), levels=5, cells=3))
    planar = map_tree(lambda x: x.contiguous(), call.maps)  # so that copies are made as well
    for _ in range(20):
        call(planar)
    before = resident_bytes()
    for _ in range(200):
        call(planar)
    # an output of the finest level is 0.5 MiB: losing one buffer of a call would be 100 MiB
    assert resident_bytes() - before < 8 * 2**20


@pytest.mark.skipif(not STATM.exists(), reason="needs Linux's /proc")
@pytest.mark.usefixtures("kernels_only")
def test_the_memory_of_a_large_call_is_given_back():
    def call(batch):
        graph = bifpn_graph((64, 64), levels=5, cells=3)
        return sample("bifpn", batch=batch, channels=32, graph=graph)

    large, small = call(64), call(1)
    small(small.maps)
    before = resident_bytes()
    large(large.maps)  # its inner maps take 100 MiB
    for _ in range(300):
        small(small.maps)
    assert resident_bytes() - before < 32 * 2**20


def large_map(value=1.0):
    """A map of 64 MiB, of which every number is ``value``."""
    x = torch.zeros(1, 16, 1024, 1024).contiguous(memory_format=torch.channels_last)
    shift = torch.full((16,), value)
    (found,) = edet_kernels.lateral(x, [torch.zeros(16, 16, 1, 1)], [torch.ones(16)], [shift])
    return found


@pooled
@pytest.mark.usefixtures("kernels_only")
def test_the_memory_of_a_large_map_serves_the_next_one_when_it_is_free():
    first = large_map(1.0)
    second = large_map(2.0)
    assert first.data_ptr() != second.data_ptr()
    address, view = first.data_ptr(), first[:, :1]
    del first
    third = large_map(3.0)  # the view still needs the memory
    assert third.data_ptr() not in (address, second.data_ptr())
    assert (view == 1).all() and (second == 2).all() and (third == 3).all()
    del view
    fourth = large_map(4.0)
    assert fourth.data_ptr() == address and (fourth == 4).all()


@pytest.mark.usefixtures("kernels_only")
def test_a_large_map_is_a_tensor_like_others():
    found = large_map(2.0)
    assert found.is_contiguous(memory_format=torch.channels_last) and found.is_leaf
    array = found.numpy()
    kept = copy.deepcopy(found)
    found.share_memory_()
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), found) and torch.equal(kept, found)
    del found
    assert (array == 2).all()


@pooled
@pytest.mark.skipif(not STATM.exists(), reason="needs Linux's /proc")
@pytest.mark.usefixtures("kernels_only")
def test_the_memory_of_a_large_map_is_given_back():
    small = sample("bifpn", batch=1, channels=32, graph=bifpn_graph((64, 64), levels=5, cells=3))
    small(small.maps)
    large_map()
    with_it = resident_bytes()
    for _ in range(300):
        small(small.maps)
    assert with_it - resident_bytes() > 48 * 2**20


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs Linux's large pages"
)
@pytest.mark.usefixtures("kernels_only")
def test_a_large_map_asks_for_large_pages():
    x = torch.zeros(1, 16, 512, 512).contiguous(memory_format=torch.channels_last)
    one = torch.ones(16)
    (found,) = edet_kernels.lateral(x, [torch.zeros(16, 16, 1, 1)], [one], [one])
    middle = found.data_ptr() + found.numel() * found.element_size() // 2
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)
    ranges = [[int(x, 16) for x in part.split(" ", 1)[0].split("-")] for part in parts[1:]]
    [flags] = [
        re.search(r"^VmFlags:(.*)$", part, re.M)[1].split()
        for part, (begin, end) in zip(parts[1:], ranges, strict=True)
        if begin <= middle < end
    ]
    assert "hg" in flags
