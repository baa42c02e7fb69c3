"""A server's load: many clients at once ask one ``Predictor``, and every answer is checked.

    python benchmarks/load.py --json benchmarks/results/load-cpu.json
    python benchmarks/load.py --clients 1 --requests 1000000 --seconds 2280 --memory-every 60 \
        --json benchmarks/results/load-long-cpu.json

Each client is a thread that sends its next request, the bytes of one or several JPEGs of different
sizes, when the last one is answered. A setting runs for a number of requests, or until its time is
over. Latency is of a request, from bytes to boxes; every answer must be the one that the same
pictures got when nobody else asked. Memory is the process's, before the first request of a setting,
after its last and, where asked for, in between: what each thread keeps for the next request is
warmed up before.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import platform
import threading
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edet
from edet.bench.measure import machine_name
from edet.detection.stats import memory_bytes
from edet.extras import require

ROOT = Path(__file__).resolve().parents[1]

#: Heights and widths of the pictures.
SIZES = ((480, 640), (640, 480), (720, 1280), (300, 300))


@dataclass(frozen=True)
class Setting:
    """Clients that ask at once, images of a request, threads of an operator."""

    clients: int
    batch: int
    threads: int


@dataclass
class Row:
    """What a setting gave.

    Attributes:
        sent, answered, wrong: requests; those answered with other boxes than when asked alone.
        seconds: from the first request to the last answer.
        images_per_second: of all clients.
        cpu_seconds_per_image: of all threads of the process.
        p50_ms, p99_ms, max_ms: of a request.
        memory_mib: before the first request and after the last.
        memory_over_time: seconds since the first request, and MiB then.
    """

    setting: Setting
    sent: int
    answered: int
    wrong: int
    seconds: float
    images_per_second: float
    cpu_seconds_per_image: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    memory_mib: tuple[float, float]
    memory_over_time: list[tuple[float, float]]


def pictures(count: int) -> list[bytes]:
    """JPEG files of several sizes that show a person, the same in every run."""
    image = require("PIL.Image", "image")
    files = []
    with image.open(ROOT / "docs/demo.jpg") as portrait:
        for i, (height, width) in zip(range(count), itertools.cycle(SIZES), strict=False):
            margin = 10 * i
            box = (margin, margin, portrait.width - margin, portrait.height - margin)
            file = io.BytesIO()
            portrait.resize((width, height), box=box).save(file, "JPEG", quality=90)
            files.append(file.getvalue())
    return files


def same(found: Sequence[edet.Detections], expected: Sequence[edet.Detections]) -> bool:
    """Whether the answers are those expected, but for rounding in batches of another size."""
    return len(found) == len(expected) and all(
        a.labels.tolist() == b.labels.tolist()
        and torch.allclose(a.boxes, b.boxes, rtol=1e-4, atol=0.05)
        for a, b in zip(found, expected, strict=True)
    )


def watched(
    threads: Sequence[threading.Thread], every: float, device: torch.device
) -> list[tuple[float, float]]:
    """Waits for all threads to end; seconds since the call and MiB then, every ``every`` seconds.

    ``every`` of 0 takes no memory.
    """
    start, samples = time.perf_counter(), []
    for number in itertools.count(1):
        for thread in threads:
            left = start + number * every - time.perf_counter()
            thread.join(max(left, 0) if every else None)
        if not any(thread.is_alive() for thread in threads):
            break
        samples.append((time.perf_counter() - start, memory_bytes(device)[0] / 2**20))
    return samples


def load(
    predictor: edet.Predictor,
    files: Sequence[bytes],
    setting: Setting,
    requests: int,
    limit: float,
    every: float = 0,
) -> Row:
    """Runs one setting: at most ``requests`` requests and ``limit`` seconds.

    Memory is taken every ``every`` seconds in between; 0: not.
    """
    torch.set_num_threads(setting.threads)
    chunks = [
        [files[(start + i) % len(files)] for i in range(setting.batch)]
        for start in range(len(files))
    ]
    expected = [predictor(chunk) for chunk in chunks]  # which also warms up
    if not any(len(found) for answer in expected for found in answer):
        raise ValueError("model must find something in the pictures, or no answer can be wrong")
    numbers = itertools.count()
    # not lists of objects: they would be most of what a long run adds to the memory
    times, wrong, sent = array("d"), array("q"), array("q")
    barrier = threading.Barrier(setting.clients + 1)

    def client() -> None:
        torch.set_num_threads(setting.threads)  # is a thread's own, with OpenMP
        for chunk in chunks[:3]:  # a thread has memory of its own, which it keeps
            predictor(chunk)
        barrier.wait()
        barrier.wait()
        while (number := next(numbers)) < requests and time.perf_counter() < deadline:
            sent.append(number)
            start = time.perf_counter()
            found = predictor(chunks[number % len(chunks)])
            times.append(time.perf_counter() - start)
            if not same(found, expected[number % len(chunks)]):
                wrong.append(number)

    clients = [threading.Thread(target=client) for _ in range(setting.clients)]
    for thread in clients:
        thread.start()
    barrier.wait()  # all are warm
    before, _ = memory_bytes(predictor.device)
    cpu, start = time.process_time(), time.perf_counter()
    deadline = start + limit
    barrier.wait()
    samples = watched(clients, every, predictor.device)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    after, _ = memory_bytes(predictor.device)
    images = len(times) * setting.batch
    p50, p99, most = (float(x) for x in 1e3 * np.percentile(times, (50, 99, 100)))
    return Row(
        setting,
        sent=len(sent),
        answered=len(times),
        wrong=len(wrong),
        seconds=seconds,
        images_per_second=images / seconds,
        cpu_seconds_per_image=cpu / images,
        p50_ms=p50,
        p99_ms=p99,
        max_ms=most,
        memory_mib=(before / 2**20, after / 2**20),
        memory_over_time=samples,
    )


def as_line(row: Row) -> str:
    """A row of the table that is printed."""
    s = row.setting
    return (
        f"{s.clients:7} {s.batch:6} {s.threads:7} {row.answered:8}/{row.sent:<8} {row.wrong:5} "
        f"{row.images_per_second:8.2f} {1e3 * row.cpu_seconds_per_image:11.1f} "
        f"{row.p50_ms:9.1f} {row.p99_ms:9.1f} "
        f"{row.memory_mib[0]:7.0f} → {row.memory_mib[1]:.0f}"
    )


def markdown(result: dict[str, Any]) -> list[str]:
    """The lines of a result file's table, as docs/serving.md has it."""
    lines = [
        "| clients | images of a request | threads | requests, answered, wrong | CPU ms per image "
        "| p50 ms | p99 ms | memory before → after, MiB |",
        "|---:|---:|---:|---|---:|---:|---:|---|",
    ]
    for row in result["rows"]:
        setting, (before, after) = row["setting"], row["memory_mib"]
        lines.append(
            f"| {setting['clients']} | {setting['batch']} | {setting['threads']} "
            f"| {row['sent']}, {row['answered']}, {row['wrong']} "
            f"| {1e3 * row['cpu_seconds_per_image']:.1f} "
            f"| {row['p50_ms']:.0f} | {row['p99_ms']:.0f} | {before:.0f} → {after:.0f} |"
        )
    return lines


