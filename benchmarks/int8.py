"""int8 against float32: our kernels and ONNX runtimes on the same network.

They run an export of the float network, quantisations of that by ONNX Runtime and, for OpenVINO, by
NNCF, and the export of our own quantisation (``edet.export``).

Everything is timed in turns in one process, as in cpu.py; the ratios are medians of those of a
round, which a busy machine disturbs less than the times. ``python benchmarks/int8.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a program, only this file's own folder is searched

import edet  # noqa: E402
from benchmarks import cpu_rows, rivals  # noqa: E402
from benchmarks.cpu import machine, revision  # noqa: E402
from edet.bench import report  # noqa: E402
from edet.bench.variants import eager_copy, set_batch_norms  # noqa: E402

OURS, OURS_INT8, ORT, ORT_INT8 = "ours float32", "ours int8", "ORT float32", "ORT int8"
ORT_QDQ, OPENVINO, OPENVINO_QDQ = "ORT our int8", "OpenVINO float32", "OpenVINO our int8"
OPENVINO_NNCF = "OpenVINO NNCF int8"


def ort_static(path: Path, images: list[Tensor]) -> Path:
    """ONNX Runtime's own quantisation of a file: QDQ, weights per channel, ranges of the images."""
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left: Iterator[Tensor] = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.left, None)
            return None if image is None else {"images0": image.contiguous().numpy()}

    prepared, result = path.with_suffix(".prepared.onnx"), path.with_suffix(".int8.onnx")
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    q.quantize_static(
        str(prepared),
        str(result),
        Reader(),
        quant_format=q.QuantFormat.QDQ,
        per_channel=True,
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
    )
    return result


def nncf_static(path: Path, images: list[Tensor]) -> Path:
    """NNCF's quantisation of a file, for OpenVINO, with its defaults and ranges of the images."""
    import nncf
    import openvino as ov

    result = path.with_suffix(".nncf.xml")
    data = nncf.Dataset([image.contiguous().numpy() for image in images])
    ov.save_model(nncf.quantize(ov.Core().read_model(path), data), result, compress_to_fp16=False)
    return result


def calls(name: str, folder: Path, threads: int, ort: bool) -> dict[str, Callable[[], Any]]:
    """The network of each variant, on one normalised image."""
    torch.manual_seed(0)
    model = edet.create_model(name).eval()
    size = model.config.image_size
    pixels = torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8)
    mean, std = model.config.mean, model.config.std
    images = edet.preprocess.preprocess(list(pixels), size, mean=mean, std=std).images
    set_batch_norms(model, images[:1])
    small = edet.quantize(model, pixels, batch_size=1).freeze()
    x = images[:1]
    found: dict[str, Callable[[], Any]] = {}
    if ort:
        files = rivals.export_onnx(eager_copy(model), x.contiguous(), folder)
        single = [image[None] for image in images]
        whole, whole_nncf = (f(files["network"], single) for f in (ort_static, nncf_static))
        ours = folder / "ours.onnx"
        edet.export(small, ours, postprocess=False, batch_size=1)
        normalised, read = x.contiguous().numpy(), pixels[:1].numpy()
        for key, run, file, given in (
            (ORT, rivals.onnx_runtime, files["network"], normalised),
            (ORT_INT8, rivals.onnx_runtime, whole, normalised),
            (ORT_QDQ, rivals.onnx_runtime, ours, read),
            (OPENVINO, rivals.openvino, files["network"], normalised),
            (OPENVINO_QDQ, rivals.openvino, ours, read),
            (OPENVINO_NNCF, rivals.openvino, whole_nncf, normalised),
        ):
            found[key] = run(file, [given], threads)
    model.freeze()
    return {OURS: lambda: model(x), OURS_INT8: lambda: small(x), **found}


def measure(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Milliseconds of each variant, and how many times longer our float32 takes than each."""
    times = cpu_rows.measure(variants, rounds=rounds, seconds=1.0, limit=300.0)
    samples = {name: found["samples_ms"] for name, found in times.items()}
    return {
        "median_ms": {name: found["median_ms"] for name, found in times.items()},
        "times_faster_than_ours_float32": {
            name: report.ratios(samples[OURS], own)["paired"] for name, own in samples.items()
        },
        "samples_ms": samples,
    }


def main() -> None:
    """Measures from the command line."""
    parser = argparse.ArgumentParser(description="Times int8 against float32 on this CPU.")
    add: Callable[..., Any] = parser.add_argument
    add("--models", nargs="+", default=["tf_efficientdet_d0", "tf_efficientdet_lite0"])
    add("--threads", type=int, default=1)
    add("--rounds", type=int, default=20)
    add("--no-ort", action="store_true", help="leave out ONNX Runtime and OpenVINO")
    add("--output", type=Path, help="a JSON file for the result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "machine": machine(),
        "revision": revision(),
        "versions": rivals.versions(),
        "threads": args.threads,
        "networks": {},
    }
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            variants = calls(name, Path(folder), args.threads, not args.no_ort)
            result["networks"][name] = row = measure(variants, args.rounds)
        for variant, ms in row["median_ms"].items():
            times = row["times_faster_than_ours_float32"][variant]
            print(f"{name}  {variant:<18}  {ms:7.2f} ms  {times:.2f}×", flush=True)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
