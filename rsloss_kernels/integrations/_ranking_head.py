"""What heads that are trained by ranking share whatever the framework: tensors in, tensors out.

The classes are ranked over all rows of the batch at once. The box loss is the mean over the positives, each weighted by its score,
scaled to the size of the ranking loss (Rank & Sort, AP), or ranked with the scores and balanced over a period (aLRP).
"""
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rsloss_kernels import _checks
from rsloss_kernels.losses.alrp.api import ALRPLoss, alrp_regression_loss
from rsloss_kernels.losses.ap.api import APLoss
from rsloss_kernels.losses.rank_sort.api import RankSortLoss
from rsloss_kernels.losses.self_balancing.api import DEFAULT_PERIOD, SelfBalancing, score_weighted_mean, score_weights

RANKING_LOSSES = (RankSortLoss, APLoss, ALRPLoss)
# As published: what an area is at least where it divides.
SMALLEST_AREA = 1e-6
# Frameworks add up all that they find under a name with "loss" in it, so these have none.
LOGGED = ("bbox_unbalanced", "SB_weight", "num_positives", "positives_iou")


class RankingHeadLosses(NamedTuple):
    """Train with the sum of `classification` and `box`."""

    classification: dict[str, Tensor]  # 0-d: "rank" and "sort"; or "ap"; or "alrp"
    box: Tensor  # 0-d
    log: dict[str, Tensor]  # 0-d, detached, under the names in LOGGED, without positives too


class RankingHeadLoss(nn.Module):
    """A ranking loss of the classes together with its box loss.

    Args:
        classification: RankSortLoss, APLoss or ALRPLoss, with the index form's background last. Its process group, if any, is that of
            the mean of the box losses and of the balancing too.
        box_weight: None: the box loss is self-balanced, step by step for Rank & Sort and AP, over `balancing_period` for aLRP. A
            number: it is multiplied by that instead.
        balancing_period: of aLRP, steps between two factors; the iterations of an epoch as published.
        score_weighted: whether positives weigh in the mean of the box losses by their score (Rank & Sort, AP), else alike.
        loss_weight: factor of everything, after the balancing: 0.2 for the RPN of the Rank & Sort paper.

    `balancing.SB_weight` is in the checkpoints. Raises TypeError, ValueError for wrong arguments.
    """

    def __init__(
        self,
        classification: RankSortLoss | APLoss | ALRPLoss,
        *,
        box_weight: float | None = None,
        balancing_period: int = DEFAULT_PERIOD,
        score_weighted: bool = True,
        loss_weight: float = 1.0,
    ):
        super().__init__()
        if not isinstance(classification, RANKING_LOSSES):
            wanted = ", ".join(loss.__name__ for loss in RANKING_LOSSES)
            raise TypeError(f"RankingHeadLoss: classification must be one of {wanted}, got {type(classification).__name__}")
        if classification.background != "last":
            raise ValueError(f"RankingHeadLoss: the background must be last, got {classification.background!r}")
        self.classification = classification
        self.box_weight = box_weight
        self.score_weighted = score_weighted
        self.loss_weight = loss_weight
        self.balancing = None
        if box_weight is None:
            group = classification.process_group
            is_running = isinstance(classification, ALRPLoss)
            self.balancing = (
                SelfBalancing("running", balancing_period, process_group=group) if is_running else SelfBalancing(process_group=group)
            )

    def forward(self, logits: Tensor, labels: Tensor, positives: Tensor, box_losses: Tensor, ious: Tensor) -> RankingHeadLosses:
        """The losses of a batch: all images and levels in one call.

        Args:
            logits: [A, C], of all rows.
            labels: [A], integers: 0..C-1 the positives, C the background, negative: ignored.
            positives: [P], int64, ascending: the rows whose label is a positive. Empty without positives. A row of the box loss alone
                may have another label, except for aLRP.
            box_losses: [P], floating, of the positives' boxes; the gradient of the boxes flows through it alone.
            ious: [P], floating, of the predicted boxes with their objects, detached here.

        Returns 0-d losses, exact zeros that are connected to the graph without positives.
        """
        ious = ious.detach().clamp(0, 1)
        classification, reference, box = self._rank(logits, labels, positives, box_losses, ious)
        unscaled = box.detach()
        box = box * self.box_weight if self.balancing is None else self.balancing(reference, box)
        factor = torch.full_like(unscaled, self.box_weight) if self.balancing is None else self.balancing.SB_weight.clone()
        count = torch.full_like(unscaled, positives.shape[0])
        log = dict(zip(LOGGED, (unscaled, factor, count, ious.sum() / count.clamp(min=1)), strict=True))
        classification = {name: loss * self.loss_weight for name, loss in classification.items()}
        return RankingHeadLosses(classification, box * self.loss_weight, log)

    def _rank(
        self, logits: Tensor, labels: Tensor, positives: Tensor, box_losses: Tensor, ious: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The parts of the ranking loss, what the box loss is balanced against, and the box loss."""
        loss = self.classification
        group = {"process_group": loss.process_group, "average_gradients": loss.average_gradients}
        if isinstance(loss, ALRPLoss):
            classification, rank, order = loss(logits, labels, box_losses)
            return {"alrp": classification}, classification, alrp_regression_loss(box_losses, rank, order, **group)
        if isinstance(loss, RankSortLoss):
            quality = torch.zeros(labels.shape, dtype=ious.dtype, device=ious.device).index_copy(0, positives, ious)
            ranking, sorting = loss(logits, labels, quality)
            parts, reference = {"rank": ranking, "sort": sorting}, ranking + sorting
        else:
            reference = loss(logits, labels)
            parts = {"ap": reference}
        if self.score_weighted:
            weights = score_weights(logits[positives], torch.zeros_like(labels[positives]))
        else:
            weights = torch.ones_like(ious)
        return parts, reference, score_weighted_mean(box_losses, weights, **group)

    def extra_repr(self) -> str:
        return f"box_weight={self.box_weight}, score_weighted={self.score_weighted}, loss_weight={self.loss_weight}"


def giou_losses(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """GIoU losses and IoUs of aligned boxes x1 y1 x2 y2, [P, 4] -> [P] each, in float32 or wider; the IoUs are detached.

    As in the code of Rank & Sort: areas are at least 1e-6 where they divide, and boxes that are turned inside out are not repaired.
    """
    for name, boxes in (("pred", pred), ("target", target)):
        _checks.check_floating("giou_losses", name, boxes)
    dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    pred, target = pred.to(dtype), target.to(dtype)
    inner = (torch.minimum(pred[:, 2:], target[:, 2:]) - torch.maximum(pred[:, :2], target[:, :2])).clamp(min=0)
    outer = torch.maximum(pred[:, 2:], target[:, 2:]) - torch.minimum(pred[:, :2], target[:, :2])
    overlap = inner[:, 0] * inner[:, 1]
    enclosing = outer[:, 0] * outer[:, 1]
    union = _areas(pred) + _areas(target) - overlap
    ious = overlap / union.clamp(min=SMALLEST_AREA)
    losses = 1 - ious + (enclosing - union) / enclosing.clamp(min=SMALLEST_AREA)
    return losses, ious.detach()


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
