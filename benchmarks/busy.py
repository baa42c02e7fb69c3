"""A busy machine: how much slower a network gets when its threads do not have the cores alone.

    python benchmarks/busy.py --json benchmarks/results/busy-cpu.json

Ours and ONNX Runtime are each a process of its own with the same network, image and number of
threads. They are asked for a few images in turns, so that neither runs while the other is timed,
first alone, then beside processes that compute, with more threads than cores, and with a quota of
processor time below the number of threads (a cgroup; where this program may not make one, the
rows are left out). Beside the times stands the processor time of a call, all threads together:
threads that wait for each other without giving up their core show there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a program, only this file's own folder is searched

import edet  # noqa: E402
from benchmarks import rivals  # noqa: E402
from benchmarks.cpu import machine, revision  # noqa: E402
from edet.bench.variants import eager_copy, set_batch_norms  # noqa: E402

OURS, ORT = "ours", "ONNX Runtime"
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Setting:
    """Threads of a network, processes that compute beside it, cores' worth of time it may use."""

    threads: int
    neighbours: int = 0
    quota: float | None = None

    def __str__(self) -> str:
        text = f"{self.threads} thread{'s' * (self.threads > 1)}"
        if self.neighbours:
            text += f", {self.neighbours} neighbour{'s' * (self.neighbours > 1)}"
        return text + (f", quota of {self.quota:g} cores" if self.quota else "")


SETTINGS = (
    Setting(1),
    Setting(1, neighbours=CORES),
    Setting(CORES),
    Setting(CORES, neighbours=1),
    Setting(CORES, neighbours=CORES),
    Setting(2 * CORES),
    Setting(2 * CORES, neighbours=CORES),
    Setting(CORES, quota=CORES / 2),
    Setting(2 * CORES, quota=CORES / 2),
)


def compute() -> None:
    """A neighbour: computes until it is ended."""
    torch.set_num_threads(1)
    a = torch.rand(256, 256)
    while True:
        a = (a @ a).clamp_(0, 1)


def serve(name: str, model: str, file: str, threads: int, pipe: Connection) -> None:
    """One runtime's process: for each number that arrives, so many calls' (wall, CPU) seconds."""
    torch.set_num_threads(threads)
    image = torch.load(file + ".image", weights_only=True)
    call: Callable[[], Any]
    if name == ORT:
        call = rivals.onnx_runtime(Path(file), [image.numpy()], threads)
    else:
        network = build(model, image.shape[-1])
        set_batch_norms(network, image)
        network.freeze()

        def call() -> Any:
            with torch.inference_mode():
                return network(image)

    pipe.send([float(x.float().abs().mean()) for x in map(torch.as_tensor, flat(call()))])
    while count := pipe.recv():
        samples = []
        for _ in range(count):
            cpu, start = time.process_time(), time.perf_counter()
            call()
            samples.append((time.perf_counter() - start, time.process_time() - cpu))
        pipe.send(samples)


def flat(outputs: Any) -> Iterator[Any]:
    """The arrays of nested lists, one after the other."""
    if isinstance(outputs, list | tuple):
        for part in outputs:
            yield from flat(part)
    else:
        yield outputs


def build(name: str, image_size: int | None = None) -> edet.EfficientDet:
    """The same network in every process."""
    torch.manual_seed(0)
    return edet.create_model(name, image_size=image_size).eval()


@contextmanager
def quota_of(cores: float, processes: Sequence[int]) -> Iterator[None]:
    """Gives processes together at most so many cores' worth of time.

    Raises:
        OSError: this program may not make a cgroup.
    """
    root = Path("/sys/fs/cgroup")
    first_version = (root / "cpu").is_dir()
    group = (root / "cpu" if first_version else root) / f"edet-busy-{os.getpid()}"
    group.mkdir()
    try:
        period = 100_000
        limit = round(cores * period)
        if first_version:
            (group / "cpu.cfs_period_us").write_text(str(period))
            (group / "cpu.cfs_quota_us").write_text(str(limit))
        else:
            (group / "cpu.max").write_text(f"{limit} {period}")
        for process in processes:
            (group / "cgroup.procs").write_text(str(process))
        yield
    finally:
        for process in processes:
            (group.parent / "cgroup.procs").write_text(str(process))
        group.rmdir()


