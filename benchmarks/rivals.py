"""What a model is compared with on a CPU: PyTorch eager, torch.compile, ONNX Runtime and OpenVINO.

All rivals run the project's own network: PyTorch its layers, the ONNX runtimes an export of them
and, where effdet is at hand (effdet_onnx.py), that of effdet's own layers with the same weights.
Run as a program, this file measures the peak memory of one rival in a process of its own; for that
reason nothing large is imported at the top.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    Arrays = list[np.ndarray[Any, Any]]

#: Options of torch.compile for each of its rows; both run in inference mode on channels_last maps.
COMPILE_OPTIONS: dict[str, dict[str, Any] | None] = {
    "torch.compile": None,
    "torch.compile freezing": {"freezing": True},
}

#: Parts of the network that are exported, with the names of their inputs and outputs.
ONNX_PARTS = {
    "backbone": (("images",), ("feature",)),
    "BiFPN": (("feature",), ("pyramid",)),
    "heads": (("pyramid",), ("class", "box")),
    "network": (("images",), ("class", "box")),
}


class Unavailable(RuntimeError):
    """A rival cannot run here; the message says why."""


def versions() -> dict[str, str]:
    """Installed versions of everything a figure depends on."""
    found = {}
    for package in ("torch", "numpy", "onnx", "onnxruntime", "openvino"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def onnx_runtime(
    path: Path, inputs: Arrays, threads: int, precision: str = "float32"
) -> Callable[[], Arrays]:
    """A call that runs the ONNX file on ONNX Runtime, all optimisations on, without copies.

    Raises:
        Unavailable: ``precision`` is bfloat16 and it has no such convolution.
    """
    import numpy as np
    import onnxruntime as ort

    def options() -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        return options

    if precision != "float32":
        try:
            ort.InferenceSession(_bf16_convolution(), options(), ["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base
            raise Unavailable(str(error).strip()) from error
        raise Unavailable("this benchmark gives ONNX Runtime float32 networks only")
    session = ort.InferenceSession(str(path), options(), ["CPUExecutionProvider"])
    binding = session.io_binding()
    outputs = [np.empty(out.shape, np.float32) for out in session.get_outputs()]
    for bind, described, arrays in (
        (binding.bind_input, session.get_inputs(), inputs),
        (binding.bind_output, session.get_outputs(), outputs),
    ):
        for info, array in zip(described, arrays, strict=True):
            bind(info.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def call(_alive: Arrays = inputs) -> Arrays:  # the binding knows the address of inputs only
        session.run_with_iobinding(binding)
        return outputs

    return call


def _bf16_convolution() -> bytes:
    """The smallest ONNX model with a bfloat16 convolution."""
    from onnx import TensorProto, helper

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.BFLOAT16, shape)

    node = helper.make_node("Conv", ["x", "w"], ["y"])
    inputs = [value("x", 1, 8, 4, 4), value("w", 8, 8, 1, 1)]
    graph = helper.make_graph([node], "conv", inputs, [value("y", 1, 8, 4, 4)])
    opset = [helper.make_opsetid("", 22)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    return bytes(model.SerializeToString())


def openvino(
    path: Path, inputs: Arrays, threads: int, precision: str = "float32"
) -> Callable[[], Arrays]:
    """A call that runs the ONNX file on OpenVINO with its latency settings, without copies.

    Raises:
        Unavailable: it will not compute in ``precision``.
    """
    import numpy as np
    import openvino as ov

    asked = {"float32": "f32", "bfloat16": "bf16"}[precision]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": asked,
    }
    try:
        compiled = ov.Core().compile_model(str(path), "CPU", settings)
    except RuntimeError as error:
        raise Unavailable(str(error).strip().splitlines()[-1]) from error
    chosen = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if chosen != asked:
        raise Unavailable(f"asked for {asked}, it computes in {chosen} on this CPU")
    request = compiled.create_infer_request()
    outputs = [np.empty(tuple(out.shape), np.float32) for out in compiled.outputs]
    for i, array in enumerate(inputs):
        request.set_input_tensor(i, ov.Tensor(array, shared_memory=True))
    for i, array in enumerate(outputs):
        request.set_output_tensor(i, ov.Tensor(array, shared_memory=True))

    def call(_alive: Arrays = inputs) -> Arrays:  # the request knows the address of inputs only
        request.infer(share_inputs=True, share_outputs=True)
        return outputs

    return call


#: How the names of rivals end whose file is an export of effdet's layers.
EFFDET = ", effdet's export"

#: Rivals that run an ONNX file.
ONNX_RIVALS = {
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
    "ONNX Runtime" + EFFDET: onnx_runtime,
    "OpenVINO" + EFFDET: openvino,
}

#: Every rival, in the order of the tables.
RIVALS = ("eager", *COMPILE_OPTIONS, *ONNX_RIVALS)

#: Those that run unless others are asked for.
DEFAULT_RIVALS = ("eager", "torch.compile", *ONNX_RIVALS)


def _resize_for_export(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``reference.resize`` with nearest as one ONNX Resize, which runtimes know how to fuse.

    As written in the reference it becomes two gathers with transposes, several times slower.
    """
    from torch.nn import functional as F

    def resize(x: Tensor, size: tuple[int, int], pool: str = "same") -> Tensor:
        grows = x.shape[-2] <= size[0] and x.shape[-1] <= size[1]
        if grows and tuple(x.shape[-2:]) != tuple(size):
            return F.interpolate(x, size=tuple(size), mode="nearest")
        return original(x, size, pool)

    return resize


