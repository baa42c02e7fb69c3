"""Predictor: from images of every kind to boxes in their own pixels; planned, streamed, bounded."""

import ctypes
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import cuda_stand_in
import edet
import edet_kernels
from edet.detection.anchors import generate_anchors
from edet.detection.images import ImageError
from edet.detection.pipeline import Network
from edet.detection.postprocess import postprocess
from edet.detection.predictor import Predictor
from edet.detection.preprocess import preprocess
from edet.detection.stats import STAGES
from edet.fused import cuda_graph as graph
from edet.fused.plan import CallList
from edet_kernels.reference import box_iou

SIZE = (128, 192)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return edet.create_model("tf_efficientdet_lite0", image_size=SIZE)


@pytest.fixture
def one_anchor(model, monkeypatch):
    """A predictor whose network finds, in every image, just the anchor it is told to."""
    predictor = Predictor(model)
    anchors = generate_anchors(SIZE, anchor_scale=model.config.anchor_scale)

    def set_found(index, label):
        def network(inputs):
            pixels, geometry = inputs
            class_logits = torch.full((len(anchors), 90), -20.0)
            class_logits[index, label - 1] = 3.0
            outputs = []
            for values, width in ((class_logits, 90), (torch.zeros(len(anchors), 4), 4)):
                levels, start = [], 0
                for level in range(3, 8):
                    h, w = -(-SIZE[0] >> level), -(-SIZE[1] >> level)
                    rows = values[start : start + h * w * 9].view(1, h, w, 9 * width)
                    levels.append(rows.permute(0, 3, 1, 2).expand(len(pixels), -1, -1, -1))
                    start += h * w * 9
                outputs += levels
            return [*outputs, geometry]

        monkeypatch.setattr(Network, "__call__", lambda _, inputs: network(inputs))
        return predictor, anchors[index]

    return set_found


@pytest.mark.parametrize("size", [(64, 96), (300, 300), (500, 100), (1, 1)])
def test_boxes_are_in_pixels_of_the_original(one_anchor, size):
    predictor, (y1, x1, y2, x2) = one_anchor(9 * (24 * 5 + 6), 18)
    found = predictor(np.zeros((*size, 3), np.uint8))
    assert found.image_size == size
    assert found.names == ["dog"]
    scale = 1 / min(SIZE[0] / size[0], SIZE[1] / size[1])
    limits = torch.tensor([size[1], size[0]] * 2, dtype=torch.float32)
    expected = torch.stack([x1, y1, x2, y2]) * scale
    torch.testing.assert_close(found.boxes[0], torch.minimum(expected.clamp(min=0), limits))
    assert found.scores.item() == pytest.approx(1 / (1 + np.exp(-3)))


def test_one_image_or_a_list(one_anchor):
    predictor, _ = one_anchor(0, 1)
    image = np.zeros((64, 96, 3), np.uint8)
    assert not isinstance(predictor(image), list)
    for many in ([image], (image,), image[None], [image] * 11, np.stack([image] * 3)):
        found = predictor(many)
        assert isinstance(found, list)
        assert [f.names for f in found] == [["person"]] * len(many)


def test_every_kind_of_image(one_anchor, tmp_path):
    predictor, _ = one_anchor(9 * 100, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    images = [
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        Image.fromarray(pixels),
        pixels,
        torch.from_numpy(pixels).permute(2, 0, 1),
    ]
    found = predictor(images)
    assert all(torch.equal(f.boxes, found[0].boxes) for f in found)


def test_batches_do_not_change_what_is_found(model):
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (h, 90, 3), np.uint8) for h in (50, 90, 130)]
    options = {"score_threshold": 0.0, "max_detections": 20}
    one_by_one = Predictor(model, batch_size=1, **options)(images)
    together = Predictor(model, batch_size=3, **options)(images)
    for a, b in zip(one_by_one, together, strict=True):
        assert len(a) == len(b) == 20
        torch.testing.assert_close(a.scores, b.scores)


