"""MMDetection 3: losses and heads under names that its configurations can use, and the framework's own losses made faster.

In a configuration: `custom_imports = dict(imports=["rsloss_kernels.integrations.mmdet"])`. The import registers everything.
"""
import mmdet.models  # noqa: F401  registers its own first

from rsloss_kernels.integrations.mmdet import losses  # noqa: F401
from rsloss_kernels.integrations.mmdet.losses import RankSortLoss
from rsloss_kernels.integrations.mmdet.ranking import RankedLosses, RankingHead, positive_rows

__all__ = ["RankSortLoss", "RankedLosses", "RankingHead", "positive_rows"]
