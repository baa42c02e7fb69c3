"""What CUDA alone has of nms and detect, on the host; ``tests/kernels`` has the rest."""

import pytest
import torch

import edet_kernels
from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import DTYPES, sample

pytestmark = pytest.mark.usefixtures("emulated")
methods = pytest.mark.parametrize("method", ["hard", "gaussian"])
ops = pytest.mark.parametrize("op", ["nms", "detect"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
#: Logits of an image, more than the shortest list of candidates has room for.
CELLS, CLASSES = (14, 14), 100


def check_nms(boxes, scores, labels, **options):
    """Hard suppression keeps what the reference keeps; gives the numbers of kept boxes."""
    found = edet_kernels.nms(boxes, scores, labels, **options)
    with edet_kernels.backend("reference"):
        expected = edet_kernels.nms(boxes, scores, labels, **options)
    assert_identical(found, expected)
    return found[2].tolist()


def many_logits(kind, dtype):
    """Two images' logits, (2, CLASSES, h, w), of which too many are as large as the k-th best."""
    x = torch.randn(2, *CELLS, CLASSES)
    if kind == "narrow":
        x = -4.6 + 0.003 * x
    elif kind == "equal":
        x = torch.full_like(x, -4.6)
    elif kind == "one image":
        x[1] = 1.25
    elif kind == "zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    elif kind == "large":
        x = 1e4 * x + 300 * x.sign()
    elif kind == "infinite":
        x = torch.where(x > 0, torch.inf, -torch.inf)
    return x.permute(0, 3, 1, 2).to(dtype)


def check_detect(logits, **options):
    """Detections of one anchor a cell are the reference's."""
    n, _, h, w = logits.shape
    boxes = (0.1 * torch.randn(n, h, w, 4)).permute(0, 3, 1, 2).to(logits.dtype)
    corner = 100 * torch.rand(h * w, 2)
    anchors = torch.cat([corner, corner + 10], 1)
    found = edet_kernels.detect([logits], [boxes], anchors, **options)
    with edet_kernels.backend("reference"):
        expected = edet_kernels.detect([logits], [boxes], anchors, **options)
    assert_identical(found[2:], expected[2:])
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-4)


def test_a_level_of_many_parts():
    # more logits than one block looks at, an image that begins at an odd address
    sample("detect", torch.float16, classes=7, sizes=[(35, 37), (2, 2)]).check(torch.float16)


@ops
@methods
def test_results_do_not_depend_on_the_order_of_threads(emulated, op, method):
    call = sample(op, method=method)
    expected = call()
    for seed in (1, 2):
        emulated.set_seed(seed)
        assert_identical(call(), expected)


@pytest.mark.parametrize(
    ("kind", "dtype", "resident"),
    # each two of their values meet
    [(kind, dtype, (1, 5)[(i + k) % 2])
     for i, kind in enumerate(["narrow", "equal", "one image", "zeros", "large", "infinite"])
     for k, dtype in enumerate(DTYPES)],
    ids=str,
)  # fmt: skip
def test_more_logits_alike_than_the_list_has_room_for(emulated, kind, dtype, resident):
    """Blocks count again what is alike, by tickets, alone or beside others."""
    logits = many_logits(kind, dtype)
    emulated.set_resident(resident)
    try:
        emulated.count_launches(True)
        check_detect(logits, max_candidates=1500, max_detections=1500, iou_threshold=1.0)
        read = [launch["bytes_read"] for launch in emulated.launches()]
    finally:
        emulated.count_launches(False)
        emulated.set_resident(1)
    # two passes at least, of an image or both
    images = 1 if kind == "one image" else 2
    assert read[1] > (2 * images - 1) * logits[0].numel() * logits.element_size()


def test_logits_that_differ_are_counted_once(emulated):
    logits = many_logits("", torch.float16)
    emulated.count_launches(True)
    check_detect(logits, max_candidates=100)
    read = [launch["bytes_read"] for launch in emulated.launches()]
    emulated.count_launches(False)
    assert len(read) == 3
    assert read[1] < 1.3 * logits.numel() * logits.element_size()


@pytest.mark.parametrize("largest", [float("inf"), 33, 32, 8, 0.02, 0, -0.02, -5, -33])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_all_numbers_of_16_bits(dtype, largest):
    """Among them those at the ends of steps, both zeros, what is beyond all steps, and NaN."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    numbers = torch.where(numbers > largest, torch.nan, numbers)[torch.randperm(2**16)]
    logits = numbers.view(1, 16, 16, 256).permute(0, 3, 1, 2)
    check_detect(logits, max_candidates=300, max_detections=300, iou_threshold=1.0)


def test_an_image_without_numbers():
    logits = many_logits("", torch.float16)
    logits[1] = torch.nan
    logits[0, 1:] = torch.nan  # 196 are left
    check_detect(logits, max_candidates=1500, max_detections=300)


@dtypes
@pytest.mark.parametrize("max_candidates", [7, 100, 512, 10**6])
def test_the_first_of_equal_logits_wins(max_candidates, dtype):
    call = sample("detect", dtype, classes=7, max_candidates=max_candidates, max_detections=500)
    for x in call.maps:
        x.copy_(torch.randint(-2, 3, x.shape))
    call.check(torch.float32)


@methods
@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("count", [31, 32, 33, 63, 64, 65, 511, 512, 513, 1030])
def test_candidates_at_the_ends_of_groups_and_tiles(count, class_agnostic, method):
    sample("nms", count=count, method=method, class_agnostic=class_agnostic).check(torch.float32)


@pytest.mark.parametrize("limit", [1, 3, 64, 600])
def test_detections_that_come_after_many_tiles(limit):
    """1300 boxes are one object, the best of its candidates; then come 20 others."""
    torch.manual_seed(0)
    boxes = torch.tensor([[0.0, 0, 100, 100]]) + torch.rand(1320, 4)
    boxes[1300:] = 200 * torch.arange(1, 21).view(-1, 1) + torch.tensor([0.0, 0, 9, 9])
    scores = torch.cat([0.5 + 0.5 * torch.rand(1300), 0.5 * torch.rand(20)])
    order = torch.randperm(1320)
    boxes, scores = boxes[order], scores[order]
    kept = check_nms(boxes[None], scores[None], torch.zeros(1, 1320, dtype=torch.int64),
                     max_detections=limit)  # fmt: skip
    assert kept == [min(limit, 21)]


def test_chains_of_candidates():
    """Each box suppresses the next one, unless it was suppressed itself: every second is kept."""
    boxes = torch.stack([torch.tensor([2.0 * i, 0, 2 * i + 8, 8]) for i in range(700)])
    scores = 1 - torch.arange(700) / 1000
    kept = check_nms(boxes[None], scores[None], torch.zeros(1, 700, dtype=torch.int64),
                     max_detections=500, iou_threshold=0.5)  # fmt: skip
    assert kept == [350]


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.5])
def test_more_detections_than_shared_memory_holds(threshold):
    torch.manual_seed(0)
    boxes = 20.0 * torch.randint(0, 40, (2, 1500, 2)).repeat(1, 1, 2)
    boxes[..., 2:] += 10.0
    labels = torch.randint(0, 4, (2, 1500))
    kept = check_nms(boxes, torch.rand(2, 1500), labels, max_detections=1400,
                     iou_threshold=threshold)  # fmt: skip
    if threshold >= 0:
        assert min(kept) > 1000
    else:
        assert kept == [4, 4]  # a label has one


def test_a_threshold_ends_the_candidates():
    boxes = torch.arange(1400).view(1, -1, 1) * 20 + torch.tensor([0.0, 0, 9, 9])
    scores = 1 - torch.arange(1400).view(1, -1) / 1400
    labels = torch.zeros(1, 1400, dtype=torch.int64)
    kept = check_nms(boxes, scores, labels, max_detections=1400, score_threshold=0.4)
    assert kept == [840]
