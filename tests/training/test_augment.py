"""Boxes go where their shapes go, by any augmentation, worker and number of processes."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import drawn_shapes
import edet
from edet.detection.preprocess import fit, resize
from edet.models.configs import get_config
from edet.training.augment import (
    Augmentation,
    flip,
    jitter,
    on_canvas,
    quadrants,
    recolour,
    to_network,
)
from edet.training.datasets import open_dataset
from edet.training.loading import (
    TrainingBatches,
    TrainingImages,
    collate,
    mixed_seed,
    training_loader,
)


def one_square(width: int = 90, height: int = 60) -> tuple[Tensor, Tensor]:
    """A white rectangle in a dark image, and its box."""
    image = torch.full((3, height, width), 20, dtype=torch.uint8)
    image[:, 12:36, 18:66] = 255
    return image, torch.tensor([[18.0, 12, 66, 36]])


def bright_box(image: Tensor) -> Tensor:
    """The box around the bright pixels."""
    rows, columns = torch.nonzero(image[0] > 140, as_tuple=True)
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def test_flip() -> None:
    image, boxes = one_square()
    mirrored, moved = flip(image, boxes)
    assert torch.equal(moved[0], bright_box(mirrored))
    assert moved.tolist() == [[24, 12, 72, 36]]


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0, 1.6, 2.0])
@pytest.mark.parametrize("place", [(0.0, 0.0), (0.5, 0.3), (0.99, 0.99)])
def test_jitter_moves_boxes_with_their_pixels(scale: float, place: tuple[float, float]) -> None:
    image, boxes = one_square()
    pixels, moved, kept = jitter(image, boxes, (64, 96), scale, place)
    assert pixels.shape[1] <= 64 and pixels.shape[2] <= 96
    if scale <= 1:  # all of the image is there
        assert kept.all()
        assert max(pixels.shape[2] / 96, pixels.shape[1] / 64) == pytest.approx(scale, abs=0.02)
    if kept.any():
        assert (moved[0] - bright_box(pixels)).abs().max() <= 1


def test_what_is_cut_off_is_left_out() -> None:
    image, _ = one_square()
    corners = torch.tensor([[0.0, 0, 10, 10], [80, 50, 90, 60]])
    _, moved, kept = jitter(image, corners, (60, 90), 2.0, (0.0, 0.0))
    assert kept.tolist() == [True, False]
    assert moved[0].tolist() == [0, 0, 20, 20]
    crossing = torch.tensor([[40.0, 20, 90, 60]])
    _, moved, _ = jitter(image, crossing, (60, 90), 2.0, (0.0, 0.0))
    assert moved[0].tolist() == [80, 40, 90, 60]


def test_without_augmentation_it_is_the_predictors_letterbox() -> None:
    image, boxes = one_square(97, 61)
    config = get_config("tf_efficientdet_d0")
    pixels, moved = to_network(image, boxes, (64, 64), [124, 116, 104])
    batch = edet.preprocess.preprocess(image, (64, 64), mean=config.mean, std=config.std)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    torch.testing.assert_close((pixels / 255 - mean) / std, batch.images[0])
    torch.testing.assert_close(moved, boxes / batch.scales[0])
    same, unmoved, _ = jitter(image, boxes, (64, 64), 1.0, (0.0, 0.0))
    assert torch.equal(on_canvas(same, (64, 64), [124, 116, 104]), pixels)
    torch.testing.assert_close(unmoved, moved)


def test_strength() -> None:
    image, boxes = one_square()
    labels = torch.tensor([1])
    assert Augmentation.of_strength(1) == Augmentation((0.1, 2.0), 0.5)
    nothing = Augmentation.of_strength(0)
    pixels, moved, _ = nothing(image, boxes, labels, (60, 90), 5)
    assert torch.equal(pixels, image)
    assert torch.equal(moved, boxes)
    half = Augmentation.of_strength(0.5)
    assert half.scale == (0.55, 1.5)
    with pytest.raises(ValueError, match=r"strength must be in \[0, 1\], got 2"):
        Augmentation.of_strength(2)
    with pytest.raises(ValueError, match="scale must be 0 < low ≤ high"):
        Augmentation((0, 1))
    with pytest.raises(ValueError, match=r"flip must be in \[0, 1\]"):
        Augmentation(flip=-1)


def test_flips_and_scales_are_as_often_as_they_should() -> None:
    image, boxes = one_square()
    labels = torch.tensor([1])
    augmentation = Augmentation((0.1, 0.9))
    found = [augmentation(image, boxes, labels, (60, 90), seed) for seed in range(400)]
    factors = torch.tensor([(b[0, 2] - b[0, 0]) / 48 for _, b, _ in found])
    assert factors.min() < 0.13 and factors.max() > 0.87
    assert abs(factors.mean() - 0.5) < 0.04
    mirrored = [b[0, 0] / i.shape[2] > 0.23 for i, b, _ in found]
    assert 160 < sum(mirrored) < 240


def brighter(image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A transform: random brightness, and a box of its own that reaches out of the image."""
    factor = 0.5 + torch.rand(()).item()
    image = (image.float() * factor).clamp(0, 255).to(torch.uint8)
    return image, torch.cat([boxes, torch.tensor([[-9.0, 0, 9, 9]])]), labels.new_tensor([1, 2])