@pytest.mark.parametrize("nms", ["hard", "gaussian"])
def test_threshold_and_limit(model, nms):
    image = np.random.default_rng(0).integers(0, 256, (128, 192, 3), np.uint8)
    every = Predictor(model, score_threshold=0.0, max_detections=1000, nms=nms)(image)
    assert len(every) > 50
    assert (every.scores[:-1] >= every.scores[1:]).all()
    threshold = float(every.scores[20])
    above = Predictor(model, score_threshold=threshold, max_detections=1000, nms=nms)(image)
    assert torch.equal(above.scores, every.scores[every.scores > threshold])
    few = Predictor(model, score_threshold=0.0, max_detections=7, nms=nms)(image)
    assert torch.equal(few.boxes, every.boxes[:7])


@pytest.mark.parametrize("nms", ["hard", "gaussian"])
def test_across_classes(model, nms):
    """No two boxes of any classes overlap; the better ones of those per class are left."""
    image = np.random.default_rng(0).integers(0, 256, (128, 192, 3), np.uint8)
    options = {"score_threshold": 0.0, "max_detections": 5000, "nms": nms}
    per_class = Predictor(model, **options)(image)
    across = Predictor(model, class_agnostic=True, **options)
    found = across(image)
    assert torch.equal(found.scores[:1], per_class.scores[:1])
    if nms == "hard":
        assert 1 < len(found) < len(per_class)
        for i in range(len(found)):
            assert (box_iou(found.boxes[i], found.boxes[i + 1 :]) <= 0.5 + 1e-5).all()
    else:
        assert float(found.scores.sum()) < float(per_class.scores.sum())
    for _ in range(2):  # planned
        again = across(image)
        assert torch.equal(again.boxes, found.boxes) and torch.equal(again.labels, found.labels)
    across.class_agnostic = False  # as any option
    assert torch.equal(across(image).scores, per_class.scores)


def test_half_precision(model):
    import copy

    predictor = Predictor(copy.deepcopy(model), dtype=torch.bfloat16, score_threshold=0.0)
    found = predictor(np.zeros((64, 96, 3), np.uint8))
    assert len(found) == 100
    assert found.boxes.dtype == torch.float32


def test_image_size_of_the_predictor(model):
    predictor = Predictor(model, image_size=(64, 64), score_threshold=0.0)
    found = predictor(np.zeros((640, 320, 3), np.uint8))
    assert len(found) > 0
    assert (found.boxes <= torch.tensor([320.0, 640] * 2)).all()


def test_class_names():
    model = edet.create_model("tf_efficientdet_lite0", num_classes=2, image_size=SIZE)
    image = np.zeros((64, 96, 3), np.uint8)
    named = Predictor(model, class_names=["cat", "dog"], score_threshold=0.0)(image)
    assert set(named.names) == {"cat", "dog"}
    unnamed = Predictor(model, score_threshold=0.0)(image)
    assert set(unnamed.names) == {"class 1", "class 2"}


def test_checkpoint_by_name(tmp_path):
    path = tmp_path / "weights.pth"
    model = edet.create_model("tf_efficientdet_lite0")
    edet.save_checkpoint(model, path)
    predictor = Predictor("tf_efficientdet_lite0", path)
    assert not predictor.model.training
    for a, b in zip(predictor.model.parameters(), model.parameters(), strict=True):
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
        ((), {"max_plans": 0}, "max_plans"),
        ((), {"image_size": (0, 5)}, "image_size"),
        ((), {"class_names": ["cat"]}, "90 names, got 1"),
        ((), {"checkpoint": "x.pth"}, "checkpoint must be None"),
    ],
)
def test_bad_arguments_are_named(model, arguments, options, match):
    with pytest.raises(ValueError, match=match):
        Predictor(*(arguments or (model,)), **options)


def test_model_of_another_type():
    with pytest.raises(TypeError, match="must be an EfficientDet or a model name, got Linear"):
        Predictor(torch.nn.Linear(1, 1))


def test_training_mode_is_refused(model):
    predictor = Predictor(model)
    model.train()
    try:
        with pytest.raises(ValueError, match=r"call model\.eval"):
            predictor(np.zeros((64, 96, 3), np.uint8))
    finally:
        model.eval()


def test_bad_images_are_named(model):
    predictor = Predictor(model, batch_size=2)
    good = np.zeros((64, 96, 3), np.uint8)
    with pytest.raises(ImageError, match=r"images\[2\] must be"):
        predictor([good, good, good.astype(np.int32)])
    with pytest.raises(ImageError, match=r"^image must be"):
        predictor(good.astype(np.int32))
    with pytest.raises(ImageError, match="at least one image"):
        predictor([])


