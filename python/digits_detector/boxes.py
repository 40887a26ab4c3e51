"""Geometry of boxes x1 y1 x2 y2: IoU, the GIoU loss, relative corners, and a greedy non-maximum suppression over a batch of images."""

import torch
from torch import Tensor

EPSILON = 1e-6


def area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of boxes that broadcast against each other, [..., 4] -> [...]."""
    return _iou_and_union(first, second)[0]


def giou_loss(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """1 - GIoU and the IoU of aligned boxes, [..., 4] -> [...]."""
    overlap, union = _iou_and_union(pred, target)
    corners = torch.minimum(pred[..., :2], target[..., :2]), torch.maximum(pred[..., 2:], target[..., 2:])
    enclosing = (corners[1] - corners[0]).clamp(min=0).prod(-1).clamp(min=EPSILON)
    return 1 - overlap + (enclosing - union) / enclosing, overlap


def relative_corners(pred: Tensor, target: Tensor) -> Tensor:
    """Errors of the corners in units of the sides of `target`, [..., 4]; a side below one pixel counts as one."""
    sides = (target[..., 2:] - target[..., :2]).clamp(min=1)
    return (pred - target) / torch.cat([sides, sides], -1)


def _iou_and_union(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    top_left = torch.maximum(first[..., :2], second[..., :2])
    bottom_right = torch.minimum(first[..., 2:], second[..., 2:])
    overlap = (bottom_right - top_left).clamp(min=0).prod(-1)
    union = (area(first) + area(second) - overlap).clamp(min=EPSILON)
    return overlap / union, union


def batched_nms(boxes: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Which of K boxes per image survive, bool [B, K]; boxes [B, K, 4] and labels [B, K] must be sorted by falling score.

    Greedy within a class. One step per rank for all images at once: K small operations, no loop over images.
    """
    suppresses = (iou(boxes[:, :, None], boxes[:, None]) > threshold) & (labels[:, :, None] == labels[:, None])  # [B, K, K]
    suppresses = suppresses.triu(diagonal=1)
    keep = torch.ones_like(labels, dtype=torch.bool)
    for rank in range(labels.shape[1]):
        keep &= ~(suppresses[:, rank] & keep[:, rank, None])
    return keep
