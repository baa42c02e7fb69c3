"""One model on a CPU: the calls of every variant of each stage, and whether they are right."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

import edet_kernels
from benchmarks import rivals
from edet import EfficientDet, create_model
from edet.bench.result import OURS
from edet.bench.table import PAIRS
from edet.bench.variants import (
    eager_copy,
    node_calls,
    part_calls,
    predictor_calls,
    prepare,
    set_batch_norms,
)
from edet.detection.anchors import model_anchors
from edet.detection.postprocess import postprocess
from edet_kernels.testing.numeric import (
    OP_FACTOR,
    CheckFailed,
    check_detections,
    check_errors,
    relative_difference,
)
from edet_kernels.testing.timing import Call

#: Names on the command line and in the tables.
STAGES = {
    "bifpn": "BiFPN",
    "heads": "heads",
    "backbone": "backbone",
    "network": "network",
    "post": "post-processing",
    "network+post": "network + post-processing",
    "nodes": "BiFPN nodes",
    "predictor": "predictor",
}

#: ``edet.bench`` has another name for the network.
PART_OF_BENCH = {"network": "whole"}


def log(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


#: Times eager's error that the backbone or the whole network may differ by. In a deep chain the
#: layers amplify the first rounding errors all together, so that eager's own error differs tenfold
#: from one set of random weights to another (D0's network: 3.8e-6 and 3.7e-5 with seeds 0 and 1;
#: ours 1.0e-5 and 7.0e-6). Each op is held to its own factor by its tests; a chain is only to show
#: that they are put together rightly. A rival beyond the limit is left out of the row, with the
#: reason.
CHAIN_FACTOR = 8


def factor_of(stage: str) -> float:
    """Times eager's error that a stage may differ by from the float64 reference."""
    return CHAIN_FACTOR if stage in ("backbone", "network", "predictor") else OP_FACTOR


