"""MMDetection 3: losses and heads for its configurations, and the framework's own losses replaced by faster ones.

In a configuration: `custom_imports = dict(imports=["rsloss_kernels.integrations.mmdet"])`; the import registers everything in `MODELS`.
Or, before models are built: `from rsloss_kernels.integrations.mmdet import patch_mmdet; print(patch_mmdet())`.
"""
from rsloss_kernels.integrations._frameworks import check_installed

check_installed("mmdet", "mmcv", "mmdet")

import mmdet.models  # noqa: F401  registers its own first

from rsloss_kernels.integrations.mmdet.calibration import calibrate_score_thr
from rsloss_kernels.integrations.mmdet.dense_heads import FlatRetinaHead, RankSortATSSHead, RankSortRetinaHead, RankSortRPNHead
from rsloss_kernels.integrations.mmdet.dynamic_roi_head import FusedDynamicRoIHead
from rsloss_kernels.integrations.mmdet.group_softmax import GroupSoftmaxLoss, read_class_counts
from rsloss_kernels.integrations.mmdet.losses import FUSED, ALRPLoss, APLoss, RankSortLoss
from rsloss_kernels.integrations.mmdet.mask_head import RankSortMaskHead, RankSortRoIHead
from rsloss_kernels.integrations.mmdet.patch import MMDetPatch, patch_mmdet, unpatch_mmdet
from rsloss_kernels.integrations.mmdet.ranking import RankedLosses, RankingHead, positive_rows
from rsloss_kernels.integrations.mmdet.roi_heads import RankSortBBoxHead

__all__ = [
    "ALRPLoss",
    "APLoss",
    "FUSED",
    "FlatRetinaHead",
    "FusedDynamicRoIHead",
    "GroupSoftmaxLoss",
    "MMDetPatch",
    "RankSortATSSHead",
    "RankSortBBoxHead",
    "RankSortLoss",
    "RankSortMaskHead",
    "RankSortRPNHead",
    "RankSortRetinaHead",
    "RankSortRoIHead",
    "RankedLosses",
    "RankingHead",
    "calibrate_score_thr",
    "patch_mmdet",
    "positive_rows",
    "read_class_counts",
    "unpatch_mmdet",
]
