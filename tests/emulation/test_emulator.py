"""The emulation itself: right kernels run, and every fault it claims to catch is caught."""

import numpy as np
import pytest
import torch

from edet_kernels.testing.numeric import to_tf32


def numbers(blocks=3, threads=64):
    return np.arange(blocks * threads, dtype=np.float32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threads", [1, 7, 32, 64, 200, 512])
def test_a_right_kernel_runs(emulation, threads, seed):
    emulation.set_seed(seed)
    x = numbers(threads=threads)
    assert np.array_equal(emulation.reverse(x, threads), x)  # turned around twice


RACE = r"4 bytes of shared memory at \d+, which another thread (read|wrote) since the last barrier"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing_barrier", RACE),
        ("missing_last_barrier", RACE),
        ("missing_warp_barrier", RACE),
        ("divergent_barrier", r"divergent barrier: thread \(\d+, 0, 0\) waits at the barrier of"),
        ("early_exit", r"divergent barrier: .*thread \(5, 0, 0\) has left the kernel"),
        ("divergent_warp", "divergent barrier: .* (waits for its warp|has left the kernel)"),
        ("global_overrun", r"Reverse.*thread \(63, 0, 0\): reads 4 bytes of global memory outside"),
        ("global_misaligned", "reads 16 bytes of global memory at an address that is no multiple"),
        ("input_written", "writes 4 bytes of global memory of an input"),
        ("shared_overrun", r"writes 4 bytes of shared memory at 256, outside its 256"),
    ],
)  # fmt: skip
def test_a_fault_is_caught_whatever_the_order(emulation, fault, message, seed):
    emulation.set_seed(seed)
    with pytest.raises(RuntimeError, match=message):
        emulation.reverse(numbers(), 64, fault)
    assert np.array_equal(emulation.reverse(numbers(), 64), numbers())  # and it goes on


def operands(name):
    """Operands of a product on tensor cores, exact in its type: a (16, k) and b (k, 8)."""
    if name == "tf32":
        return to_tf32(torch.randn(16, 8)), to_tf32(torch.randn(8, 8))
    dtype = torch.float16 if name == "f16" else torch.bfloat16
    return torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)


def multiply(emulation, name, a, b, d):
    result = d.numpy().copy()
    emulation.product(*(x.view(torch.uint8).numpy() for x in (a, b)), result, name)
    return torch.from_numpy(result)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("f16", 75), ("bf16", 75), ("f16", 80), ("bf16", 80), ("tf32", 80)],
)
def test_tensor_core_product(emulation, name, architecture):
    emulation.set_device(4, 64 * 1024, architecture)
    (a, b), d = operands(name), torch.randn(16, 8)
    expected = d.double() + a.double() @ b.double()
    result = multiply(emulation, name, a, b, d)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)


def test_tf32_product_is_refused(emulation):
    (a, b), d = operands("tf32"), torch.zeros(16, 8)
    emulation.set_device(4, 64 * 1024, 75)
    with pytest.raises(RuntimeError, match="needs sm_80"):
        multiply(emulation, "tf32", a, b, d)
    emulation.set_device(4, 64 * 1024, 80)
    for one, two in ((a, b * 1.1), (a * 1.1, b)):
        with pytest.raises(RuntimeError, match="not rounded to tf32"):
            multiply(emulation, "tf32", one, two, d)


def test_warp_functions_and_atomics(emulation):
    x = np.random.default_rng(0).integers(-100, 100, 96).astype(np.int32)
    shuffled, exchanged, votes, sums = emulation.warp(x)
    lanes = x.reshape(3, 32)
    assert np.array_equal(shuffled.reshape(3, 32), np.roll(lanes, -1, 1))
    assert np.array_equal(exchanged.reshape(3, 32), lanes[:, np.arange(32) ^ 5])
    odd = (lanes % 2 << np.arange(32)).sum(1).astype(np.uint32).view(np.int32)
    assert np.array_equal(votes.reshape(3, 32), np.repeat(odd[:, None], 32, 1))
    assert sums.tolist() == [x.sum(), x.sum()]


@pytest.mark.parametrize(
    ("stride", "vector", "conflicts"),
    [(0, 1, 0), (1, 1, 0), (2, 1, 1), (32, 1, 31), (33, 1, 0), (4, 4, 0), (8, 4, 4), (36, 4, 0)],
)
def test_bank_conflicts(emulation, stride, vector, conflicts):
    emulation.count_launches(True)
    if stride:
        emulation.touch(stride, vector)
        (launch,) = emulation.launches()
        assert launch["bank_conflicts"] == conflicts
    else:
        with pytest.raises(RuntimeError, match="a race"):
            emulation.touch(stride, vector)
    emulation.count_launches(False)


def test_bytes_are_counted(emulation):
    emulation.count_launches(True)
    emulation.reverse(numbers(), 64)
    emulation.count_launches(False)
    emulation.reverse(numbers(), 64)
    (launch,) = emulation.launches()
    assert (launch["blocks"], launch["shared_bytes"]) == (3, 256)
    assert launch["bytes_read"] == launch["bytes_written"] == 3 * 64 * 4
    sectors = 3 * 64 * 4 // 32
    assert sectors <= launch["sectors_read"] <= sectors + 3  # an array may begin inside a sector