def _fold_pads(model: Any) -> None:
    """Writes the −inf padding before each max pool into the pool, where ONNX has it implied."""
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
    constants |= {
        n.output[0]: numpy_helper.to_array(n.attribute[0].t)
        for n in graph.node
        if n.op_type == "Constant" and n.attribute[0].name == "value"
    }
    pads = {n.output[0]: n for n in graph.node if n.op_type == "Pad"}
    for pool in graph.node:
        pad = pads.get(pool.input[0]) if pool.op_type == "MaxPool" else None
        if pad is None or float(constants[pad.input[2]]) != float("-inf"):
            continue
        amounts = [int(n) for n in constants[pad.input[1]]]  # starts of N, C, H, W, then ends
        kept = [a for a in pool.attribute if a.name not in ("pads", "auto_pad")]
        del pool.attribute[:]
        pool.attribute.extend([*kept, helper.make_attribute("pads", amounts[2:4] + amounts[6:])])
        pool.input[0] = pad.input[0]
    used = {name for n in graph.node for name in n.input}
    for pad in pads.values():
        if pad.output[0] not in used:
            graph.node.remove(pad)


def export_parts(
    model: Any, images: Tensor, folder: Path, change: Callable[[Any], None] | None = None
) -> dict[str, Path]:
    """Exports a model, ours or effdet's, to one ONNX file per part.

    The network is exported once, with the maps between its parts as outputs, and cut there.

    Args:
        model: float32, with ``backbone``, ``fpn``, ``class_net`` and ``box_net``.
        images: (N, 3, H, W) float32; the files are for this shape.
        change: what is done to the exported network before it is cut.

    Returns:
        the file of each of :data:`ONNX_PARTS`.
    """
    import onnx
    import onnx.utils
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = model

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            features = self.model.backbone(images)
            pyramid = self.model.fpn(list(features))  # effdet's appends to what it is given
            classes, boxes = self.model.class_net(pyramid), self.model.box_net(pyramid)
            return (*features, *pyramid, *classes, *boxes)

    with torch.no_grad():
        features = model.backbone(images)
        levels = len(model.fpn(list(features)))
        counts = {"images": 1, "feature": len(features)}

        def names(kinds: Sequence[str]) -> list[str]:
            return [f"{kind}{i}" for kind in kinds for i in range(counts.get(kind, levels))]

        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            Network().eval(),
            (images,),
            input_names=names(["images"]),
            output_names=names(("feature", "pyramid", "class", "box")),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    exported = program.model_proto
    if change is not None:
        change(exported)
    extractor = onnx.utils.Extractor(exported)
    files = {}
    for part, (inputs, outputs) in ONNX_PARTS.items():
        files[part] = folder / f"{part}.onnx"
        onnx.save(extractor.extract_model(names(inputs), names(outputs)), files[part])
    return files


