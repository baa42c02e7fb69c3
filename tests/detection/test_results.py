"""Detections: access, filtering and conversions that lead back."""

import json

import pytest
import torch

from edet.detection.labels import COCO_NAMES, label_map
from edet.detection.results import Detection, Detections


@pytest.fixture
def found():
    return Detections(
        boxes=torch.tensor([[10.5, 20, 110, 220], [0, 0, 5, 6], [1, 2, 3, 4]]),
        scores=torch.tensor([0.9, 0.5, 0.1]),
        labels=torch.tensor([18, 1, 12]),
        image_size=(300, 400),
    )


def test_access(found):
    assert len(found) == 3
    assert found.names == ["dog", "person", "class 12"]
    first = next(iter(found))
    assert isinstance(first, Detection)
    assert first.box == (10.5, 20, 110, 220)
    assert first == found[0]
    assert (first.label, first.name) == (18, "dog")
    assert found[-1].name == "class 12"
    assert found[:2].names == ["dog", "person"]
    assert found[found.labels == 1].names == ["person"]
    with pytest.raises(IndexError):
        found[3]


def test_filter_keeps_scores_above_the_threshold(found):
    assert found.filter(0.5).names == ["dog"]
    assert len(found.filter(0.0)) == 3
    nothing = found.filter(1.0)
    assert len(nothing) == 0
    assert list(nothing) == []


def test_repr_says_what_is_there(found):
    assert repr(found) == "<Detections in 400x300: 1 dog, 1 person, 1 class 12; best 0.90>"
    assert repr(found.filter(1.0)) == "<Detections in 400x300: nothing>"


def test_coco_round_trip(found):
    results = json.loads(json.dumps(found.to_coco(image_id=42)))
    assert {r["image_id"] for r in results} == {42}
    assert [r["category_id"] for r in results] == [18, 1, 12]
    assert results[0]["bbox"] == [10.5, 20, 99.5, 200]  # x, y, width, height
    boxes = torch.tensor([r["bbox"] for r in results])
    boxes[:, 2:] += boxes[:, :2]
    torch.testing.assert_close(boxes, found.boxes)
    torch.testing.assert_close(torch.tensor([r["score"] for r in results]), found.scores)


def test_dict_is_torchvisions(found):
    plain = found.to_dict()
    assert set(plain) == {"boxes", "labels", "scores"}
    assert plain["boxes"] is found.boxes
    assert plain["labels"].dtype == torch.int64


def test_json_round_trip(found, tmp_path):
    path = tmp_path / "found.json"
    text = found.to_json(path)
    assert json.loads(path.read_text()) == json.loads(text)
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]
    again = Detections.from_json(text)
    assert torch.equal(again.boxes, found.boxes)
    assert torch.equal(again.scores, found.scores)
    assert torch.equal(again.labels, found.labels)
    assert again.image_size == found.image_size
    assert again.names == found.names
    empty = Detections.from_json(found.filter(1.0).to_json())
    assert empty.boxes.shape == (0, 4)


def test_json_refuses_what_it_cannot_hold(found, tmp_path):
    broken = Detections(found.boxes / 0, found.scores, found.labels, (300, 400))
    with pytest.raises(ValueError, match="JSON"):
        broken.to_json(tmp_path / "broken.json")
    assert list(tmp_path.iterdir()) == []


def test_json_to_a_missing_folder_leaves_nothing(found, tmp_path):
    with pytest.raises(FileNotFoundError):
        found.to_json(tmp_path / "missing" / "found.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"detections": [{}], "image_size": [1, 2]}'])
def test_json_of_something_else(text):
    with pytest.raises(ValueError, match="to_json"):
        Detections.from_json(text)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\(N, 4\)"):
        Detections(torch.zeros(2, 4), torch.zeros(3), torch.zeros(3), (1, 1))


def test_coco_names():
    assert len(COCO_NAMES) == 80
    assert set(range(1, 91)) - set(COCO_NAMES) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert (COCO_NAMES[1], COCO_NAMES[44], COCO_NAMES[90]) == ("person", "bottle", "toothbrush")


def test_label_map():
    assert label_map(None, 90) == COCO_NAMES
    assert label_map(None, 3) == {}
    assert label_map(["cat", "dog"], 2) == {1: "cat", 2: "dog"}
    assert label_map({2: "dog"}, 2) == {2: "dog"}
    with pytest.raises(ValueError, match="2 names, got 1"):
        label_map(["cat"], 2)
    with pytest.raises(ValueError, match="labels 1 to 2, got 0"):
        label_map({0: "background"}, 2)
    with pytest.raises(TypeError, match="cat"):
        label_map("cat", 3)


def test_anything_with_a_size_and_rows_can_be_drawn():
    image = pytest.importorskip("PIL.Image", reason="needs the extra image")
    from edet.draw import draw_detections

    class Rows(list):
        image_size = (48, 64)

    rows = Rows([((4.0, 6.0, 40.0, 30.0), 0.5, 3, "car")])
    found = Detections(
        torch.tensor([[4.0, 6, 40, 30]]), torch.tensor([0.5]), torch.tensor([3]), (48, 64)
    )
    pixels = torch.zeros(3, 48, 64, dtype=torch.uint8)
    drawn = draw_detections(pixels, rows)
    assert isinstance(drawn, image.Image)
    assert drawn.tobytes() == found.draw(pixels).tobytes()
