"""A score threshold for a model whose scores have an order but no level."""
import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import box_iou


def threshold_holder(model: nn.Module) -> nn.Module:
    """The module with the attribute `score_thresh`."""
    return model.roi_heads if isinstance(model, GeneralizedRCNN) else model


@torch.no_grad()
def calibrate_score_thresh(
    model: nn.Module,
    batches: Iterable[tuple[list[Tensor], list[dict[str, Tensor]]]],
    *,
    keep: float = 0.99,
    iou_thresh: float = 0.5,
) -> float:
    """Sets the model's score threshold to the highest that keeps nearly all right detections of some training data.

    Args:
        model: RetinaNet, FCOS or Faster R-CNN of torchvision; its mode (training or not) is as before afterwards.
        batches: of (images, targets) as in training; a hundred images or so will do.
        keep: the share of the right detections that stay, within (0, 1]. A detection is right as in COCO's evaluation: by falling
            score it takes the object of its class with the largest IoU, of those that are left, if that is at least `iou_thresh`.

    Returns the threshold, which the model has now: 0, with a warning, where no detection is right.

    Raises ValueError: `keep` out of range.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"calibrate_score_thresh: keep must be within (0, 1], got {keep}")
    holder = threshold_holder(model)
    was_training = model.training
    holder.score_thresh = 0.0
    model.eval()
    right = []
    try:
        for images, targets in batches:
            right += [right_scores(found, target, iou_thresh) for found, target in zip(model(images), targets, strict=True)]
    finally:
        model.train(was_training)
    scores = torch.cat(right).sort(descending=True).values if right else torch.empty(0)
    if scores.numel() == 0:
        warnings.warn("calibrate_score_thresh: no detection is right, the threshold is 0", stacklevel=2)
        return 0.0
    lowest = scores[math.ceil(keep * scores.numel()) - 1]
    # The model keeps what is above its threshold, not what is at it.
    holder.score_thresh = float(torch.nextafter(lowest, torch.zeros_like(lowest)))
    return holder.score_thresh


def right_scores(found: dict[str, Tensor], target: dict[str, Tensor], iou_thresh: float) -> Tensor:
    """Scores of the detections of an image that are right."""
    order = found["scores"].argsort(descending=True)
    ious = box_iou(found["boxes"][order], target["boxes"].to(found["boxes"]))
    ious = torch.where(found["labels"][order][:, None] == target["labels"].to(order.device), ious, 0.0).cpu()
    is_right = torch.zeros(order.shape[0], dtype=torch.bool)
    for place in range(order.shape[0] if ious.shape[1] else 0):
        best, index = ious[place].max(0)
        if best >= iou_thresh:
            is_right[place] = True
            ious[:, index] = 0
    return found["scores"][order].cpu()[is_right].float()
