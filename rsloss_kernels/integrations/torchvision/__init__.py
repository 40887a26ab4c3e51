"""Losses of the library in torchvision's detection models, and Dynamic R-CNN in its Faster R-CNN.

    from rsloss_kernels.integrations.torchvision import use_loss

    model = use_loss(retinanet_resnet50_fpn(weights=None, num_classes=91), "rank_sort")
"""
from rsloss_kernels.integrations._frameworks import check_installed

check_installed("torchvision", "torchvision")

from rsloss_kernels.integrations._ranking_head import RankingHeadLoss
from rsloss_kernels.integrations.torchvision.calibration import calibrate_score_thresh
from rsloss_kernels.integrations.torchvision.class_losses import DENSE_LOSSES, ROI_LOSSES
from rsloss_kernels.integrations.torchvision.dense_heads import FCOSHead, RetinaNetHead
from rsloss_kernels.integrations.torchvision.swap import step_log, use_dynamic_rcnn, use_loss

__all__ = [
    "DENSE_LOSSES",
    "ROI_LOSSES",
    "FCOSHead",
    "RankingHeadLoss",
    "RetinaNetHead",
    "calibrate_score_thresh",
    "step_log",
    "use_dynamic_rcnn",
    "use_loss",
]
