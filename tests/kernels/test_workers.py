"""The library's own threads: same results, many callers, forks, and when they are taken.

``EDET_CPU_THREADS`` is read once per process, so each test runs a program of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from edet_kernels import library

pytestmark = pytest.mark.skipif(not library.load(), reason="needs the op library")

PROGRAM = """
import os, threading
import torch, edet, edet_kernels
torch.set_num_threads(1)
torch.manual_seed(0)
model = edet.create_model("tf_efficientdet_lite0", image_size=128, width=24, cells=2)
model.eval()
image = torch.rand(2, 3, 128, 128)

def run(threads):
    torch.set_num_threads(threads)
    with torch.no_grad(), edet_kernels.backend("cpu"):
        outputs = model(image)
        found = edet_kernels.detect(*outputs, edet.anchors.model_anchors(model.config))
    torch.set_num_threads(1)  # OpenMP, of torch's own operators, does not survive a fork
    return [*outputs[0], *outputs[1], *found]

def same(found):
    return all(map(torch.equal, found, expected))

def workers():
    names = (open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task"))
    return sum(name == "edet-worker\\n" for name in names)

expected = run(1)
"""


def run(program: str, threads: str) -> list[str]:
    """What the program prints, a line each."""
    environment = dict(os.environ, EDET_CPU_THREADS=threads, OMP_NUM_THREADS="4")
    environment.pop("EDET_BACKEND", None)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM + program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_results_do_not_depend_on_whose_threads() -> None:
    program = """
assert workers() == 0
for threads in (2, 3, 7, 2, 1):
    assert same(run(threads)), threads
print(workers())
"""
    assert run(program, "own") == ["6"]
    assert run(program, "torch") == ["0"]


def test_many_callers() -> None:
    program = """
wrong = []
def client(threads):
    for _ in range(15):
        if not same(run(threads)):
            wrong.append(threads)
clients = [threading.Thread(target=client, args=(n,)) for n in (2, 3, 3, 4)]
for c in clients: c.start()
for c in clients: c.join()
print(wrong, workers())
"""
    assert run(program, "own") == ["[] 3"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_takes_threads_of_its_own() -> None:
    program = """
assert same(run(3)) and workers() == 2
child = os.fork()
if not child:
    ok = workers() == 0 and same(run(3)) and workers() == 2
    os._exit(0 if ok else 1)
print(os.waitpid(child, 0)[1], same(run(2)), workers())
"""
    assert run(program, "own") == ["0 True 2"]


def test_an_error_in_a_task_reaches_the_caller() -> None:
    environment = dict(os.environ, EDET_CPU_THREADS="own", EDET_CPU_ISA="avx1024")
    environment.pop("EDET_BACKEND", None)
    program = """
import torch, edet_kernels
torch.set_num_threads(3)
maps = [torch.zeros(8, 8, 4, 4)]
for _ in range(20):
    try:
        edet_kernels.detect(maps, maps, torch.zeros(32, 4))
    except ValueError as error:
        print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("EDET_CPU_ISA must be one of") == 20


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be pinned here")
def test_they_are_taken_when_torchs_threads_are_late() -> None:
    """Three busy threads on one core: one of OpenMP's two is sooner or later made to wait."""
    program = """
import subprocess, sys
core = {min(os.sched_getaffinity(0))}
os.sched_setaffinity(0, core)
neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
try:
    for calls in range(2000):
        assert same(run(2))
        if workers():
            break
    print(workers())
finally:
    for n in neighbours: n.kill()
"""
    assert run(program, "auto") == ["1"]


def test_an_unknown_choice_is_refused() -> None:
    program = """
for _ in range(2):
    try:
        run(2)
    except ValueError as error:
        print(error)
"""
    expected = "EDET_CPU_THREADS must be auto, torch or own, got 'mine'"
    assert run(program, "mine") == [expected] * 2
