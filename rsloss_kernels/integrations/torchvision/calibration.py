"""A score threshold for a model whose scores have an order but no level."""
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import box_iou

from rsloss_kernels.integrations._calibration import right_scores, threshold_that_keeps


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
            for found, target in zip(model(images), targets, strict=True):
                ious = box_iou(found["boxes"], target["boxes"].to(found["boxes"]))
                right.append(right_scores(found["scores"], found["labels"], ious, target["labels"].to(ious.device), iou_thresh))
    finally:
        model.train(was_training)
    threshold = threshold_that_keeps(right, keep)
    if threshold is None:
        warnings.warn("calibrate_score_thresh: no detection is right, the threshold is 0", stacklevel=2)
        return 0.0
    holder.score_thresh = threshold
    return threshold