# --- planned shapes -------------------------------------------------------------------------------

SMALL = (64, 64)


@pytest.fixture(scope="module")
def small():
    """A D0 whose scores are far from one another."""
    torch.manual_seed(0)
    model = edet.create_model("tf_efficientdet_d0", image_size=SMALL)
    torch.nn.init.normal_(model.class_net.predict.conv_pw.weight, std=3)
    return model


def photo(height=48, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def make(model, **options):
    return Predictor(model, **{"score_threshold": 0.0, "max_detections": 20, **options})


def assert_same(found, expected):
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.labels, expected.labels)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_detections_are_those_of_the_three_steps(small, dtype):
    predictor = make(small)
    image = torch.from_numpy(photo()).permute(2, 0, 1)
    image = image if dtype == torch.uint8 else image / 255
    config = small.config
    batch = preprocess(image, SMALL, mean=config.mean, std=config.std)
    anchors = generate_anchors(SMALL, anchor_scale=config.anchor_scale)
    outputs = small(batch.images)
    boxes, scores, labels, counts = postprocess(
        *outputs, anchors, sizes=batch.sizes, scales=batch.scales, max_detections=20
    )
    for _ in range(3):
        found = predictor(image)
        assert len(found) == counts.item() == 20
        assert torch.equal(found.labels, labels[0])
        torch.testing.assert_close(found.scores, scores[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.boxes, boxes[0], rtol=1e-4, atol=1e-3)


def test_the_second_batch_of_a_shape_is_planned(small, monkeypatch):
    predictor = make(small)
    expected = [predictor(photo(*size)) for size in ((48, 64), (90, 20))]
    assert predictor.stats().plans == 1
    [plan] = predictor._plans.values()
    assert isinstance(plan, CallList)
    monkeypatch.setattr(Network, "__call__", lambda *_: pytest.fail("not replayed"))
    for size, wanted in zip(((48, 64), (90, 20)), expected, strict=True):
        assert_same(predictor(photo(*size)), wanted)


def test_image_size_of_a_call(small):
    predictor = make(small)
    wide, tall = (64, 128), (128, 64)
    expected = {size: make(small, image_size=size)(photo()) for size in (wide, tall)}
    for _ in range(3):
        for size in (wide, tall):
            assert_same(predictor(photo(), image_size=size), expected[size])
    for bad in ((0, 64), (64,)):
        with pytest.raises(ValueError, match="image_size must be two positive integers"):
            predictor(photo(), image_size=bad)


@pytest.mark.parametrize("captured", [False, True], ids=["calls", "graphs"])
def test_plans_are_bounded_and_right_after_eviction(small, monkeypatch, captured):
    if captured:
        cuda_stand_in.install(monkeypatch)
    predictor = make(small, max_plans=2)
    images = [photo(seed=i) for i in range(3)]
    expected = [predictor([image])[0] for image in images]
    for count in (1, 2, 3, 2, 1):
        for _ in range(3):
            for found, wanted in zip(predictor(images[:count]), expected, strict=False):
                assert_same(found, wanted)
            assert len(predictor._plans) <= 2
    plan = weakref.ref(next(reversed(predictor._plans.values())))
    predictor(images[:2]), predictor(images[:3])
    gc.collect()
    assert plan() is None


def test_new_weights_are_seen(small):
    predictor = make(small)
    before = [predictor(photo()) for _ in range(3)]
    state = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    changed = {**state, "class_net.predict.conv_pw.bias": torch.full((810,), 2.0)}
    try:
        small.load_state_dict(changed)
        after = [predictor(photo()) for _ in range(3)]
        assert not torch.equal(after[0].scores, before[0].scores)
        for found in after[1:]:
            assert_same(found, after[0])
    finally:
        small.load_state_dict(state)
    assert_same(predictor(photo()), before[0])


def test_two_predictors_of_one_model_and_changed_options(small):
    first, second = make(small), make(small, max_detections=5)
    for _ in range(3):
        assert (len(first(photo())), len(second(photo()))) == (20, 5)
    assert first.stats().plans == second.stats().plans == 1  # neither thaws the other's model
    first.max_detections = 3
    assert len(first(photo())) == 3
    with edet_kernels.backend("reference"):
        found = [first(photo()) for _ in range(3)]
    torch.testing.assert_close(found[2].scores, first(photo()).scores, rtol=1e-3, atol=1e-4)


def test_custom_backbone():
    class Backbone(torch.nn.Module):
        channels = (8, 8, 8)

        def forward(self, x):
            return [
                x.mean(1, keepdim=True).expand(-1, 8, -1, -1)[..., ::s, ::s] for s in (8, 16, 32)
            ]

    model = edet.create_model("tf_efficientdet_d0", image_size=SMALL, backbone=Backbone())
    predictor = make(model)
    found = [predictor(photo()) for _ in range(3)]
    assert predictor.stats().plans == 1
    assert_same(found[2], found[0])


@pytest.mark.parametrize("captured", [False, True], ids=["calls", "graphs"])
def test_threads_share_a_predictor(small, monkeypatch, captured):
    if captured:
        cuda_stand_in.install(monkeypatch)
    images = [photo(seed=i) for i in range(4)]
    expected = [make(small)(image) for image in images]
    predictor = make(small, max_plans=2)
    ready = threading.Barrier(4)

    def work(k):
        ready.wait()
        return [predictor(images[k]) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for k, found in enumerate(pool.map(work, range(4))):
            for x in found:
                assert_same(x, expected[k])
    assert predictor.stats().images == 40


def test_stats(small):
    predictor = make(small, batch_size=3)
    stats = predictor.stats()
    assert (stats.images, stats.batches, stats.plans, stats.latency) == (0, 0, 0, {})
    predictor.warm_up(batch_size=3)
    assert predictor.stats().latency == {}  # a batch that is planned counts for no percentile
    for _ in range(4):
        predictor([photo()] * 3)
    stats = predictor.stats()
    assert (stats.images, stats.batches, stats.plans) == (18, 6, 1)
    assert tuple(stats.latency) == STAGES
    for latency in stats.latency.values():
        assert 0 < latency.p50 <= latency.p90 <= latency.p99
    parts = sum(stats.latency[stage].p50 for stage in STAGES[:3])
    assert parts <= 1.5 * stats.latency["total"].p99
    assert 10 < stats.memory_mib <= stats.peak_memory_mib
    assert "18 images in 6 batches, 1 shapes planned" in str(stats)
    assert [line.split()[0] for line in str(stats).splitlines()[2:]] == list(STAGES)
    with pytest.raises(ValueError, match="batch_size must be 1 to 3, got 4"):
        predictor.warm_up(batch_size=4)


def test_memory_is_flat_over_alternating_sizes(small):
    predictor = make(small, max_plans=3)
    sizes = [(64, 64), (64, 96), (96, 64), (32, 64)]  # one more than there are plans
    images = [photo(30 + i, 40) for i in range(5)]

    def resident():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return predictor.stats().memory_mib

    def growth(count):
        before = resident()
        for i in range(count):
            predictor(images[i % 5], image_size=sizes[i // 5 % 4])
        return resident() - before

    growths = [growth(200) for _ in range(5)]
    assert predictor.stats().images == 1000
    assert len(predictor._plans) == 3
    # 40 plans are made in each turn: what one of them loses, every turn loses
    assert min(growths[1:]) < 1, growths


# --- on a stand-in for CUDA -----------------------------------------------------------------------


def test_a_shape_is_captured_once(small, monkeypatch):
    expected = {seed: make(small)(photo(seed=seed)) for seed in range(4)}
    cuda_stand_in.install(monkeypatch)
    predictor = make(small)
    for seed in (0, 1, 2, 3, 0, 1):
        assert_same(predictor(photo(seed=seed)), expected[seed])
    assert cuda_stand_in.CUDAGraph.made == 1
    [plan] = predictor._plans.values()
    assert isinstance(plan, graph.Graph)
    assert plan._graph.replays == 5
    stats = predictor.stats()
    assert (stats.memory_mib, stats.peak_memory_mib) == (1, 3)
    for latency in stats.latency.values():
        assert latency.p50 > 0


def test_captures_take_turns(monkeypatch):
    cuda_stand_in.install(monkeypatch)

    def slow(values):
        time.sleep(0.02)
        return [values[0] + 1]

    def make(start):
        inputs = [torch.full((3,), start)]
        return graph.Graph([slow], inputs, (0, 1))(inputs)[0][0]

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(make, [0.0, 1.0, 2.0, 3.0]))
    assert [x.tolist() for x in results] == [[1.0] * 3, [2.0] * 3, [3.0] * 3, [4.0] * 3]


def test_pre_processing_is_in_the_graph(small, monkeypatch):
    """Images of other sizes and dtypes, in batches, have graphs of their own."""
    batches = [
        [photo(100, 70), photo(48, 64, 1)],
        [photo(100, 70, 2), photo(48, 64, 3)],
        [photo(48, 64), photo(48, 64, 1)],
        [torch.rand(3, 40, 50), torch.from_numpy(photo(30, 50)).permute(2, 0, 1)],
    ]
    expected = [make(small)(batch) for batch in batches]
    cuda_stand_in.install(monkeypatch)
    predictor = make(small)
    for _ in range(3):
        for batch, wanted in zip(batches, expected, strict=True):
            for found, right in zip(predictor(batch), wanted, strict=True):
                assert_same(found, right)
    assert cuda_stand_in.CUDAGraph.made == predictor.stats().plans == 3


def test_results_are_not_overwritten_by_the_next_replay(small, monkeypatch):
    cuda_stand_in.install(monkeypatch)
    predictor = make(small)
    results = [predictor(photo(seed=seed)) for seed in (0, 0, 0, 1)]
    assert_same(results[2], results[0])
    assert not torch.equal(results[3].scores, results[2].scores)


def test_what_waits_for_the_device_is_not_captured(small, monkeypatch):
    cuda_stand_in.install(monkeypatch)
    predictor = make(small)
    with edet_kernels.backend("reference"):
        found = [predictor(photo()) for _ in range(3)]
    assert cuda_stand_in.CUDAGraph.made == predictor.stats().plans == 0
    assert_same(found[2], found[0])


def test_uploads_are_waited_for(small, monkeypatch):
    cuda = cuda_stand_in.install(monkeypatch)
    predictor = make(small)
    predictor(photo())
    assert predictor._uploads in cuda.stream_.waited
    on_device = graph.Upload(torch.arange(3), torch.device("cpu"), predictor._uploads).result()
    assert on_device.tolist() == [0, 1, 2]


# --- streams of images ----------------------------------------------------------------------------


@pytest.mark.parametrize("captured", [False, True], ids=["calls", "graphs"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_stream_gives_every_image_in_order(small, monkeypatch, captured, batch_size):
    images = [photo(seed=i) for i in range(10)]
    expected = make(small)(images)
    if captured:
        cuda_stand_in.install(monkeypatch)
    predictor = make(small, batch_size=batch_size)
    found = list(predictor.stream(iter(images), workers=3))
    for image, wanted, x in zip(images, expected, found, strict=True):
        assert x.image is image and x.error is None
        assert x.pixels.shape == (3, 48, 64)
        assert_same(x.detections, wanted)
    assert list(predictor.stream([])) == []


def test_stream_reports_broken_images_in_their_place(small, tmp_path):
    Image.fromarray(photo()).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"junk")
    images = [tmp_path / "bad.png", tmp_path / "good.png", tmp_path / "none.png", 7]
    found = list(make(small, batch_size=2).stream(images))
    assert [x.image for x in found] == images
    assert [type(x.error) for x in found] == [ImageError, type(None), FileNotFoundError, TypeError]
    assert [x.detections is None for x in found] == [True, False, True, True]
    assert len(found[1].detections) == 20


def test_stream_reads_ahead_but_not_far(small):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield photo(seed=taken)

    predictor = make(small, batch_size=2)
    threads = threading.active_count()
    stream = predictor.stream(endless(), workers=2)
    for _ in range(4):
        next(stream)
    assert 4 <= taken <= 4 + 2 * 2 + 2 + 3  # used, waiting, and those in the threads' hands
    stream.close()
    assert threading.active_count() == threads


def test_stream_raises_what_iterating_raises_after_what_came_before(small):
    def images():
        yield photo()
        raise OSError("the camera is gone")

    stream = make(small, batch_size=4).stream(images())
    assert next(stream).error is None
    with pytest.raises(OSError, match="camera"):
        next(stream)


def test_stream_mistakes(small):
    predictor = make(small)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        predictor.stream([photo()], workers=0)
    with pytest.raises(ValueError, match="image_size"):
        predictor.stream([photo()], image_size=(0, 1))
