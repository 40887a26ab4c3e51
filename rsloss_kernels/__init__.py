"""Losses for object detectors as fused kernels: Rank & Sort, AP and aLRP loss with self-balancing and score weights, GHM-C and
GHM-R, the focal family, equalized focal loss, EQL v2, Seesaw, balanced group softmax, smooth L1 and Dynamic R-CNN."""
from rsloss_kernels import _backends, _ext

_ext.load()

from rsloss_kernels._backends import backend_report, use_backend  # noqa: E402
from rsloss_kernels.losses.ranking import op as _ranking_op  # noqa: E402, F401
from rsloss_kernels.losses.alrp import op as _alrp_op  # noqa: E402, F401
from rsloss_kernels.losses.ap import op as _ap_op  # noqa: E402, F401
from rsloss_kernels.losses.focal import op as _focal_op  # noqa: E402, F401
from rsloss_kernels.losses.ghm import op as _ghm_op  # noqa: E402, F401
from rsloss_kernels.losses.group_softmax import op as _group_softmax_op  # noqa: E402, F401
from rsloss_kernels.losses.rank_sort import op as _rank_sort_op  # noqa: E402, F401
from rsloss_kernels.losses.seesaw import op as _seesaw_op  # noqa: E402, F401
from rsloss_kernels.losses.smooth_l1 import op as _smooth_l1_op  # noqa: E402, F401
from rsloss_kernels.losses.alrp.api import ALRPLoss, ALRPLosses, alrp_loss, alrp_regression_loss  # noqa: E402
from rsloss_kernels.losses.ap.api import APLoss, average_precision_loss  # noqa: E402
from rsloss_kernels.losses.dynamic_rcnn.assignment import DynamicLabelAssignment, assign_by_iou  # noqa: E402
from rsloss_kernels.losses.dynamic_rcnn.regression import DynamicSmoothL1Loss  # noqa: E402
from rsloss_kernels.losses.equalized_focal.api import (  # noqa: E402
    EqualizedLoss,
    eqlv2_loss,
    equalized_focal_loss,
    equalized_quality_focal_loss,
)
from rsloss_kernels.losses.equalized_focal.modules import (  # noqa: E402
    EQLv2Loss,
    EqualizedFocalLoss,
    EqualizedQualityFocalLoss,
)
from rsloss_kernels.losses.focal.api import quality_focal_loss, sigmoid_focal_loss, varifocal_loss  # noqa: E402
from rsloss_kernels.losses.focal.modules import QualityFocalLoss, SigmoidFocalLoss, VarifocalLoss  # noqa: E402
from rsloss_kernels.losses.ghm.api import (  # noqa: E402
    GHMCorrectedLoss,
    GHMLoss,
    GradientDensity,
    ghm_classification_loss,
    ghm_regression_loss,
    gradient_density,
)
from rsloss_kernels.losses.ghm.authentic_smooth_l1 import authentic_smooth_l1_loss  # noqa: E402
from rsloss_kernels.losses.ghm.modules import GHMC, GHMR  # noqa: E402
from rsloss_kernels.losses.group_softmax.api import group_softmax_loss, group_softmax_scores  # noqa: E402
from rsloss_kernels.losses.group_softmax.groups import ClassGroups  # noqa: E402
from rsloss_kernels.losses.group_softmax.modules import GroupSoftmaxLoss, convert_classifier  # noqa: E402
from rsloss_kernels.losses.rank_sort.api import RankSortLoss, RankSortLosses, rank_sort_loss  # noqa: E402
from rsloss_kernels.losses.seesaw.api import SeesawLosses, seesaw_loss  # noqa: E402
from rsloss_kernels.losses.seesaw.modules import SeesawLoss  # noqa: E402
from rsloss_kernels.losses.self_balancing.api import SelfBalancing, score_weighted_mean, score_weights  # noqa: E402
from rsloss_kernels.losses.smooth_l1.api import smooth_l1_loss  # noqa: E402
from rsloss_kernels.version import __version__  # noqa: E402

_backends.look_up_reasons()

__all__ = [
    "ALRPLoss",
    "ALRPLosses",
    "APLoss",
    "ClassGroups",
    "DynamicLabelAssignment",
    "DynamicSmoothL1Loss",
    "EQLv2Loss",
    "EqualizedFocalLoss",
    "EqualizedLoss",
    "EqualizedQualityFocalLoss",
    "GHMC",
    "GHMCorrectedLoss",
    "GHMLoss",
    "GHMR",
    "GradientDensity",
    "GroupSoftmaxLoss",
    "QualityFocalLoss",
    "RankSortLoss",
    "RankSortLosses",
    "SeesawLoss",
    "SeesawLosses",
    "SelfBalancing",
    "SigmoidFocalLoss",
    "VarifocalLoss",
    "__version__",
    "alrp_loss",
    "alrp_regression_loss",
    "assign_by_iou",
    "authentic_smooth_l1_loss",
    "average_precision_loss",
    "backend_report",
    "convert_classifier",
    "eqlv2_loss",
    "equalized_focal_loss",
    "equalized_quality_focal_loss",
    "ghm_classification_loss",
    "ghm_regression_loss",
    "gradient_density",
    "group_softmax_loss",
    "group_softmax_scores",
    "quality_focal_loss",
    "rank_sort_loss",
    "score_weighted_mean",
    "score_weights",
    "seesaw_loss",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "use_backend",
    "varifocal_loss",
]
