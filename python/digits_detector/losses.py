"""The three losses compared: focal, focal with centerness, Rank & Sort. Each turns predictions and an assignment into named parts.

No boolean indexing: every row is computed and weighted by 0 where it is background, so nothing waits for a GPU.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from digits_detector.assignment import Assignment
from digits_detector.boxes import giou_loss
from digits_detector.model import Predictions
from rsloss_kernels import RankSortLoss, SelfBalancing, score_weights

LOSSES = ("focal", "focal_centerness", "rank_sort")
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
FIXED_BOX_WEIGHT = 2.0
# Focal loss needs rare classes to start out rare: sigmoid(-4) is about 0.02. A ranking loss sees differences of logits only; around 0
# the sigmoids of its score weights differ mildly, far below it they would be proportional to exp(logit) and heed a few boxes only.
FIRST_LOGIT = {"focal": -4.0, "focal_centerness": -4.0, "rank_sort": 0.0}
# A positive of quality 0 would be a negative in the dense form of the targets, which the published loop reads.
SMALLEST_QUALITY = 1e-6


def make_loss(name: str, use_score_weights: bool = True, box_weight: float | None = None) -> nn.Module:
    """`box_weight` None: self-balancing for Rank & Sort, 2 for the others."""
    if name == "rank_sort":
        return RankSortDetectionLoss(use_score_weights, box_weight)
    if name in LOSSES:
        return FocalDetectionLoss(name == "focal_centerness", FIXED_BOX_WEIGHT if box_weight is None else box_weight)
    raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {name!r}")


def score(predictions: Predictions, loss_name: str) -> Tensor:
    """Scores [B, A, C] that rank detections."""
    scores = predictions.logits.sigmoid()
    if loss_name == "focal_centerness":
        scores = (scores * predictions.centerness.sigmoid()[..., None]).sqrt()
    return scores


class FocalDetectionLoss(nn.Module):
    """Sigmoid focal loss + GIoU loss, both over the number of positives; with centerness: its own loss, and its weight on the boxes."""

    def __init__(self, use_centerness: bool, box_weight: float):
        super().__init__()
        self.use_centerness = use_centerness
        self.box_weight = box_weight

    def forward(self, predictions: Predictions, assigned: Assignment) -> dict[str, Tensor]:
        num_classes = predictions.logits.shape[-1]
        is_positive = (assigned.labels < num_classes).float()
        count = is_positive.sum().clamp(min=1)
        losses = {"classification": focal_loss_sum(predictions.logits, assigned.labels) / count}
        weights = is_positive * assigned.centerness if self.use_centerness else is_positive
        giou, _ = giou_loss(predictions.boxes, assigned.boxes)
        losses["box"] = self.box_weight * weighted_mean(giou, weights)
        if self.use_centerness:
            errors = F.binary_cross_entropy_with_logits(predictions.centerness, assigned.centerness, reduction="none")
            losses["centerness"] = (errors * is_positive).sum() / count
        return losses


class RankSortDetectionLoss(nn.Module):
    """Rank & Sort over all logits of the batch + GIoU loss weighted by the scores and balanced by its value."""

    def __init__(self, use_score_weights: bool, box_weight: float | None):
        super().__init__()
        self.classification = RankSortLoss()
        self.use_score_weights = use_score_weights
        self.box_weight = box_weight
        self.balancing = SelfBalancing() if box_weight is None else None

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
        loss = weighted_mean(giou, weights)
        return loss * self.box_weight if self.balancing is None else self.balancing(reference, loss)


def focal_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017; logits [..., C], labels [...] with C for background."""
    num_classes = logits.shape[-1]
    targets = F.one_hot(labels, num_classes + 1)[..., :num_classes].to(logits.dtype)
    probability = logits.sigmoid()
    miss = probability + targets - 2 * probability * targets
    alpha = FOCAL_ALPHA * targets + (1 - FOCAL_ALPHA) * (1 - targets)
    return (alpha * miss**FOCAL_GAMMA * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")).sum()


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1e-12)
