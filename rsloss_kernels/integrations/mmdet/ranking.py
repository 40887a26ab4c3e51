"""What every head of MMDetection that is trained by ranking shares, whatever makes its rows: anchors, points or regions."""
import warnings
from typing import NamedTuple

import torch
from mmdet.structures.bbox import bbox_overlaps
from torch import Tensor

from rsloss_kernels import RankSortLoss
from rsloss_kernels.integrations._ranking_head import RankingHeadLoss
from rsloss_kernels.losses.self_balancing.api import DEFAULT_PERIOD


class RankedLosses(NamedTuple):
    """Of one head and step."""

    losses: dict[str, Tensor]  # 0-d: what the head returns. MMDetection adds up those whose key holds "loss" and logs the others
    reference: Tensor  # 0-d, detached: the classification loss, what other tasks (masks) are balanced against
    rows: Tensor  # [P], the positives, ascending


class RankingHead:
    """Mixin before a head that builds `loss_cls` and `loss_bbox`: `ranked_losses` takes the place of what it would do with them.

    `loss_cls` is RankSortLoss, APLoss or ALRPLoss of this package, `loss_bbox` any loss of one number per box, such as GIoULoss.

    The keys of the losses are the same for every batch, and so on every process. Without positives the losses are zeros that are
    connected to logits and boxes, so that no process waits for a gradient.
    """

    def init_ranking(
        self,
        *,
        box_weight: float | None = None,
        balancing_period: int = DEFAULT_PERIOD,
        score_weighted: bool = True,
        head_weight: float = 1.0,
    ) -> None:
        """Once in each head, when `loss_cls` and `loss_bbox` are built: the state of the balancing belongs to the head.

        Args:
            box_weight: None: self-balancing (a weight of `loss_bbox` then cancels). A number: factor of the box loss.
            balancing_period: of an ALRPLoss, the iterations of an epoch.
            score_weighted: whether positives weigh in the box loss by their score.
            head_weight: factor of all losses of the head.
        """
        if not hasattr(self.loss_cls, "ranking_loss"):
            name = type(self.loss_cls).__name__
            raise TypeError(f"{type(self).__name__}: loss_cls must be RankSortLoss, APLoss or ALRPLoss, got {name}")
        boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 2, 2]])
        with torch.no_grad():
            shape = list(self.loss_bbox(boxes, boxes, reduction_override="none").shape)
        if shape != [2]:
            raise ValueError(
                f"{type(self).__name__}: loss_bbox must give one number per box, as GIoULoss does, but {type(self.loss_bbox).__name__} gives "
                f"{shape} for 2 boxes"
            )
        options = {"box_weight": box_weight, "balancing_period": balancing_period, "score_weighted": score_weighted}
        self.ranking = RankingHeadLoss(self.loss_cls.ranking_loss, **options, loss_weight=head_weight)

    def ranked_losses(
        self, logits: Tensor, labels: Tensor, label_weights: Tensor, rows: Tensor, boxes: Tensor, box_targets: Tensor
    ) -> RankedLosses:
        """The losses of all rows of a batch, by one call of the ranking loss.

        Args:
            logits: [A, C], of all images and levels.
            labels: [A], 0..C-1 foreground, C background.
            label_weights: [A]; a row of weight 0 is ignored. How large a weight is does not matter.
            rows: [P], `positive_rows(labels, label_weights, C)`.
            boxes, box_targets: [P, 4], x1 y1 x2 y2, of these rows. Rank & Sort ranks a row whose box has no overlap with its target
                as a negative; its box loss remains.

        Returns:
            "loss_rank" and "loss_sort" (Rank & Sort), "loss_ap" or "loss_alrp"; "loss_bbox"; and detached, to be logged, the names in
            `_ranking_head.LOGGED`: the box loss before it is scaled, its factor, P and the mean IoU of the positives.
        """
        boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
        box_targets = box_targets.to(boxes.dtype)
        ious = bbox_overlaps(boxes.detach(), box_targets, is_aligned=True)
        # MMDetection's overlap of no boxes is not connected to them.
        box_losses = self.loss_bbox(boxes, box_targets, reduction_override="none") if len(rows) else boxes.sum(-1)
        labels = torch.where(label_weights > 0, labels, -1)
        if isinstance(self.ranking.classification, RankSortLoss):
            # As published: to be sorted last among the positives means to be a negative.
            labels = labels.index_copy(0, rows, torch.where(ious == 0, logits.shape[1], labels[rows]))
        parts, box, log = self.ranking(logits, labels, rows, box_losses, ious)
        losses = {f"loss_{name}": value for name, value in parts.items()} | {"loss_bbox": box}
        reference = sum(parts.values()).detach() / self.ranking.loss_weight
        return RankedLosses(losses | {name: value.float() for name, value in log.items()}, reference, rows)


def positive_rows(labels: Tensor, label_weights: Tensor, num_classes: int) -> Tensor:
    """[P]: the rows that are foreground, 0..num_classes-1, and not ignored, ascending. Waits for the device, as MMDetection does."""
    return ((labels >= 0) & (labels < num_classes) & (label_weights > 0)).nonzero().squeeze(1)


def warn_of_score_threshold(name: str, test_cfg: dict | None) -> None:
    """Warns of a score threshold that a configuration for another loss brings along; `name` is the head's."""
    threshold = (test_cfg or {}).get("score_thr", 0)
    if threshold > 0 and not test_cfg.get("score_thr_is_calibrated", False):
        warnings.warn(
            f"{name}: test_cfg.score_thr is {threshold}, but ranking orders scores without giving them a level: set it to 0 (max_per_img "
            "alone then limits the detections), or after training to what calibrate_score_thr finds, with score_thr_is_calibrated=True",
            stacklevel=4,
        )
