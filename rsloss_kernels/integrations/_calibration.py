"""A score threshold from training data, for scores that ranking gave an order but no level; tensors in, a number out."""
import math

import torch
from torch import Tensor


def right_scores(scores: Tensor, labels: Tensor, ious: Tensor, target_labels: Tensor, iou_threshold: float) -> Tensor:
    """Scores, float32 on the CPU, of the detections of an image that are right as in COCO's evaluation.

    By falling score a detection takes the object of its class with the largest IoU, of those that are left, if it is large enough.

    Args:
        scores, labels: [D], of the detections.
        ious: [D, T], with the objects; target_labels: [T].
    """
    order = scores.argsort(descending=True, stable=True)
    ious = torch.where(labels[order][:, None] == target_labels, ious[order], 0.0).cpu()
    is_right = torch.zeros(order.shape[0], dtype=torch.bool)
    for place in range(order.shape[0] if ious.shape[1] else 0):
        best, index = ious[place].max(0)
        if best >= iou_threshold:
            is_right[place] = True
            ious[:, index] = 0
    return scores[order].cpu()[is_right].float()


def threshold_that_keeps(right: list[Tensor], keep: float) -> float | None:
    """The highest number that a share `keep` of the scores is above; None without scores."""
    scores = torch.cat(right).sort(descending=True).values if right else torch.empty(0)
    if scores.numel() == 0:
        return None
    lowest = scores[math.ceil(keep * scores.numel()) - 1]
    # Frameworks keep what is above the threshold, not what is at it.
    return float(torch.nextafter(lowest, torch.zeros_like(lowest)))
