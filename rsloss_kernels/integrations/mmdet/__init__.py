"""MMDetection 3: losses and heads for its configurations, and the framework's own losses replaced by faster ones.

In a configuration: `custom_imports = dict(imports=["rsloss_kernels.integrations.mmdet"])`; the import registers everything in `MODELS`.
Or, before models are built: `from rsloss_kernels.integrations.mmdet import patch_mmdet; print(patch_mmdet())`.
"""
import mmdet.models  # noqa: F401  registers its own first

from rsloss_kernels.integrations.mmdet.dense_heads import FlatRetinaHead, RankSortATSSHead, RankSortRetinaHead, RankSortRPNHead
from rsloss_kernels.integrations.mmdet.losses import FUSED, ALRPLoss, APLoss, RankSortLoss
from rsloss_kernels.integrations.mmdet.patch import MMDetPatch, patch_mmdet, unpatch_mmdet
from rsloss_kernels.integrations.mmdet.ranking import RankedLosses, RankingHead, positive_rows

__all__ = [
    "ALRPLoss",
    "APLoss",
    "FUSED",
    "FlatRetinaHead",
    "MMDetPatch",
    "RankSortATSSHead",
    "RankSortLoss",
    "RankSortRPNHead",
    "RankSortRetinaHead",
    "RankedLosses",
    "RankingHead",
    "patch_mmdet",
    "positive_rows",
    "unpatch_mmdet",
]