@dataclass
class Case:
    """One model in one dtype, its inputs, and the calls of every variant on them."""

    ours: EfficientDet
    eager: EfficientDet
    images: Tensor
    threads: int
    folder: Path
    effdet: Path | None = None  # an interpreter that has it

    @classmethod
    def create(cls, model: str, size: int | None, dtype: torch.dtype, threads: int,
               folder: Path, *, batch: int = 1, effdet: Path | None = None) -> Case:  # fmt: skip
        """A model with random weights and images of noise.

        Not for inference mode: its tensors have no version, so that a model made of them cannot
        know that its packed weights are still right and packs them in every call.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("a case must be created outside inference mode")
        torch.manual_seed(0)
        ours = create_model(model, image_size=size).eval()
        images = torch.randn(batch, 3, *ours.config.image_size)
        set_batch_norms(ours, images)
        ours = prepare(ours, torch.device("cpu"), dtype)
        images = images.to(dtype, memory_format=torch.channels_last)
        return cls(ours.freeze(), eager_copy(ours), images, threads, folder, effdet)

    @property
    def dtype(self) -> torch.dtype:
        return self.images.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        """Model, dtype and batch."""
        return f"{self.ours.config.name}, {self.dtype_name}, batch {len(self.images)}"

    @cached_property
    @torch.inference_mode()
    def features(self) -> list[Tensor]:
        return self.eager.backbone(self.images)

    @cached_property
    @torch.inference_mode()
    def pyramid(self) -> list[Tensor]:
        return self.eager.fpn(self.features)

    @cached_property
    @torch.inference_mode()
    def head_outputs(self) -> list[Tensor]:
        return self.part("network", self.eager)()

    @cached_property
    def onnx_files(self) -> dict[str, Path]:
        """The eager model with the weights of this dtype, in float32, as ONNX files."""
        log(f"{self.title}: exporting to ONNX")
        eager = copy.deepcopy(self.eager).float()
        return rivals.export_onnx(eager, self.images.float().contiguous(), self.folder)

    @cached_property
    def effdet_files(self) -> dict[str, Path]:
        """:attr:`onnx_files` of effdet's layers.

        Raises:
            Unavailable: there is no effdet, or it cannot be exported.
        """
        if self.effdet is None:
            raise rivals.Unavailable("no Python with effdet was given: see --effdet")
        log(f"{self.title}: exporting effdet to ONNX")
        folder = self.folder / "effdet"
        folder.mkdir(exist_ok=True)
        eager = copy.deepcopy(self.eager).float()
        return rivals.export_effdet(self.effdet, eager, self.images.float(), folder)

    def onnx_file(self, name: str, part: str) -> Path:
        """The file that an ONNX rival runs for a part of the network."""
        files = self.effdet_files if name.endswith(rivals.EFFDET) else self.onnx_files
        return files[part]

    def part(self, stage: str, model: EfficientDet) -> Call:
        """The call of a network stage on ``model``, whose parameters may be of another dtype."""
        dtype = next(model.parameters()).dtype
        calls = part_calls(
            model,
            self.images.to(dtype),
            [x.to(dtype) for x in self.features],
            [x.to(dtype) for x in self.pyramid] if stage == "heads" else self.pyramid,
        )
        name = STAGES[stage]
        return calls[PART_OF_BENCH.get(name, name)]

    @cached_property
    def anchors(self) -> Tensor:
        return model_anchors(self.ours.config)

    def detections(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Post-processing of the network's outputs."""
        config = self.ours.config
        classes, boxes = outputs[: config.levels], outputs[config.levels :]
        return list(postprocess(classes, boxes, self.anchors, sizes=[config.image_size]))

    def reference_detections(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """:meth:`detections` by the reference in PyTorch."""
        with edet_kernels.backend("reference"):
            return self.detections(outputs)

    def call(self, name: str, stage: str) -> Call:
        """The call of one variant.

        Raises:
            Unavailable: the rival cannot run this stage or dtype.
        """
        if stage == "post":
            detect = self.detections if name == OURS else self.reference_detections
            return lambda: detect(self.head_outputs)
        if name == OURS:
            return self.part(stage, self.ours)
        if name == "eager":
            return self.part(stage, self.eager)
        if name in rivals.COMPILE_OPTIONS:
            return rivals.compiled(name, self.part(stage, self.eager))
        given = {"BiFPN": self.features, "heads": self.pyramid}.get(STAGES[stage], [self.images])
        arrays = [x.float().contiguous().numpy() for x in given]
        file = self.onnx_file(name, STAGES[stage])
        run = rivals.ONNX_RIVALS[name](file, arrays, self.threads, self.dtype_name)
        return lambda: [torch.from_numpy(array) for array in run()]

    @torch.inference_mode(False)  # see create
    @torch.no_grad()
    def pair(self, stage: str) -> tuple[dict[str, Call], dict[str, float]]:
        """The calls of one of ``edet.bench.PAIRS`` and their errors.

        Raises:
            CheckFailed: they compute something else than the reference.
        """
        what = f"{self.ours.config.name}, {self.dtype_name}, {stage}"
        if stage == "predictor":
            try:
                calls, error, eager = predictor_calls(
                    self.ours, self.eager, self.ours.config.image_size, len(self.images)
                )
            except CheckFailed as failed:
                raise CheckFailed(f"{what}: {failed}") from failed
            errors = dict.fromkeys(calls, error)
            check_errors(what, errors, eager, self.dtype, factor=factor_of(stage))
            return calls, errors
        features = [x.clone() for x in self.features]
        calls = node_calls(self.ours.fpn, features)
        exact = self.part("bifpn", copy.deepcopy(self.eager).double())()
        eager = relative_difference(self.part("bifpn", self.eager)(), exact)
        errors = {name: relative_difference(call(), exact) for name, call in calls.items()}
        check_errors(what, errors, eager, self.dtype, factor=factor_of(stage))
        return calls, errors

    @torch.inference_mode()
    def checked_calls(
        self, stage: str, names: Sequence[str]
    ) -> tuple[dict[str, Call], dict[str, float], dict[str, str]]:
        """The calls of the variants that run, their errors, and why the others do not.

        Raises:
            CheckFailed: ours or eager computes something else.
        """
        if STAGES[stage] in PAIRS:
            return *self.pair(stage), {}
        if stage == "network+post":
            return self._with_detections(*self.checked_calls("network", names))
        calls: dict[str, Call] = {}
        unavailable: dict[str, str] = {}
        if stage == "post":  # the others have none of their own
            names = [name for name in names if name in (OURS, "eager")]
        outputs: dict[str, list[Tensor]] = {}
        for name in names:
            try:
                calls[name] = self.call(name, stage)
                outputs[name] = [x.clone() for x in calls[name]()]
            except Exception as error:
                if name == OURS:
                    raise
                calls.pop(name, None)
                unavailable[name] = str(error) or type(error).__name__
                log(f"  {name} is not available: {unavailable[name].splitlines()[0]}")
        if stage == "post":
            right = self.reference_detections(self.head_outputs)
            for name, found in outputs.items():
                check_detections(f"{name}, {stage}", found, right)
            return calls, {}, unavailable
        exact = self.part(stage, copy.deepcopy(self.eager).double())()
        eager = relative_difference(self.part(stage, self.eager)(), exact)
        errors = {name: relative_difference(found, exact) for name, found in outputs.items()}
        factor = factor_of(stage)
        what = f"{self.ours.config.name}, {self.dtype_name}, {stage}"
        for name in [n for n in calls if n not in (OURS, "eager")]:
            try:
                check_errors(what, {name: errors[name]}, eager, self.dtype, factor=factor)
            except CheckFailed as error:
                unavailable[name] = str(error)
                log(f"  {error}")
                del calls[name], errors[name]
        check_errors(what, errors, eager, self.dtype, factor=factor)
        return calls, errors, unavailable

    def _then_detections(self, network: Call) -> Call:
        return lambda: self.detections(network())

    @torch.inference_mode()
    def _with_detections(
        self, networks: dict[str, Call], _: dict[str, float], unavailable: dict[str, str]
    ) -> tuple[dict[str, Call], dict[str, float], dict[str, str]]:
        """Our post-processing after each checked network, checked on that network's own outputs."""
        calls = {}
        for name, network in networks.items():
            raw = [x.clone() for x in network()]
            try:
                right = self.reference_detections(raw)
                check_detections(f"{name}, network+post", self.detections(raw), right)
            except CheckFailed as error:
                if name in (OURS, "eager"):
                    raise
                unavailable[name] = str(error)
                log(f"  {error}")
                continue
            calls[name] = self._then_detections(network)
        return calls, {}, unavailable
