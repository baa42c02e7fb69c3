"""Objects in images, from any kind of image to boxes in its own pixels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch

from .anchors import generate_anchors
from .efficientdet import EfficientDet, create_model
from .labels import label_map
from .postprocess import SCORE_THRESHOLDS, postprocess
from .preprocess import ImageLike, as_list, load_image, preprocess
from .results import Detections


class Detector:
    """An EfficientDet with the pre- and post-processing it was published with.

    >>> detector = Detector("tf_efficientdet_d0", "tf_efficientdet_d0.pth")  # doctest: +SKIP
    >>> detector("street.jpg").names  # doctest: +SKIP
    ['car', 'car', 'person']

    Args:
        model: a model from :func:`edet.create_model`, used as it is and put in eval mode; or the
            name of one, which requires ``checkpoint``.
        checkpoint: file of the weights for a model given by name.
        num_classes: classes of a model given by name.
        score_threshold: objects with a score at or below it are left out.
        nms: ``hard``, or ``gaussian`` for soft-NMS.
        iou_threshold: ``hard`` drops boxes of a class that overlap a better one more than this.
        sigma: width of the decay of ``gaussian``.
        max_detections: most objects per image.
        image_size: (H, W) of the network's input; the model's own when None.
        class_names: names of labels 1, 2, …, or label to name; COCO's for 90 classes when None.
        batch_size: images that go through the network at once.
        device, dtype: where and in which precision to run; as the model is when None.

    Raises:
        ValueError: unknown model, model by name without checkpoint, option out of range.
        TypeError: ``model`` is neither a model nor a name.
    """

    def __init__(
        self,
        model: EfficientDet | str,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        num_classes: int = 90,
        score_threshold: float = 0.3,
        nms: str = "hard",
        iou_threshold: float = 0.5,
        sigma: float = 0.5,
        max_detections: int = 100,
        image_size: tuple[int, int] | None = None,
        class_names: Mapping[int, str] | Sequence[str] | None = None,
        batch_size: int = 8,
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
        for name, number in (("batch_size", batch_size), ("max_detections", max_detections)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
            raise ValueError(f"image_size must be two positive integers (H, W), got {image_size}")
        if isinstance(model, str):
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
        self.model = model.to(device=device, dtype=dtype).eval()
        config = model.config
        self.image_size = config.image_size if image_size is None else image_size
        self.label_names = label_map(class_names, config.num_classes)
        self.score_threshold = score_threshold
        self.nms = nms
        self.iou_threshold = iou_threshold
        self.sigma = sigma
        self.max_detections = max_detections
        self.batch_size = batch_size

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[Detections]: ...
    @overload
    def __call__(self, images: ImageLike) -> Detections: ...
    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Detections | list[Detections]:
        """Detects objects in one image or in each of a list (or of a 4-dimensional batch).

        Args:
            images: see :func:`edet.preprocess.load_image` for the kinds.

        Returns:
            the objects of the image, on the CPU; a list of them for a list.

        Raises:
            ImageError (a ValueError), TypeError, FileNotFoundError: an image that cannot be used.
            ValueError: the model was put into training mode.
        """
        if self.model.training:
            raise ValueError("model must be in eval mode: call model.eval()")
        many, single = as_list(images)
        results: list[Detections] = []
        for start in range(0, len(many), self.batch_size):
            chunk = many[start : start + self.batch_size]
            names = ["image" if single else f"images[{start + i}]" for i in range(len(chunk))]
            loaded = [load_image(im, name) for im, name in zip(chunk, names, strict=True)]
            results += self._detect(loaded)
        return results[0] if single else results

    @torch.no_grad()
    def _detect(self, images: list[torch.Tensor]) -> list[Detections]:
        config = self.model.config
        parameter = next(self.model.parameters())
        batch = preprocess(
            images,
            self.image_size,
            mean=config.mean,
            std=config.std,
            device=parameter.device,
            dtype=parameter.dtype,
        )
        anchors = generate_anchors(
            self.image_size,
            min_level=config.min_level,
            max_level=config.max_level,
            num_scales=config.num_scales,
            aspect_ratios=config.aspect_ratios,
            anchor_scale=config.anchor_scale,
            device=parameter.device,
        )
        class_outputs, box_outputs = self.model(batch.images)
        outputs = postprocess(
            class_outputs,
            box_outputs,
            anchors,
            sizes=batch.sizes,
            scales=batch.scales,
            method=self.nms,
            iou_threshold=self.iou_threshold,
            sigma=self.sigma,
            score_threshold=self.score_threshold,
            max_detections=self.max_detections,
        )
        boxes, scores, labels, counts = (x.cpu() for x in outputs)
        return [
            Detections(boxes[i, :n], scores[i, :n], labels[i, :n], size, self.label_names)
            for i, (n, size) in enumerate(zip(counts.tolist(), batch.sizes, strict=True))
        ]
