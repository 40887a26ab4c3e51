"""Which location answers for which object: centre sampling, the nearer centre where two objects claim one location."""

from typing import NamedTuple

import torch
from torch import Tensor

from digits_detector.model import STRIDES, locations

# A location is positive if it lies in the box and within this many strides of its centre.
RADIUS = 1.5
# Longest sides, in pixels, that the two levels answer for. They overlap: sizes in between are learnt by both.
SIDES = ((0.0, 26.0), (20.0, torch.inf))


class Assignment(NamedTuple):
    labels: Tensor  # int64 [B, A], the number of classes for background
    boxes: Tensor  # [B, A, 4], of the object answered for; of any object where background
    centerness: Tensor  # [B, A] in [0, 1], as in FCOS


def assign(boxes: Tensor, labels: Tensor, num_classes: int, height: int, width: int) -> Assignment:
    """`boxes` [B, M, 4] and `labels` [B, M], -1 where there is no object, for images of `height` by `width`."""
    points, reach, smallest, largest = [], [], [], []
    for stride, (low, high) in zip(STRIDES, SIDES, strict=True):
        level = locations(height // stride, width // stride, stride, boxes.device)
        points.append(level)
        for column, value in ((reach, RADIUS * stride), (smallest, low), (largest, high)):
            column.append(level.new_full((len(level), 1), value))
    points, reach, smallest, largest = (torch.cat(parts) for parts in (points, reach, smallest, largest))  # [A, 2], [A, 1] ...

    center = (boxes[..., :2] + boxes[..., 2:]) / 2
    longest = (boxes[..., 2:] - boxes[..., :2]).amax(-1)[:, None]  # [B, 1, M]
    distance = (points[None, :, None] - center[:, None]).abs().amax(-1)  # [B, A, M]
    sides = torch.cat([points[None, :, None] - boxes[:, None, :, :2], boxes[:, None, :, 2:] - points[None, :, None]], -1)
    is_candidate = (sides.amin(-1) > 0) & (distance < reach) & (longest >= smallest) & (longest < largest)
    distance = torch.where(is_candidate & (labels[:, None] >= 0), distance, torch.inf)
    nearest, chosen = distance.min(-1)  # [B, A]

    assigned_labels = torch.where(nearest.isfinite(), labels.gather(1, chosen), num_classes)
    assigned_boxes = boxes.gather(1, chosen[..., None].expand(-1, -1, 4))
    sides = sides.gather(2, chosen[..., None, None].expand(-1, -1, 1, 4))[:, :, 0].clamp(min=0)
    ratios = torch.minimum(sides[..., :2], sides[..., 2:]) / torch.maximum(sides[..., :2], sides[..., 2:]).clamp(min=1e-6)
    return Assignment(assigned_labels, assigned_boxes, ratios.prod(-1).sqrt())
