"""Post-training quantisation of a detector to int8: calibrated on images, its error per layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..fused.int8 import Int8Backbone, Int8Head, Int8Nodes
from ..fused.module import PackedModule
from ..fused.packed import PackedBackbone, PackedHead, PackedNodes
from ..fused.ranges import METHODS, Int8, Observer, signal_to_noise
from ..models.configs import checked_size
from ..models.efficientdet import EfficientDet
from ..models.efficientnet import EfficientNet
from .images import ImageLike, as_list
from .preprocess import preprocess

#: The parts of a model that are quantised, and what computes each.
PARTS = {"backbone": Int8Backbone, "fpn": Int8Nodes, "class_net": Int8Head, "box_net": Int8Head}


@dataclass(frozen=True)
class LayerError:
    """How far a layer's map is from the float model's, in decibels of signal over noise."""

    name: str
    decibels: float


@dataclass(frozen=True)
class Int8Report:
    """The error of each layer, in the order they run; ``print`` it."""

    layers: tuple[LayerError, ...]

    def worst(self, count: int = 5) -> tuple[LayerError, ...]:
        """The layers of the least signal over noise: what to keep in float first."""
        return tuple(sorted(self.layers, key=lambda layer: layer.decibels)[:count])

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        rows = [f"{layer.name:<{width}}  {layer.decibels:5.1f} dB" for layer in self.layers]
        return "\n".join(["signal over noise of each layer's map", *rows])


def _batches(
    model: EfficientDet,
    images: ImageLike | Sequence[ImageLike],
    image_size: int | tuple[int, int] | None,
    batch_size: int,
) -> Iterator[Tensor]:
    config = model.config
    size = checked_size(config.image_size if image_size is None else image_size)
    many, _ = as_list(images)
    for start in range(0, len(many), batch_size):
        chunk = many[start : start + batch_size]
        yield preprocess(chunk, size, mean=config.mean, std=config.std).images


def _part(model: EfficientDet, name: str) -> PackedModule:
    return cast(PackedModule, getattr(model, name))


def _watch(
    model: EfficientDet,
    packed: dict[str, Any],
    images: Tensor,
    see: Callable[[str, str, Tensor, bool], None],
) -> None:
    """Runs the float model and shows the maps of each part that is to be quantised."""

    def of(part: str) -> Callable[[str, Tensor, bool], None]:
        return lambda name, x, per_channel: see(part, name, x, per_channel)

    def run(part: str, maps: Any) -> list[Tensor]:
        if part in packed:
            return PARTS[part].watch(packed[part], maps, of(part))  # type: ignore[attr-defined]
        return cast("list[Tensor]", getattr(model, part)(maps))

    pyramid = run("fpn", run("backbone", images))
    run("class_net", pyramid)
    run("box_net", pyramid)


def _kept(model: EfficientDet, keep: Sequence[str]) -> dict[str, tuple[str, ...] | None]:
    """What each part keeps in float, by the names of :class:`Int8`; None: all of it.

    Raises:
        ValueError: there is no such layer.
    """
    if isinstance(keep, str):
        raise TypeError(f"keep must be a list of names, got the string {keep!r}")
    blocks: dict[str, list[str]] = {}
    if isinstance(model.backbone, EfficientNet):
        number = 0
        for i, stage in enumerate(model.backbone.stages()):
            for j in range(len(stage)):
                blocks.setdefault(f"backbone.blocks.{i}", []).append(str(number))
                blocks[f"backbone.blocks.{i}.{j}"] = [str(number)]
                number += 1
    found: dict[str, tuple[str, ...] | None] = dict.fromkeys(PARTS, ())
    for name in keep:
        part, _, rest = name.partition(".")
        own = found.get(part)
        if name in PARTS:
            found[name] = None
        elif name in blocks:
            found["backbone"] = None if own is None else (*own, *blocks[name])
        elif part in ("class_net", "box_net") and rest == "predict":
            found[part] = None if own is None else (*own, "predict")
        else:
            raise ValueError(
                f"keep must name {', '.join(PARTS)}, backbone.blocks.STAGE, "
                "backbone.blocks.STAGE.BLOCK, class_net.predict or box_net.predict of this "
                f"{model.config.name}, got {name!r}"
            )
    return found


def _check(model: Any, method: str, percentile: float, batch_size: int) -> None:
    if not isinstance(model, EfficientDet):
        raise TypeError(f"model must be an EfficientDet, got {type(model).__name__}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile must be in (50, 100], got {percentile}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        raise ValueError(
            "model must be on the CPU in float32, where the int8 kernels are, got "
            f"{parameter.dtype} on {parameter.device}"
        )


def quantize(
    model: EfficientDet,
    images: ImageLike | Sequence[ImageLike],
    *,
    method: str = "mse",
    percentile: float = 99.99,
    keep: Sequence[str] = (),
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 8,
) -> EfficientDet:
    """A copy of ``model`` that computes on bytes in eval mode without gradients, on the CPU.

    Weights are rounded to int8 for each output channel, maps to uint8 by ranges that ``images``
    show. Swish, squeeze-excite's gate and the sums of fused maps are computed from int32 sums in
    float32 and rounded once. The stem, which reads the pixels, is float; so are the predictions.
    The weights in the copy stay float: it can be trained, saved (:func:`edet.save_described`,
    with its ranges) and quantised again.

    Args:
        model: on the CPU, in float32; it stays as it is.
        images: some tens of the images that will be seen; see :func:`edet.preprocess.load_image`.
        method: how a range is found: ``mse`` (the least mean squared error of the rounded values),
            ``percentile`` or ``minmax``.
        percentile: of the values that are inside a range, for that method.
        keep: what stays in float: ``backbone``, ``fpn``, ``class_net``, ``box_net``,
            ``backbone.blocks.STAGE``, ``backbone.blocks.STAGE.BLOCK``, ``class_net.predict``,
            ``box_net.predict``.
        image_size: (H, W) that images are resized to; the model's own when None.
        batch_size: images at once.

    Raises:
        TypeError, ValueError: a bad argument, or a part that has no int8 form and is not kept.
        ImageError (a ValueError), FileNotFoundError: an image that cannot be read.
    """
    _check(model, method, percentile, batch_size)
    kept = _kept(model, keep)
    result = copy.deepcopy(model).unfreeze().eval()
    for name in PARTS:
        part = getattr(result, name)
        if isinstance(part, PackedModule):
            part.int8 = None
    as_list(images)  # before the work
    with torch.no_grad():
        packed = {
            name: _float_weights(result, name) for name, own in kept.items() if own is not None
        }
        observer = {name: Observer() for name in packed}

        def see(part: str, name: str, x: Tensor, per_channel: bool) -> None:
            observer[part].see(name, x, per_channel)

        for counting in (False, True):
            for own in observer.values():
                own.counting = counting
            for batch in _batches(result, images, image_size, batch_size):
                _watch(result, packed, batch, see)
        for name, own in observer.items():
            ranges = own.ranges(method, percentile)
            for key, ends in ranges.items():
                if not bool(ends.isfinite().all()):
                    raise ValueError(
                        f"the maps of model must be finite, got others in {name}, {key}"
                    )
            _part(result, name).int8 = Int8(ranges, own.means(), kept[name] or ())
    for name in packed:
        _part(result, name).repack()
    return result


def _float_weights(model: EfficientDet, name: str) -> PackedBackbone | PackedNodes | PackedHead:
    """The packed float weights of a part, where it has an int8 form."""
    part = getattr(model, name)
    if not isinstance(part, PackedModule) or (
        name == "backbone" and not isinstance(part, EfficientNet)
    ):
        raise ValueError(f"{name} has no int8 form: keep it in float, by keep=[{name!r}, …]")
    part.check_layers()
    packed: PackedBackbone | PackedNodes | PackedHead = part.pack(torch.float32)
    if isinstance(packed, PackedNodes) and (packed.pool == "zero" or packed.above):
        raise ValueError(f"{name} has no int8 form: keep it in float, by keep=[{name!r}, …]")
    return packed


def is_quantized(model: EfficientDet) -> bool:
    """Whether any part of ``model`` computes on bytes."""
    return any(getattr(getattr(model, name), "int8", None) is not None for name in PARTS)


def int8_errors(
    model: EfficientDet,
    images: ImageLike | Sequence[ImageLike],
    *,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 8,
) -> Int8Report:
    """How far each layer of a quantised model is from its own float weights, on ``images``.

    Each layer reads what the quantised layers before it made, so that errors add up on the way.

    Raises:
        ValueError: ``model`` is not quantised.
    """
    if not isinstance(model, EfficientDet) or not is_quantized(model):
        raise ValueError("model must be a result of edet.quantize")
    plain = copy.deepcopy(model).unfreeze().eval()
    runs: dict[str, Any] = {}
    packed: dict[str, Any] = {}
    with torch.no_grad():
        for name in PARTS:
            part = getattr(plain, name)
            settings = part.int8 if isinstance(part, PackedModule) else None
            if settings is not None:
                part.int8 = None
                packed[name] = _float_weights(plain, name)
                runs[name] = PARTS[name](packed[name], settings)
        exact: dict[str, list[Tensor]] = {}
        found: dict[str, list[Tensor]] = {}

        def see_exact(part: str, name: str, x: Tensor, per_channel: bool) -> None:
            if not per_channel:
                exact.setdefault(f"{part}.{name}", []).append(x)

        def run(part: str, maps: Any) -> list[Tensor]:
            if part not in runs:
                return cast("list[Tensor]", getattr(plain, part)(maps))

            def see(name: str, x: Tensor, per_channel: bool) -> None:
                found.setdefault(f"{part}.{name}", []).append(x)

            return cast("list[Tensor]", runs[part].run(maps, torch.float32, see=see))

        for batch in _batches(plain, images, image_size, batch_size):
            _watch(plain, packed, batch, see_exact)
            pyramid = run("fpn", run("backbone", batch))
            run("class_net", pyramid)
            run("box_net", pyramid)
    return Int8Report(
        tuple(LayerError(name, signal_to_noise(exact[name], maps)) for name, maps in found.items())
    )
