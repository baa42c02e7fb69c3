"""Non-maximum suppression of one image in plain Python: what nms and detect are compared with."""

import math


def overlap(a, b):
    """Intersection over union of two xyxy lists."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if union > 0 else 0


def plain_nms(
    boxes,
    scores,
    labels,
    *,
    method="hard",
    iou_threshold=0.5,
    sigma=0.5,
    score_threshold=0.0,
    max_detections=100,
    class_agnostic=False,
):
    """One image; lists of kept indices and of their scores."""
    left = {i: s for i, s in enumerate(scores) if s > score_threshold}
    kept = []
    while left and len(kept) < max_detections:
        best = max(left, key=lambda i: (left[i], -i))
        kept.append((best, left.pop(best)))
        for i in list(left):
            if labels[i] != labels[best] and not class_agnostic:
                continue
            iou = overlap(boxes[best], boxes[i])
            if method == "gaussian":
                left[i] *= math.exp(-iou * iou / sigma)
                if left[i] <= score_threshold:
                    del left[i]
            elif iou > iou_threshold:
                del left[i]
    return [i for i, _ in kept], [s for _, s in kept]