def measure(
    setting: Setting, model: str, file: str, rounds: int, calls: int
) -> dict[str, dict[str, float]]:
    """Medians and 90th percentiles of one setting, milliseconds of a call.

    Raises:
        OSError: it has a quota, and this program may not make a cgroup.
        ValueError: the two networks give different numbers.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    with ExitStack() as stack:

        def start(target: Callable[..., None], *arguments: Any) -> BaseProcess:
            process = context.Process(target=target, args=arguments, daemon=True)
            process.start()
            processes.append(process)
            stack.callback(process.kill)
            return process

        pipes, answers = {}, {}
        for name in (OURS, ORT):
            pipes[name], theirs = context.Pipe()
            start(serve, name, model, file, setting.threads, theirs)
            answers[name] = pipes[name].recv()
        pairs = list(zip(answers[OURS], answers[ORT], strict=True))
        if any(abs(a - b) > 1e-3 * max(abs(a), abs(b)) for a, b in pairs):
            raise ValueError(f"the two networks give different numbers: {pairs}")
        if setting.quota:
            numbers = [process.pid for process in processes if process.pid]
            stack.enter_context(quota_of(setting.quota, numbers))
        for _ in range(setting.neighbours):
            start(compute)
        time.sleep(2 if setting.neighbours else 0)
        samples: dict[str, list[tuple[float, float]]] = {OURS: [], ORT: []}
        for number in range(rounds + 1):
            for name, pipe in pipes.items():
                pipe.send(calls)
                found = pipe.recv()
                samples[name] += found if number else []
                time.sleep(0.05)
    row = {}
    for name, found in samples.items():
        walls = sorted(1e3 * wall for wall, _ in found)
        row[name] = {
            "median_ms": statistics.median(walls),
            "p90_ms": walls[int(0.9 * (len(walls) - 1))],
            "cpu_ms": statistics.median(1e3 * cpu for _, cpu in found),
        }
    return row


def markdown(result: dict[str, Any]) -> list[str]:
    """The lines of a result file's table, as docs/serving.md has it."""
    lines = [
        "| | ours: median, 90 % | ONNX Runtime | ratio of medians | CPU ms of a call: ours "
        "| ONNX Runtime |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        ours, theirs = row["runtimes"][OURS], row["runtimes"][ORT]
        lines.append(
            f"| {row['label']} | {ours['median_ms']:.0f}, {ours['p90_ms']:.0f} "
            f"| {theirs['median_ms']:.0f}, {theirs['p90_ms']:.0f} "
            f"| {theirs['median_ms'] / ours['median_ms']:.2f} "
            f"| {ours['cpu_ms']:.0f} | {theirs['cpu_ms']:.0f} |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tf_efficientdet_d0")
    parser.add_argument("--image-size", type=int, help="of a square image; the model's by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=4, help="of a runtime in a round")
    parser.add_argument("--json", type=Path, help="a file for the result")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        network = build(options.model, options.image_size)
        image = torch.rand(1, 3, *network.config.image_size)
        set_batch_norms(network, image)
        file = str(rivals.export_onnx(eager_copy(network), image, Path(folder))["network"])
        torch.save(image, file + ".image")
        for setting in SETTINGS:
            try:
                row = measure(setting, options.model, file, options.rounds, options.calls)
            except OSError as error:
                if setting.quota is None:
                    raise
                print(f"{setting}: left out, no cgroup can be made here ({error})", flush=True)
                continue
            rows.append({"label": str(setting), "setting": asdict(setting), "runtimes": row})
            print(markdown({"rows": rows[-1:]})[-1], flush=True)
    if options.json:
        result = {
            "machine": machine(),
            "cores": CORES,
            "revision": revision(),
            "versions": rivals.versions(),
            "model": options.model,
            "image_size": list(network.config.image_size),
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
