"""The losses with the constructors and calls of MMDetection, registered in its `MODELS`.

A loss that MMDetection has as well is registered as `Fused<name>`: FusedFocalLoss, FusedGHMC, ... take the arguments of FocalLoss,
GHMC, ... `patch_mmdet` puts them under the framework's own names.
"""
from mmdet.registry import MODELS
from torch import Tensor, nn
import torch

import rsloss_kernels


class _RankingLoss(nn.Module):
    """Holds the library's module as `ranking_loss`, for the heads of this package, and calls it as MMDetection calls its losses."""

    def __init__(self, ranking_loss: nn.Module, use_sigmoid: bool):
        super().__init__()
        if not use_sigmoid:
            raise NotImplementedError(f"{type(self).__name__}: use_sigmoid must be True, one logit per class without background, got False")
        self.use_sigmoid = use_sigmoid
        self.ranking_loss = ranking_loss


@MODELS.register_module()
class RankSortLoss(_RankingLoss):
    """`rsloss_kernels.RankSortLoss` as `loss_cls`."""

    def __init__(self, delta: float = 0.5, loss_weight: float = 1.0, use_sigmoid: bool = True, **options: object):
        super().__init__(rsloss_kernels.RankSortLoss(delta, loss_weight=loss_weight, **options), use_sigmoid)

    def forward(
        self,
        pred: Tensor,
        target: Tensor | tuple[Tensor, Tensor],
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Ranking + sorting."""
        labels, quality = target if isinstance(target, tuple) else (target, None)
        if weight is not None:
            labels = torch.where(weight > 0, labels, -1)
        return sum(self.ranking_loss(pred, labels, quality))
