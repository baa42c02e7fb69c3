"""Objects in images, from any kind of image to boxes in its own pixels, as fast as it goes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from edet_kernels.autocast import autocast_dtype
from edet_kernels.backend import choose, settings

from ..fused import cuda_graph as graph
from ..fused.module import FrozenModel
from ..fused.plan import CallList, Plans, Stage
from ..models.configs import checked_size
from ..models.described import is_checkpoint, load_described
from ..models.efficientdet import EfficientDet
from ..models.factory import create_model
from ..models.pretrained import pretrained_file
from .images import ImageLike, as_list, load_image
from .labels import label_map
from .pipeline import Network, Selection, columns, stages
from .postprocess import SCORE_THRESHOLDS
from .preprocess import fit, resize
from .results import Detections
from .stats import Recorder, Stats
from .stream import read_ahead

#: Ops of a whole detector. A CUDA graph cannot hold their references, which wait for the device.
_OPS = ("stem", "mbconv", "lateral", "bifpn", "head", "detect")


class Prediction(NamedTuple):
    """What became of one image of :meth:`Predictor.stream`.

    Attributes:
        image: what was given.
        pixels: the image as it was read, (3, H, W); None when it could not be.
        detections: its objects; None when it could not be read.
        error: why it could not be read, else None.
    """

    image: Any
    pixels: Tensor | None
    detections: Detections | None
    error: Exception | None


class _Image(NamedTuple):
    """An image that was read: as it is, its input to the plan, and how long that took."""

    pixels: Tensor
    prepared: Tensor | graph.Upload
    seconds: float

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[2]


class Predictor:
    """An EfficientDet with the pre- and post-processing it was published with.

    >>> predictor = Predictor("tf_efficientdet_d0", "tf_efficientdet_d0.pth")  # doctest: +SKIP
    >>> predictor("street.jpg").names  # doctest: +SKIP
    ['car', 'car', 'person']
    >>> predictor = edet.Predictor("run/best.pt")  # doctest: +SKIP
    >>> predictor = edet.Predictor("edet_lite0_person")  # doctest: +SKIP

    Shapes are planned: the first batch of a shape runs as it is, from the second on its operator
    calls are replayed without the model's Python. On a GPU pre-processing, network and
    post-processing of a shape are one CUDA graph with buffers of its own. A shape is, on a GPU, the
    sizes of the images of a batch; elsewhere, the number of them: they are resized beforehand. A
    batch is never filled up, so that each number of images is a shape of its own. The ``max_plans``
    shapes used last are kept.

    The model is frozen (:meth:`EfficientDet.freeze`), also when it was frozen before; tensors made
    in inference mode are replaced by copies with a version. Everything is planned anew once its
    weights are written to, its layers or their attributes exchanged or it is moved. Two kinds of
    writes cannot be seen, those through ``parameter.data`` and through NumPy: make a new predictor
    after them, or call ``repack()`` of the part. With forward hooks in the model nothing is
    planned: its layers run.

    Several threads may call one predictor. On a GPU their calls take turns; each runs on the
    thread's current stream.

    Args:
        model: a model from :func:`edet.create_model`, used as it is, put in eval mode and frozen;
            or the name of one, which requires ``checkpoint`` (``edet_lite0_person`` has its own
            weights); or a file that says which model it
            is of, as training writes it: class names and image size are then the file's.
        checkpoint: file of the weights for a model given by name.
        num_classes: classes of a model given by name.
        score_threshold: objects with a score at or below it are left out.
        nms: ``hard``, or ``gaussian`` for soft-NMS.
        iou_threshold: ``hard`` drops boxes of a class that overlap a better one more than this.
        sigma: width of the decay of ``gaussian``.
        max_detections: most objects per image.
        class_agnostic: boxes of all classes suppress each other, not only those of one class.
        image_size: (H, W) of the network's input, or one number for both; the model's own when
            None.
        class_names: names of labels 1, 2, …, or label to name; COCO's for 90 classes when None.
        batch_size: images that go through the network at once.
        max_plans: shapes that are kept planned.
        device, dtype: where and in which precision to run; as the model is when None.

    Raises:
        ValueError: unknown model, model by name without checkpoint, option out of range.
        TypeError: ``model`` is neither a model nor a name.
    """

    def __init__(
        self,
        model: EfficientDet | str | os.PathLike[str],
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        num_classes: int = 90,
        score_threshold: float = 0.3,
        nms: str = "hard",
        iou_threshold: float = 0.5,
        sigma: float = 0.5,
        max_detections: int = 100,
        class_agnostic: bool = False,
        image_size: int | tuple[int, int] | None = None,
        class_names: Mapping[int, str] | Sequence[str] | None = None,
        batch_size: int = 8,
        max_plans: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if nms not in SCORE_THRESHOLDS:
            raise ValueError(f"nms must be one of {', '.join(SCORE_THRESHOLDS)}, got {nms!r}")
        for name, value in (("score_threshold", score_threshold), ("iou_threshold", iou_threshold)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        counts = {
            "batch_size": batch_size,
            "max_detections": max_detections,
            "max_plans": max_plans,
        }
        for name, number in counts.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if isinstance(model, str) and checkpoint is None:
            model = pretrained_file(model) or model
        if isinstance(model, str | os.PathLike) and is_checkpoint(model):
            if checkpoint is not None:
                raise ValueError("checkpoint must be None when model is a checkpoint itself")
            model, description = load_described(model)
            class_names = class_names or description.class_names or None
        elif isinstance(model, str):
            if checkpoint is None:
                raise ValueError(
                    "checkpoint must be given with a model name; for random weights pass "
                    f"create_model({model!r}) itself"
                )
            model = create_model(model, num_classes=num_classes, checkpoint=checkpoint)
        elif not isinstance(model, EfficientDet):
            raise TypeError(
                f"model must be an EfficientDet or a model name, got {type(model).__name__}"
            )
        elif checkpoint is not None:
            raise ValueError("checkpoint must be None when model is not a name: load it first")
        config = model.config
        self.image_size = checked_size(config.image_size if image_size is None else image_size)
        self.label_names = label_map(class_names, config.num_classes)
        self.score_threshold = score_threshold
        self.nms = nms
        self.iou_threshold = iou_threshold
        self.sigma = sigma
        self.max_detections = max_detections
        self.class_agnostic = class_agnostic
        self.batch_size = batch_size
        if device is not None or dtype is not None:  # which thaws a frozen model
            model.to(device=device, dtype=dtype)
        self.model = model.eval()
        self._begin(max_plans)

    def _begin(self, max_plans: int) -> None:
        """Freezes the model, without any plan or figure so far."""
        self._frozen = FrozenModel(self.model)
        self._lock = threading.Lock()
        # a shape without a plan was seen once
        self._plans: Plans[CallList | graph.Graph] = Plans(max_plans)
        self._recorder = Recorder()
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        """The model and the options: a copy, or a pickle in another process, plans by itself."""
        kept = {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "network"}
        return {**kept, "max_plans": self.max_plans}

    def __setstate__(self, state: dict[str, Any]) -> None:
        max_plans = state.pop("max_plans")
        vars(self).update(state)
        self._begin(max_plans)

    @overload
    def __call__(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        image_size: int | tuple[int, int] | None = None,
    ) -> list[Detections]: ...
    @overload
    def __call__(
        self, images: ImageLike, *, image_size: int | tuple[int, int] | None = None
    ) -> Detections: ...
    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        image_size: int | tuple[int, int] | None = None,
    ) -> Detections | list[Detections]:
        """Detects objects in one image or in each of a list (or of a 4-dimensional batch).

        Args:
            images: see :func:`edet.preprocess.load_image` for the kinds.
            image_size: (H, W) of the network's input; the predictor's own when None.

        Returns:
            the objects of the image, on the CPU; a list of them for a list.

        Raises:
            ImageError (a ValueError), TypeError, FileNotFoundError: an image that cannot be used.
            ValueError: the model was put into training mode, or a bad ``image_size``.
        """
        size = self.image_size if image_size is None else checked_size(image_size)
        many, single = as_list(images)
        self._refresh()
        results: list[Detections] = []
        for start in range(0, len(many), self.batch_size):
            chunk = many[start : start + self.batch_size]
            names = ["image" if single else f"images[{start + i}]" for i in range(len(chunk))]
            results += self._detect(
                [self._read(im, name, size) for im, name in zip(chunk, names, strict=True)], size
            )
        return results[0] if single else results

    def stream(
        self,
        images: Iterable[ImageLike],
        *,
        image_size: int | tuple[int, int] | None = None,
        workers: int = 2,
    ) -> Iterator[Prediction]:
        """Detects objects in one image after the other, reading ahead of the network.

        ``workers`` threads read and resize (to a GPU: upload) images while the network computes:
        :func:`edet.detection.stream.read_ahead`. One that cannot be read is reported in its place.

        Args:
            images: any iterable, also an endless one; see :func:`edet.preprocess.load_image`.
            image_size: (H, W) of the network's input; the predictor's own when None.
            workers: threads that read.

        Yields:
            a :class:`Prediction` for each image, in order.

        Raises:
            ValueError: ``workers`` below 1, a bad ``image_size``, or the model is in training mode.
            Exception: whatever iterating over ``images`` raises, after what came before it.
        """
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        size = self.image_size if image_size is None else checked_size(image_size)
        self._refresh()
        return self._stream(images, size, workers)

    def _stream(
        self, images: Iterable[ImageLike], size: tuple[int, int], workers: int
    ) -> Iterator[Prediction]:
        def read(i: int, image: ImageLike) -> _Image:
            return self._read(image, f"images[{i}]", size)

        for batch in read_ahead(images, read, workers, self.batch_size):
            good = [x for _, x in batch if isinstance(x, _Image)]
            found = iter(self._detect(good, size) if good else [])
            for image, x in batch:
                if isinstance(x, Exception):
                    yield Prediction(image, None, None, x)
                else:
                    yield Prediction(image, x.pixels, next(found), None)

    def warm_up(
        self,
        size: tuple[int, int] | None = None,
        batch_size: int = 1,
        *,
        image_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Plans batches of ``batch_size`` images, so that the first ones take no longer.

        Args:
            size: (height, width) of the images; that of the network's input when None. Elsewhere
                than on a GPU it makes no difference.
            batch_size: images at once.
            image_size: (H, W) of the network's input; the predictor's own when None.
        """
        height, width = checked_size(size or image_size or self.image_size)
        if not 1 <= batch_size <= self.batch_size:
            raise ValueError(f"batch_size must be 1 to {self.batch_size}, got {batch_size}")
        for _ in range(2):
            self(
                torch.zeros(batch_size, 3, height, width, dtype=torch.uint8, device="cpu"),
                image_size=image_size,
            )

    def stats(self) -> Stats:
        """Images and batches so far, latency percentiles of each stage, plans and memory."""
        return self._recorder.stats(len(self._plans.values()), self.device)

    @property
    def max_plans(self) -> int:
        """Shapes that are kept planned."""
        return self._plans.most

    @max_plans.setter
    def max_plans(self, most: int) -> None:
        self._plans.most = most

    def _refresh(self) -> None:
        """Freezes the model and forgets all plans, if it is not the frozen one they are made of."""
        if self.model.training:
            raise ValueError("model must be in eval mode: call model.eval()")
        if self._frozen.stale():
            with self._lock:
                self._frozen.renew()
                self._prepare()

    def _prepare(self) -> None:
        """Makes what follows from the model's weights, device and dtype; without any plans."""
        self.network = Network(self.model, self._frozen.runs_python)
        self.device, self.dtype = self.network.device, self.network.dtype
        self._captures = graph.captures(self.device)
        if self._captures:
            self._pool = graph.cuda.graph_pool_handle()
            self._uploads = graph.cuda.Stream(self.device)
        self._plans.clear()

    def _read(self, image: ImageLike, name: str, size: tuple[int, int]) -> _Image:
        """Reads an image; for a CPU resizes it, to a GPU begins to bring it."""
        start = time.perf_counter()
        pixels = load_image(image, name)
        prepared: Tensor | graph.Upload = pixels
        if not self._captures:
            prepared = resize(pixels, fit((pixels.shape[1], pixels.shape[2]), size)[1])
        if pixels.device.type == "cpu" and self._captures:
            prepared = graph.Upload(pixels, self.device, self._uploads)
        return _Image(pixels, prepared, time.perf_counter() - start)

    @torch.no_grad()
    def _detect(self, images: list[_Image], size: tuple[int, int]) -> list[Detections]:
        start = time.perf_counter()
        inputs = [
            x.prepared.result() if isinstance(x.prepared, graph.Upload) else x.prepared
            for x in images
        ]
        selection = Selection(
            self.score_threshold,
            self.nms,
            self.iou_threshold,
            self.sigma,
            self.max_detections,
            self.class_agnostic,
        )
        with graph.cuda.device(self.device) if self._captures else nullcontext():
            sizes = [x.size for x in images]
            make: Callable[[], Sequence[Stage]] = partial(
                stages, self.network, sizes, size, selection
            )
            if not self._captures:  # images of all sizes share a plan
                prepare, *rest = make()
                inputs, make = prepare([x.to(self.device) for x in inputs]), partial(tuple, rest)
            before = time.perf_counter() - start
            key = (
                size,
                selection,
                settings(),
                autocast_dtype(self.network.mean),
                self._frozen.runs_python(),
                *((x.shape, x.dtype) for x in inputs),
            )
            found, seconds = self._run(key, make, inputs)
        results = [
            Detections(*columns(rows), image.size, self.label_names)
            for image, rows in zip(images, found, strict=True)
        ]
        read = sum(x.seconds for x in images)
        total = read + time.perf_counter() - start
        times = (read + before + sum(seconds[:-2]), *seconds[-2:], total) if seconds else ()
        self._recorder.add(len(images), times)
        return results

    def _run(
        self, key: Hashable, make: Callable[[], Sequence[Stage]], inputs: list[Tensor]
    ) -> tuple[Tensor, list[float]]:
        """The rows that the stages make of the inputs, and seconds of each stage once planned.

        ``make`` gives the stages, which a plan needs no more.
        """
        with self._lock:
            seen, plan = self._plans.find(key)
            counts = plan is not None
            if plan is None:
                row = make()
                if seen:
                    plan = self._planned(row, inputs)
            self._plans.keep(key, plan)
            if plan is None:
                values = inputs
                for stage in row:
                    values = stage(values)
                return values[0].cpu(), []
            if isinstance(plan, graph.Graph):  # its buffers serve one call at a time
                [rows], seconds = plan(inputs)
                return rows, seconds if counts else []
        [rows], seconds = plan(inputs)
        return rows.cpu(), seconds if counts else []

    def _planned(self, row: Sequence[Stage], inputs: list[Tensor]) -> CallList | graph.Graph | None:
        if self._frozen.runs_python():
            return None
        if not self._captures:
            return CallList(row, inputs)
        choices = [choose(op, self.device, self.dtype) for op in _OPS]
        if any(choice.backend == "reference" for choice in choices):
            return None
        return graph.Graph(row, inputs, self._pool)
