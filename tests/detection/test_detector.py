"""Detector: from images of every kind to boxes in their own pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

import edet
from edet.anchors import generate_anchors
from edet.detector import Detector
from edet.preprocess import ImageError

SIZE = (128, 192)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return edet.create_model("tf_efficientdet_lite0", image_size=SIZE)


@pytest.fixture
def one_anchor(model, monkeypatch):
    """A detector whose network finds, in every image, just the anchor it is told to."""
    detector = Detector(model)
    anchors = generate_anchors(SIZE, anchor_scale=model.config.anchor_scale)

    def set_found(index, label):
        def forward(images):
            class_logits = torch.full((len(anchors), 90), -20.0)
            class_logits[index, label - 1] = 3.0
            outputs = []
            for values, width in ((class_logits, 90), (torch.zeros(len(anchors), 4), 4)):
                levels, start = [], 0
                for level in range(3, 8):
                    h, w = -(-SIZE[0] >> level), -(-SIZE[1] >> level)
                    rows = values[start : start + h * w * 9].view(1, h, w, 9 * width)
                    levels.append(rows.permute(0, 3, 1, 2).expand(len(images), -1, -1, -1))
                    start += h * w * 9
                outputs.append(levels)
            return tuple(outputs)

        monkeypatch.setattr(model, "forward", forward)
        return detector, anchors[index]

    return set_found


@pytest.mark.parametrize("size", [(64, 96), (300, 300), (500, 100), (1, 1)])
def test_boxes_are_in_pixels_of_the_original(one_anchor, size):
    detector, (y1, x1, y2, x2) = one_anchor(9 * (24 * 5 + 6), 18)
    found = detector(np.zeros((*size, 3), np.uint8))
    assert found.image_size == size
    assert found.names == ["dog"]
    scale = 1 / min(SIZE[0] / size[0], SIZE[1] / size[1])
    limits = torch.tensor([size[1], size[0]] * 2, dtype=torch.float32)
    expected = torch.stack([x1, y1, x2, y2]) * scale
    torch.testing.assert_close(found.boxes[0], torch.minimum(expected.clamp(min=0), limits))
    assert found.scores.item() == pytest.approx(1 / (1 + np.exp(-3)))


def test_one_image_or_a_list(one_anchor):
    detector, _ = one_anchor(0, 1)
    image = np.zeros((64, 96, 3), np.uint8)
    assert not isinstance(detector(image), list)
    for many in ([image], (image,), image[None], [image] * 11, np.stack([image] * 3)):
        found = detector(many)
        assert isinstance(found, list)
        assert [f.names for f in found] == [["person"]] * len(many)


def test_every_kind_of_image(one_anchor, tmp_path):
    detector, _ = one_anchor(9 * 100, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    images = [
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        Image.fromarray(pixels),
        pixels,
        torch.from_numpy(pixels).permute(2, 0, 1),
    ]
    found = detector(images)
    assert all(torch.equal(f.boxes, found[0].boxes) for f in found)


def test_batches_do_not_change_what_is_found(model):
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (h, 90, 3), np.uint8) for h in (50, 90, 130)]
    options = {"score_threshold": 0.0, "max_detections": 20}
    one_by_one = Detector(model, batch_size=1, **options)(images)
    together = Detector(model, batch_size=3, **options)(images)
    for a, b in zip(one_by_one, together, strict=True):
        assert len(a) == len(b) == 20
        torch.testing.assert_close(a.scores, b.scores)


@pytest.mark.parametrize("nms", ["hard", "gaussian"])
def test_threshold_and_limit(model, nms):
    image = np.random.default_rng(0).integers(0, 256, (128, 192, 3), np.uint8)
    every = Detector(model, score_threshold=0.0, max_detections=1000, nms=nms)(image)
    assert len(every) > 50
    assert (every.scores[:-1] >= every.scores[1:]).all()
    threshold = float(every.scores[20])
    above = Detector(model, score_threshold=threshold, max_detections=1000, nms=nms)(image)
    assert torch.equal(above.scores, every.scores[every.scores > threshold])
    few = Detector(model, score_threshold=0.0, max_detections=7, nms=nms)(image)
    assert torch.equal(few.boxes, every.boxes[:7])


def test_half_precision(model):
    import copy

    detector = Detector(copy.deepcopy(model), dtype=torch.bfloat16, score_threshold=0.0)
    found = detector(np.zeros((64, 96, 3), np.uint8))
    assert len(found) == 100
    assert found.boxes.dtype == torch.float32


def test_image_size_of_the_detector(model):
    detector = Detector(model, image_size=(64, 64), score_threshold=0.0)
    found = detector(np.zeros((640, 320, 3), np.uint8))
    assert len(found) > 0
    assert (found.boxes <= torch.tensor([320.0, 640] * 2)).all()


def test_class_names():
    model = edet.create_model("tf_efficientdet_lite0", num_classes=2, image_size=SIZE)
    image = np.zeros((64, 96, 3), np.uint8)
    named = Detector(model, class_names=["cat", "dog"], score_threshold=0.0)(image)
    assert set(named.names) == {"cat", "dog"}
    unnamed = Detector(model, score_threshold=0.0)(image)
    assert set(unnamed.names) == {"class 1", "class 2"}


def test_checkpoint_by_name(tmp_path):
    path = tmp_path / "weights.pth"
    model = edet.create_model("tf_efficientdet_lite0")
    edet.save_checkpoint(model, path)
    detector = Detector("tf_efficientdet_lite0", path)
    assert not detector.model.training
    for a, b in zip(detector.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        (("tf_efficientdet_d0",), {}, "checkpoint must be given"),
        (("tf_efficientdet_d9", "x.pth"), {}, "d9.*did you mean"),
        ((), {"score_threshold": 1.5}, "score_threshold"),
        ((), {"iou_threshold": -0.1}, "iou_threshold"),
        ((), {"sigma": 0.0}, "sigma"),
        ((), {"nms": "soft"}, "nms must be one of hard, gaussian, got 'soft'"),
        ((), {"batch_size": 0}, "batch_size"),
        ((), {"max_detections": 0}, "max_detections"),
        ((), {"image_size": (0, 5)}, "image_size"),
        ((), {"class_names": ["cat"]}, "90 names, got 1"),
        ((), {"checkpoint": "x.pth"}, "checkpoint must be None"),
    ],
)
def test_bad_arguments_are_named(model, arguments, options, match):
    with pytest.raises(ValueError, match=match):
        Detector(*(arguments or (model,)), **options)


def test_model_of_another_type():
    with pytest.raises(TypeError, match="must be an EfficientDet or a model name, got Linear"):
        Detector(torch.nn.Linear(1, 1))


def test_training_mode_is_refused(model):
    detector = Detector(model)
    model.train()
    try:
        with pytest.raises(ValueError, match=r"call model\.eval"):
            detector(np.zeros((64, 96, 3), np.uint8))
    finally:
        model.eval()


def test_bad_images_are_named(model):
    detector = Detector(model, batch_size=2)
    good = np.zeros((64, 96, 3), np.uint8)
    with pytest.raises(ImageError, match=r"images\[2\] must be"):
        detector([good, good, good.astype(np.int32)])
    with pytest.raises(ImageError, match=r"^image must be"):
        detector(good.astype(np.int32))
    with pytest.raises(ImageError, match="at least one image"):
        detector([])
