"""A score threshold for a detector whose scores have an order but no level."""
import warnings
from collections.abc import Iterable

import torch
from mmdet.structures.bbox import bbox_overlaps, get_box_tensor
from torch import nn

from rsloss_kernels.integrations._calibration import right_scores, threshold_that_keeps


@torch.no_grad()
def calibrate_score_thr(model: nn.Module, batches: Iterable[dict], *, keep: float = 0.99, iou_threshold: float = 0.5) -> float:
    """Sets `test_cfg.score_thr` of a trained detector to the highest value that keeps nearly all right detections of training data.

    Args:
        model: a one-stage or two-stage detector; its mode (training or not) is as before afterwards.
        batches: as a data loader gives them, "inputs" and "data_samples" with their objects; a hundred images or so will do.
        keep: the share of the right detections that stay, within (0, 1].
        iou_threshold: from which on a detection is right.

    Returns the threshold, which the head's `test_cfg` has from now on, with `score_thr_is_calibrated`: write both into the
    configuration. 0, with a warning, where no detection is right.

    Raises ValueError: `keep` out of range.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"calibrate_score_thr: keep must be within (0, 1], got {keep}")
    head = model.roi_head if getattr(model, "with_roi_head", False) else model.bbox_head
    was_training = model.training
    head.test_cfg.score_thr = 0.0
    model.eval()
    right = []
    try:
        for batch in batches:
            data = model.data_preprocessor(batch, training=False)
            for sample in model.predict(data["inputs"], data["data_samples"], rescale=False):
                found, objects = sample.pred_instances, sample.gt_instances
                ious = bbox_overlaps(get_box_tensor(found.bboxes), get_box_tensor(objects.bboxes).to(found.bboxes.dtype))
                right.append(right_scores(found.scores, found.labels, ious, objects.labels, iou_threshold))
    finally:
        model.train(was_training)
    threshold = threshold_that_keeps(right, keep)
    if threshold is None:
        warnings.warn("calibrate_score_thr: no detection is right, the threshold is 0", stacklevel=2)
        threshold = 0.0
    head.test_cfg.score_thr = threshold
    head.test_cfg.score_thr_is_calibrated = True
    return threshold
