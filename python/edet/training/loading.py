"""Batches for training and evaluation, read ahead by worker processes, the same at every run."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ..detection.preprocess import fit, letterbox, letterbox_fill, resize
from ..models.configs import ModelConfig
from .augment import Augmentation, on_canvas, quadrants, to_network
from .datasets import Dataset, Sample
from .formats import DatasetError


class Batch(NamedTuple):
    """B images as the network is fed and their objects.

    Attributes:
        images: (B, 3, H, W) uint8, not yet normalised.
        boxes: for each image (M, 4) float32 x1, y1, x2, y2 in pixels of ``images``.
        labels: for each image (M,) int64 from 1.
        paths: of the images' files.
    """

    images: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]
    paths: list[Path]


class EvaluationBatch(NamedTuple):
    """B images as the :class:`edet.Predictor` would feed them.

    Attributes:
        images: (B, 3, H, W) uint8, not yet normalised.
        sizes: (height, width) of the originals.
        indices: in the data set.
    """

    images: Tensor
    sizes: list[tuple[int, int]]
    indices: list[int]


def mixed_seed(*numbers: int) -> int:
    """One seed of several numbers, without a pattern between neighbours."""
    low, high = np.random.SeedSequence(numbers).generate_state(2).tolist()
    return int(low | (high & 0x7FFFFFFF) << 32)


class TrainingImages(TorchDataset[tuple[Tensor, Tensor, Tensor, Path]]):
    """The images of a data set augmented and at the network's size, asked for by (epoch, index).

    What an image becomes depends on the seed, the epoch and its index alone: not on the worker, the
    process or what was read before, so that a run can be repeated and resumed.

    Args:
        dataset: crowd regions are no objects to learn and are left out.
        config: of the model, for its image size and mean colour.
        augmentation: None for the letterbox of :class:`edet.Predictor` alone.
        difficult: learn VOC's difficult objects too.

    Attributes:
        mosaic_epochs: the first epochs, in which images may become mosaics; None: all.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: ModelConfig,
        augmentation: Augmentation | None,
        *,
        seed: int = 0,
        difficult: bool = True,
    ) -> None:
        self.dataset, self.image_size = dataset, config.image_size
        self.fill = letterbox_fill(config.mean)
        self.augmentation, self.seed, self.difficult = augmentation, seed, difficult
        self.mosaic_epochs: int | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def _sample(self, index: int) -> Sample:
        """The image, or the next one where its file was broken meanwhile."""
        for i in range(index, index + len(self)):
            try:
                return self.dataset[i % len(self)]
            except (OSError, ValueError) as error:
                if not self.dataset.skips_broken:
                    raise
                warnings.warn(f"left out, the next image takes its place: {error}", stacklevel=2)
        raise DatasetError("no image of the data set can be read any more")

    def _wanted(self, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
        """Image, boxes and labels of what is to be learnt of a sample."""
        wanted = ~sample.crowd if self.difficult else ~(sample.crowd | sample.difficult)
        return sample.image, sample.boxes[wanted], sample.labels[wanted]

    def _mosaic(
        self, samples: list[Sample], augmentation: Augmentation, centre: tuple[int, int], seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Four samples, each augmented for its part of the network's input."""
        canvas = on_canvas(
            torch.empty(3, 0, 0, dtype=torch.uint8, device="cpu"), self.image_size, self.fill
        )
        boxes, labels = [], []
        parts = quadrants(self.image_size, centre)
        for i, (sample, (rows, columns, window)) in enumerate(zip(samples, parts, strict=True)):
            pixels, there, classes = augmentation(
                *self._wanted(sample), self.image_size, mixed_seed(seed, i), window=window
            )
            top, left = rows.start, columns.start
            canvas[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
            boxes.append(there + there.new_tensor([left, top, left, top]))
            labels.append(classes)
        return canvas, torch.cat(boxes), torch.cat(labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Path]:
        epoch, index = key
        sample, augmentation = self._sample(index), self.augmentation
        image, boxes, labels = self._wanted(sample)
        if augmentation is None:
            image, boxes = to_network(image, boxes, self.image_size, self.fill)
            return image, boxes, labels, sample.path
        seed = mixed_seed(self.seed, epoch, index)
        if self.mosaic_epochs is None or epoch < self.mosaic_epochs:
            mosaic = augmentation.mosaic_parts(self.image_size, len(self), mixed_seed(seed, 4))
            if mosaic is not None:
                samples = [sample, *map(self._sample, mosaic[1])]
                return *self._mosaic(samples, augmentation, mosaic[0], seed), sample.path
        image, boxes, labels = augmentation(image, boxes, labels, self.image_size, seed)
        return on_canvas(image, self.image_size, self.fill), boxes, labels, sample.path


class TrainingBatches(torch.utils.data.Sampler[list[tuple[int, int]]]):
    """Keys of one process's batches: each epoch another order, shared out among the processes.

    A step's ``batch_size`` images, over all processes, are the same whatever their number. Images
    that do not fill a step are left to another epoch.

    Args:
        count: images of the data set.
        batch_size: images of a step.
        rank, processes: this process and their number.

    Attributes:
        epoch, start: the epoch and its first step to give, set before iterating.
        steps: in an epoch.

    Raises:
        ValueError: the images cannot be shared out so.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % processes:
            raise ValueError(
                f"batch_size must be a multiple of the number of processes, {processes}, "
                f"got {batch_size}"
            )
        if count < batch_size:
            raise ValueError(
                f"batch_size must be at most the number of images, {count}, got {batch_size}: "
                "give a smaller batch_size" + (" or fewer processes" if processes > 1 else "")
            )
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.processes = rank, processes
        self.steps = count // batch_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        size = self.batch_size // self.processes
        for step in range(self.start, self.steps):
            first = step * self.batch_size + self.rank * size
            yield [(epoch, int(index)) for index in order[first : first + size]]


class EvaluationImages(TorchDataset[tuple[Tensor, tuple[int, int], int]]):
    """Images as the :class:`edet.Predictor` feeds them: letterboxed, nothing else."""

    def __init__(self, dataset: Dataset, image_size: tuple[int, int], fill: Sequence[int]) -> None:
        self.dataset, self.image_size, self.fill = dataset, image_size, fill

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[int, int], int]:
        image = self.dataset[index].image
        size = (image.shape[1], image.shape[2])
        resized = resize(image, fit(size, self.image_size)[1])
        return letterbox([resized], self.image_size, self.fill)[0], size, index


def collate(items: Sequence[tuple[Tensor, Tensor, Tensor, Path]]) -> Batch:
    """A batch of what :class:`TrainingImages` gives."""
    images, boxes, labels, paths = zip(*items, strict=True)
    return Batch(torch.stack(images), list(boxes), list(labels), list(paths))


def collate_evaluation(items: Sequence[tuple[Tensor, tuple[int, int], int]]) -> EvaluationBatch:
    """A batch of what :class:`EvaluationImages` gives."""
    images, sizes, indices = zip(*items, strict=True)
    return EvaluationBatch(torch.stack(images), list(sizes), list(indices))


def ignore_interrupts(_: int) -> None:
    """Leaves Ctrl-C, which a terminal sends to every process, to the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _options(workers: int) -> dict[str, Any]:
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    options: dict[str, Any] = {
        "num_workers": workers,
        "pin_memory": torch.cuda.is_available(),
        # the loader's own seed, which nothing here uses, comes from here and not from torch's
        # global numbers: reading must not change what follows
        "generator": torch.Generator("cpu"),
    }
    if workers:
        options |= {
            "persistent_workers": True,
            "prefetch_factor": 4,
            "worker_init_fn": ignore_interrupts,
        }
    return options


class _Loader(DataLoader[Any]):
    """A loader that draws its seed on the host, whatever the process's default device."""

    def __iter__(self) -> Any:
        with torch.device("cpu"):
            return super().__iter__()


def training_loader(
    images: TrainingImages, batches: TrainingBatches, *, workers: int = 0
) -> DataLoader[Any]:
    """Batches of ``images`` in the order of ``batches``, read ahead by ``workers`` processes."""
    return _Loader(images, batch_sampler=batches, collate_fn=collate, **_options(workers))


def evaluation_loader(
    images: EvaluationImages,
    batch_size: int,
    *,
    rank: int = 0,
    processes: int = 1,
    workers: int = 0,
) -> DataLoader[Any]:
    """Each image once: this process's share, no image twice to fill up."""
    share = range(rank, len(images), processes)
    options = _options(workers) | ({"persistent_workers": False} if workers else {})
    return _Loader(images, batch_size, sampler=share, collate_fn=collate_evaluation, **options)