def test_a_transform_of_ones_own() -> None:
    image, boxes = one_square()
    labels = torch.tensor([1])
    augmentation = Augmentation.of_strength(0, brighter)
    before = torch.get_rng_state()
    first, found, names = augmentation(image, boxes, labels, (60, 90), 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert found[1].tolist() == [0, 0, 9, 9]
    assert names.tolist() == [1, 2]
    assert torch.equal(augmentation(image, boxes, labels, (60, 90), 3)[0], first)
    assert not torch.equal(augmentation(image, boxes, labels, (60, 90), 4)[0], first)
    for result, error, message in (
        (lambda i, b, n: i, TypeError, "<lambda> must return image, boxes and labels"),
        (lambda i, b, n: (i / 255, b, n), TypeError, r"must return a \(3, H, W\) uint8 tensor"),
        (lambda i, b, n: (i, b[:0], n), ValueError, "one label per box, got 1 and 0"),
        (lambda i, b, n: (i, b * float("nan"), n), ValueError, "must return finite boxes"),
    ):
        with pytest.raises(error, match=message):
            Augmentation(transform=result)(image, boxes, labels, (60, 90), 3)


def test_batches_are_the_same_for_any_workers_and_processes(tmp_path: Path) -> None:
    dataset = open_dataset(drawn_shapes.write_coco(tmp_path, count=9))
    images = TrainingImages(dataset, get_config("tf_efficientdet_d0"), Augmentation(), seed=7)
    images.image_size = (48, 64)
    keys = TrainingBatches(len(dataset), 4, seed=7)
    assert len(keys) == keys.steps == 2
    epochs = []
    for epoch in range(2):
        keys.epoch = epoch
        epochs.append(list(training_loader(images, keys)))
    by_workers = training_loader(images, keys, workers=2)
    for epoch in range(2):  # persistent workers learn of the next epoch
        keys.epoch = epoch
        for found, expected in zip(by_workers, epochs[epoch], strict=True):
            assert torch.equal(found.images, expected.images)
            assert found.paths == expected.paths
            pairs = zip(found.boxes + found.labels, expected.boxes + expected.labels, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(epochs[0][0].images, epochs[1][0].images)
    shares = [TrainingBatches(len(dataset), 4, seed=7, rank=r, processes=2) for r in (0, 1)]
    joined = [a + b for a, b in zip(*shares, strict=True)]
    keys.epoch = 0
    assert joined == list(keys)
    keys.start = 1
    assert list(keys) == joined[1:]


def test_batches_that_cannot_be_shared_out() -> None:
    with pytest.raises(ValueError, match="at most the number of images, 3, got 4: give a smaller"):
        TrainingBatches(3, 4)
    with pytest.raises(ValueError, match="multiple of the number of processes, 4, got 6"):
        TrainingBatches(30, 6, processes=4)
    with pytest.raises(ValueError, match=r"number of images, 3, got 4: .* or fewer processes"):
        TrainingBatches(3, 4, processes=4)


def test_crowds_are_not_learnt(tmp_path: Path) -> None:
    file = drawn_shapes.write_coco(tmp_path)
    content = json.loads(file.read_text())
    content["annotations"][0]["iscrowd"] = 1
    file.write_text(json.dumps(content))
    dataset = open_dataset(file)
    images = TrainingImages(dataset, get_config("tf_efficientdet_d0"), None)
    assert len(images[0, 0][1]) == len(dataset[0].boxes) - 1
    voc = open_dataset(drawn_shapes.write_voc(tmp_path / "voc"))
    images = TrainingImages(voc, get_config("tf_efficientdet_d0"), None, difficult=False)
    assert len(images[0, 0][1]) == len(voc[0].boxes) - 1


def test_an_image_broken_since_is_replaced_or_ends_the_run(tmp_path: Path) -> None:
    file = drawn_shapes.write_coco(tmp_path)
    strict, lenient = open_dataset(file), open_dataset(file, bad="skip")
    (tmp_path / "train/002.png").write_bytes(b"")
    config = get_config("tf_efficientdet_d0")
    with pytest.raises(ValueError, match=r"002\.png is not an image"):
        TrainingImages(strict, config, None)[0, 2]
    with pytest.warns(UserWarning, match=r"the next image takes its place: .*002\.png"):
        batch = collate([TrainingImages(lenient, config, None)[0, 2]])
    assert batch.paths == [tmp_path / "train/003.png"]


def test_a_part_of_a_mosaic_keeps_the_networks_scale() -> None:
    image, boxes = one_square()
    pixels, moved, kept = jitter(image, boxes, (60, 90), 1.0, (0.5, 0.5), (30, 50))
    assert pixels.shape == (3, 30, 50)
    assert torch.equal(pixels, image[:, 15:45, 20:70])  # not scaled to its window
    assert kept.all() and (moved[0] - bright_box(pixels)).abs().max() <= 1


def test_slivers_at_the_edge_of_a_part_are_left_out() -> None:
    image, _ = one_square()
    boxes = torch.tensor([[0.0, 0, 41, 60], [0, 0, 50, 60], [60, 0, 90, 60]])
    _, moved, kept = jitter(image, boxes, (60, 90), 1.0, (0.5, 0.5), (60, 10), 0.1)
    assert kept.tolist() == [False, True, False]  # of the first, 1 of 41 columns is left
    assert moved[1].tolist() == [0, 0, 10, 60]
    assert jitter(image, boxes, (60, 90), 1.0, (0.5, 0.5), (60, 10))[2].tolist() == [
        True,
        True,
        False,
    ]


def test_mosaics_hold_four_images_and_their_boxes(tmp_path: Path) -> None:
    data = open_dataset(drawn_shapes.write_coco(tmp_path, count=9, side=96), "train")
    config = dataclasses.replace(get_config("tf_efficientdet_lite0"), image_size=(96, 96))
    always = Augmentation((1.0, 1.0), 0.0, mosaic=1.0)
    images = TrainingImages(data, config, always, seed=3, mosaic_epochs=2)
    plain = TrainingImages(data, config, None)
    joined = 0
    for index in (0, 1, 8):
        pixels, boxes, labels, path = images[0, index]
        assert pixels.shape == (3, 96, 96) and path == plain[0, index][3]
        assert len(boxes) == len(labels) and (boxes[:, 2:] > boxes[:, :2]).all()
        assert boxes.min() >= 0 and boxes.max() <= 96
        centre, others = always.mosaic_parts(
            (96, 96), len(data), mixed_seed(mixed_seed(3, 0, index), 4)
        )
        parts = [data[index], *(data[i] for i in others)]
        for part, (rows, columns, size) in zip(parts, quadrants((96, 96), centre), strict=True):
            assert size == (rows.stop - rows.start, columns.stop - columns.start)
            scaled = resize(part.image, fit(part.image.shape[1:], (96, 96))[1])
            there = pixels[:, rows, columns][:, : scaled.shape[1], : scaled.shape[2]]
            assert shows(scaled, there)
            joined += 1
        assert torch.equal(images[0, index][0], pixels)  # the same again
        assert not torch.equal(images[1, index][0], pixels)
    assert joined == 12
    assert torch.equal(images[2, 0][0], plain[2, 0][0])  # its epochs are over


def shows(image: Tensor, window: Tensor) -> bool:
    """Whether an image contains a window somewhere."""
    height, width = window.shape[1:]
    there = image.unfold(1, height, 1).unfold(2, width, 1)  # 3, rows, columns, height, width
    return bool((there == window[:, None, None]).all(dim=(0, 3, 4)).any())


def test_colours_change_and_boxes_do_not() -> None:
    image, boxes = one_square()
    image[0, :30] //= 2
    labels = torch.tensor([1])
    same = Augmentation((1.0, 1.0), 0.0)
    changing = Augmentation((1.0, 1.0), 0.0, colour=0.4)
    pixels, moved, names = changing(image, boxes, labels, (60, 90), 3)
    assert pixels.shape == image.shape and not torch.equal(pixels, image)
    assert torch.equal(moved, boxes) and torch.equal(names, labels)
    assert torch.equal(changing(image, boxes, labels, (60, 90), 3)[0], pixels)
    assert torch.equal(same(image, boxes, labels, (60, 90), 3)[0], image)
    darker = recolour(image, (0.5, 1.0, 1.0))
    assert (darker.int() - image.int() // 2).abs().max() <= 1
    grey = recolour(image, (1.0, 1.0, 0.0))
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])


@pytest.mark.parametrize("name", ["flip", "colour", "mosaic"])
def test_parts_of_one(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got 1.5"):
        Augmentation(**{name: 1.5})


def test_albumentations_as_the_page_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/training.md's function of one's own: boxes go where their shapes go."""
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")  # it would look for a newer version
    pytest.importorskip("albumentations", reason="needs the extra albumentations")
    page = (Path(__file__).resolve().parents[2] / "docs/training.md").read_text(encoding="utf-8")
    first, last = (
        page.index("    import albumentations as A"),
        page.index("    trainer.fit(data, ep"),
    )
    names: dict[str, Any] = {}
    exec(textwrap.dedent(page[first:last]), names)
    augmentation = Augmentation.of_strength(0, names["transform"])
    image, boxes = one_square()
    found = [augmentation(image, boxes, torch.tensor([2]), (60, 90), seed) for seed in range(12)]
    for pixels, moved, labels in found:
        assert pixels.shape == image.shape and labels.tolist() == [2]
        assert (moved[0] - bright_box(pixels)).abs().max() < 3
    assert len({tuple(moved[0].tolist()) for _, moved, _ in found}) > 3
    again = augmentation(image, boxes, torch.tensor([2]), (60, 90), 7)
    assert torch.equal(again[0], found[7][0]) and torch.equal(again[1], found[7][1])