def over_time(result: dict[str, Any], parts: int = 6) -> list[str]:
    """The lines of a table of how memory went, medians of equal parts, of a long run's file."""
    lines = ["| requests, answered, wrong | minutes | memory, MiB |", "|---|---:|---|"]
    for row in result["rows"]:
        samples = [mib for _, mib in row["memory_over_time"]]
        medians = [f"{np.median(part):.0f}" for part in np.array_split(samples, parts)]
        lines.append(
            f"| {row['sent']}, {row['answered']}, {row['wrong']} | {row['seconds'] / 60:.0f} "
            f"| {', '.join(medians)} |"
        )
    return lines


def whole(text: str) -> list[int]:
    """Positive whole numbers between commas."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all settings; the exit status is 1 when an answer was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="edet_lite0_person", help="as edet.Predictor takes it")
    parser.add_argument("--image-size", type=int, help="of the network's input")
    parser.add_argument("--clients", type=whole, default=[1, 2, 4, 8])
    parser.add_argument("--batch", type=whole, default=[1], help="images of a request")
    parser.add_argument("--threads", type=whole, default=[1], help="of an operator")
    parser.add_argument("--requests", type=int, default=200, help="of a setting, at most")
    parser.add_argument("--seconds", type=float, default=60, help="of a setting, at most")
    parser.add_argument("--memory-every", type=float, default=0, help="seconds; 0: not")
    parser.add_argument("--note", default="", help="what else the machine does")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    predictor = edet.Predictor(
        options.model,
        image_size=options.image_size,
        batch_size=max(options.batch),
        score_threshold=0.1,
    )
    files = pictures(8)
    settings = [
        Setting(clients, batch, threads)
        for threads in options.threads
        for batch in options.batch
        for clients in options.clients
    ]
    print("clients  batch threads answered/sent    wrong images/s CPU ms/image    p50 ms    p99 ms")
    rows = []
    for setting in settings:
        limits = (options.requests, options.seconds, options.memory_every)
        rows.append(load(predictor, files, setting, *limits))
        print(as_line(rows[-1]), flush=True)
    if options.json:
        result = {
            "schema": "edet-load-1",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": {
                "processor": machine_name(predictor.device),
                "cores": os.cpu_count(),
                "note": options.note,
            },
            "versions": {
                "edet-kernels": edet.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "model": options.model,
            "image_size": predictor.image_size,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(row.wrong or row.answered != row.sent for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