def export_onnx(eager: nn.Module, images: Tensor, folder: Path) -> dict[str, Path]:
    """:func:`export_parts` of a model whose layers run (``edet.bench.eager_copy``), for speed."""
    from edet_kernels import reference

    with mock.patch.object(reference, "resize", _resize_for_export(reference.resize)):
        return export_parts(eager, images, folder, _fold_pads)


def export_effdet(python: Path, model: nn.Module, images: Tensor, folder: Path) -> dict[str, Path]:
    """:func:`export_parts` of effdet's own model with the weights of ours.

    Args:
        python: an interpreter that has effdet, onnx and onnxscript (``.venv-peers/bin/python``).
        model: ours, float32, with its ``config``.
        images: as in :func:`export_parts`.

    Raises:
        Unavailable: it cannot be run there.
    """
    import torch

    torch.save(model.state_dict(), folder / "weights.pth")
    config: Any = model.config
    program = Path(__file__).with_name("effdet_onnx.py")
    command = [str(python), str(program), config.name, str(folder), *map(str, images.shape)]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except OSError as error:
        raise Unavailable(f"effdet cannot be run: {error}") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["failed"])[-1]
        raise Unavailable(f"effdet cannot be exported: {last}") from error
    return {part: folder / f"{part}.onnx" for part in ONNX_PARTS}


def compiled(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` under torch.compile with the options of rival ``name``."""
    import torch

    return torch.compile(call, fullgraph=True, options=COMPILE_OPTIONS[name])


def _memory_mib(field: str) -> float:
    """``VmRSS`` or ``VmHWM`` (its largest value so far) of this process in MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def _network_call(spec: dict[str, Any]) -> Callable[[], Callable[[], Any]]:
    """Imports what the rival needs; the function returned then builds its network."""
    import numpy as np

    if spec["rival"] in ONNX_RIVALS:
        importlib.import_module("onnxruntime" if "ONNX" in spec["rival"] else "openvino")
        images = np.zeros((1, 3, *spec["image_size"]), np.float32)
        run = ONNX_RIVALS[spec["rival"]]
        return lambda: run(Path(spec["onnx"]), [images], spec["threads"], spec["dtype"])

    import torch

    import edet
    from edet.bench.variants import eager_copy, prepare

    torch.set_num_threads(spec["threads"])

    def build() -> Callable[[], Any]:
        dtype = getattr(torch, spec["dtype"])
        model: Any = edet.create_model(spec["model"], image_size=tuple(spec["image_size"])).eval()
        model = prepare(model, torch.device("cpu"), dtype)
        model = model.freeze() if spec["rival"] == "ours" else eager_copy(model)
        pixels = torch.zeros(1, 3, *spec["image_size"], dtype=dtype)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        call = (
            compiled(spec["rival"], lambda: model(pixels))
            if spec["rival"] in COMPILE_OPTIONS
            else lambda: model(pixels)
        )
        return torch.inference_mode()(call)

    return build


def main() -> None:
    """Prints one rival's memory as JSON: after its imports, and its peak after 1 and 10 runs."""
    build = _network_call(json.loads(sys.argv[1]))
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    found = {"imports_mib": _memory_mib("VmRSS")}
    call = build()
    call()
    found["once_mib"] = _memory_mib("VmHWM")
    for _ in range(9):
        call()
    found["ten_times_mib"] = _memory_mib("VmHWM")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
