"""The losses compared: focal, focal with centerness, Rank & Sort, AP, aLRP; and GHM. Each turns predictions and an assignment into
named parts.

No boolean indexing: every row is computed and weighted by 0 where it is background, so nothing waits for a GPU. `process_group`: None,
or "default" to rank, average and balance over the batch of all processes, with gradients for a reducer that averages.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from digits_detector.assignment import Assignment
from digits_detector.boxes import giou_loss
from digits_detector.class_and_box_loss import PAIRS, ClassAndBoxLoss
from digits_detector.class_losses import focal_loss_sum, over_positives
from digits_detector.model import Predictions
from rsloss_kernels import (
    ALRPLoss,
    APLoss,
    RankSortLoss,
    SelfBalancing,
    alrp_regression_loss,
    score_weighted_mean,
    score_weights,
)

LOSSES = ("focal", "focal_centerness", "rank_sort", "ap", "alrp")
ALL_LOSSES = (*LOSSES, "ghm", *(name for name in PAIRS if name != "ghm"))
FIXED_BOX_WEIGHT = 2.0
# Losses that take every logit by itself need rare classes to start out rare: sigmoid(-4) is about 0.02. A ranking loss sees differences
# of logits only; around 0 the sigmoids of its score weights differ mildly, far below it they would be proportional to exp(logit) and
# heed a few boxes only.
FIRST_LOGIT = {"focal": -4.0, "focal_centerness": -4.0, "rank_sort": 0.0, "ap": 0.0, "alrp": 0.0} | dict.fromkeys(PAIRS, -4.0)
# A positive of quality 0 would be a negative in the dense form of the targets, which the published loop reads.
SMALLEST_QUALITY = 1e-6


def make_loss(
    name: str,
    use_score_weights: bool = True,
    box_weight: float | None = None,
    process_group: str | None = None,
    epoch_steps: int = 400,
) -> nn.Module:
    """`box_weight` None: self-balancing for the ranking losses, 2 for the others, 10 for GHM-R. `epoch_steps`: the period of the
    running form of balancing."""
    if name == "rank_sort":
        return RankSortDetectionLoss(use_score_weights, box_weight, process_group)
    if name == "ap":
        return APDetectionLoss(use_score_weights, box_weight, process_group)
    if name == "alrp":
        return ALRPDetectionLoss(box_weight, process_group, epoch_steps)
    if name in LOSSES:
        weight = FIXED_BOX_WEIGHT if box_weight is None else box_weight
        return FocalDetectionLoss(name == "focal_centerness", weight, process_group)
    if name in PAIRS:
        return ClassAndBoxLoss(name, box_weight, process_group)
    raise ValueError(f"loss must be one of {', '.join(ALL_LOSSES)}, got {name!r}")


def score(predictions: Predictions, loss_name: str) -> Tensor:
    """Scores [B, A, C] that rank detections."""
    scores = predictions.logits.sigmoid()
    if loss_name == "focal_centerness":
        scores = (scores * predictions.centerness.sigmoid()[..., None]).sqrt()
    return scores


class FocalDetectionLoss(nn.Module):
    """Sigmoid focal loss + GIoU loss, both over the number of positives; with centerness: its own loss, and its weight on the boxes."""

    def __init__(self, use_centerness: bool, box_weight: float, process_group: str | None = None):
        super().__init__()
        self.use_centerness = use_centerness
        self.box_weight = box_weight
        self.process_group = process_group

    def forward(self, predictions: Predictions, assigned: Assignment) -> dict[str, Tensor]:
        num_classes = predictions.logits.shape[-1]
        is_positive = (assigned.labels < num_classes).float()
        focal = focal_loss_sum(predictions.logits, assigned.labels)
        losses = {"classification": over_positives(focal, is_positive, self.process_group)}
        weights = is_positive * assigned.centerness if self.use_centerness else is_positive
        giou, _ = giou_loss(predictions.boxes, assigned.boxes)
        losses["box"] = self.box_weight * score_weighted_mean(giou, weights, process_group=self.process_group)
        if self.use_centerness:
            errors = F.binary_cross_entropy_with_logits(predictions.centerness, assigned.centerness, reduction="none")
            losses["centerness"] = over_positives((errors * is_positive).sum(), is_positive, self.process_group)
        return losses


class RankSortDetectionLoss(nn.Module):
    """Rank & Sort over all logits of the batch + GIoU loss weighted by the scores and balanced by its value."""

    def __init__(self, use_score_weights: bool, box_weight: float | None, process_group: str | None = None):
        super().__init__()
        self.classification = RankSortLoss(process_group=process_group)
        self.use_score_weights = use_score_weights
        self.box_weight = box_weight
        self.process_group = process_group
        self.balancing = SelfBalancing(process_group=process_group) if box_weight is None else None

    def forward(self, predictions: Predictions, assigned: Assignment) -> dict[str, Tensor]:
        giou, quality = self.boxes_and_quality(predictions, assigned)
        ranking, sorting = self.classification(predictions.logits, assigned.labels, quality)
        return {"ranking": ranking, "sorting": sorting, "box": self.box(ranking + sorting, giou, predictions, assigned)}

    def boxes_and_quality(self, predictions: Predictions, assigned: Assignment) -> tuple[Tensor, Tensor]:
        giou, overlap = giou_loss(predictions.boxes, assigned.boxes)
        return giou, overlap.detach().clamp(SMALLEST_QUALITY, 1)

    def box(self, reference: Tensor, giou: Tensor, predictions: Predictions, assigned: Assignment) -> Tensor:
        if self.use_score_weights:
            weights = score_weights(predictions.logits, assigned.labels)
        else:
            weights = (assigned.labels < predictions.logits.shape[-1]).float()
        loss = score_weighted_mean(giou, weights, process_group=self.process_group)
        return loss * self.box_weight if self.balancing is None else self.balancing(reference, loss)


class APDetectionLoss(RankSortDetectionLoss):
    """AP loss in place of Rank & Sort, its box loss as there."""

    def __init__(self, use_score_weights: bool, box_weight: float | None, process_group: str | None = None):
        super().__init__(use_score_weights, box_weight, process_group)
        self.classification = APLoss(process_group=process_group)

    def forward(self, predictions: Predictions, assigned: Assignment) -> dict[str, Tensor]:
        giou, _ = giou_loss(predictions.boxes, assigned.boxes)
        ap = self.classification(predictions.logits, assigned.labels)
        return {"ap": ap, "box": self.box(ap, giou, predictions, assigned)}


class ALRPDetectionLoss(nn.Module):
    """aLRP: the localisation errors are ranked with the scores, and balanced by the means of an epoch."""

    def __init__(self, box_weight: float | None, process_group: str | None = None, epoch_steps: int = 400):
        super().__init__()
        self.classification = ALRPLoss(process_group=process_group)
        self.box_weight = box_weight
        self.process_group = process_group
        if box_weight is None:
            self.balancing = SelfBalancing("running", period=epoch_steps, process_group=process_group)

    def forward(self, predictions: Predictions, assigned: Assignment) -> dict[str, Tensor]:
        giou, _ = giou_loss(predictions.boxes, assigned.boxes)
        classification, rank, order = self.classification(predictions.logits, assigned.labels, giou)
        box = alrp_regression_loss(giou, rank, order, process_group=self.process_group)
        box = box * self.box_weight if self.box_weight is not None else self.balancing(classification, box)
        return {"classification": classification, "box": box}
