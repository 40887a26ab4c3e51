"""Heads for classes of very different frequency: sigmoids (focal, EQL v2, EFL), Seesaw, softmax, and balanced group softmax.

A head turns rows of logits and labels (the number of classes for background) into one loss, and logits into one score per class.
Sums over rows are divided by the number of positives, whatever a loss's authors divide by, so that one weight of the box loss and one
learning rate suit all. Group softmax divides by the rows that it samples.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digits_detector.assignment import Assignment
from digits_detector.boxes import giou_loss
from digits_detector.model import Predictions
from rsloss_kernels import (
    ClassGroups,
    EQLv2Loss,
    EqualizedFocalLoss,
    SeesawLoss,
    group_softmax_loss,
    group_softmax_scores,
    score_weighted_mean,
    sigmoid_focal_loss,
)

# Before training: of a class that is a sigmoid (0.02), and of a background with a logit of its own.
CLASS_LOGIT, BACKGROUND_LOGIT = -4.0, 4.0
# Shares of the most frequent class's count: below the first a class is rare, below the second common.
RARE_SHARE, COMMON_SHARE = 1 / 20, 1 / 4
BOX_WEIGHT = 2.0


class Tail(NamedTuple):
    """How often each class occurs in the training pool."""

    counts: tuple[int, ...]

    @property
    def boundaries(self) -> tuple[int, int]:
        return tuple(math.ceil(share * max(self.counts)) for share in (RARE_SHARE, COMMON_SHARE))

    def kinds(self) -> dict[str, list[int]]:
        """The classes that are frequent, common and rare."""
        rare, common = self.boundaries
        kinds = ["rare" if count < rare else "common" if count < common else "frequent" for count in self.counts]
        return {kind: [number for number, own in enumerate(kinds) if own == kind] for kind in ("frequent", "common", "rare")}

    def groups(self) -> ClassGroups:
        return ClassGroups.from_counts(self.counts, boundaries=self.boundaries)


class LongTailLoss(nn.Module):
    """A head's loss and, unless `with_boxes` is False, a GIoU loss."""

    def __init__(self, head: nn.Module, with_boxes: bool = True):
        super().__init__()
        self.head = head
        self.with_boxes = with_boxes

    def forward(self, predictions: Predictions, assigned: Assignment) -> dict[str, Tensor]:
        is_positive = (assigned.labels < self.head.num_classes).to(predictions.logits.dtype)
        logits, labels = predictions.logits.flatten(0, -2), assigned.labels.flatten()
        losses = {"classification": self.head(logits, labels, is_positive.sum().clamp(min=1))}
        if self.with_boxes:
            giou, _ = giou_loss(predictions.boxes, assigned.boxes)
            losses["box"] = BOX_WEIGHT * score_weighted_mean(giou, is_positive)
        return losses


class FocalHead(nn.Module):
    """One sigmoid per class."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.first_logits = [CLASS_LOGIT] * num_classes

    def forward(self, logits: Tensor, labels: Tensor, num_positives: Tensor) -> Tensor:
        return sigmoid_focal_loss(logits, labels, reduction="sum", avg_factor=num_positives)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()


class EqualizedFocalHead(FocalHead):
    """Equalized focal loss; its state `pos_neg` says how far a class lags behind."""

    def __init__(self, num_classes: int, weighting_factor: bool = True):
        super().__init__(num_classes)
        self.loss = EqualizedFocalLoss(num_classes, weighting_factor=weighting_factor)

    def forward(self, logits: Tensor, labels: Tensor, num_positives: Tensor) -> Tensor:
        return self.loss(logits, labels, avg_factor=num_positives)


class EQLv2Head(nn.Module):
    """A sigmoid per class and one for the background; `focal_gamma` above 0: with the focal loss's modulator."""

    def __init__(self, num_classes: int, focal_gamma: float = 0.0):
        super().__init__()
        self.num_classes = num_classes
        self.first_logits = [CLASS_LOGIT] * num_classes + [BACKGROUND_LOGIT]
        self.loss = EQLv2Loss(num_classes, focal_gamma=focal_gamma)

    def forward(self, logits: Tensor, labels: Tensor, num_positives: Tensor) -> Tensor:
        # Published as a mean over the rows of a second stage, a quarter of which are positive; here hardly any is.
        return self.loss(logits, labels) * (len(labels) / num_positives)

    def scores(self, logits: Tensor) -> Tensor:
        return self.loss.get_activation(logits)[:, : self.num_classes]


class SeesawHead(nn.Module):
    """A softmax over the classes, for positives, and one of foreground and background."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.first_logits = [0.0] * num_classes + [0.0, BACKGROUND_LOGIT]
        self.loss = SeesawLoss(num_classes)

    def forward(self, logits: Tensor, labels: Tensor, num_positives: Tensor) -> Tensor:
        return sum(self.loss(logits, labels, avg_factor=num_positives).values())

    def scores(self, logits: Tensor) -> Tensor:
        return self.loss.get_activation(logits)[:, : self.num_classes]


class SoftmaxHead(nn.Module):
    """A softmax over the classes and, last, the background; with `counts` positives weigh by the inverse frequency of their class."""

    def __init__(self, num_classes: int, counts: tuple[int, ...] | None = None):
        super().__init__()
        self.num_classes = num_classes
        self.first_logits = [0.0] * num_classes + [BACKGROUND_LOGIT]
        weights = None
        if counts is not None:
            # Their mean over the instances of the pool is 1.
            weights = torch.tensor([sum(counts) / (num_classes * count) for count in counts] + [1.0])
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, num_positives: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, self.weights, reduction="sum") / num_positives

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)[:, : self.num_classes]


class GroupSoftmaxHead(nn.Module):
    """Balanced group softmax with `others_ratio` others per foreground row, None for all of them."""

    def __init__(self, tail: Tail, others_ratio: float | None):
        super().__init__()
        self.num_classes = len(tail.counts)
        self.groups = tail.groups()
        self.others_ratio = others_ratio

    def forward(self, logits: Tensor, labels: Tensor, num_positives: Tensor) -> Tensor:
        return group_softmax_loss(logits, labels, self.groups, others_ratio=self.others_ratio, background="last").sum()

    def scores(self, logits: Tensor) -> Tensor:
        return group_softmax_scores(logits, self.groups, background="last")[:, : self.num_classes]


# Trained from the beginning.
HEADS: dict[str, Callable[[int], nn.Module]] = {
    "focal": FocalHead,
    "eqlv2": EQLv2Head,
    "eqlv2_focal": lambda num_classes: EQLv2Head(num_classes, focal_gamma=2.0),
    "efl": EqualizedFocalHead,
    "efl_unweighted": lambda num_classes: EqualizedFocalHead(num_classes, weighting_factor=False),
    "seesaw": SeesawHead,
    "softmax": SoftmaxHead,
}
# Trained on from a detector with softmax.
TUNED_HEADS: dict[str, Callable[[Tail], nn.Module]] = {
    "softmax_tuned": lambda tail: SoftmaxHead(len(tail.counts)),
    "softmax_reweighted": lambda tail: SoftmaxHead(len(tail.counts), tail.counts),
    "bags": lambda tail: GroupSoftmaxHead(tail, 8.0),
    "bags_all_layers": lambda tail: GroupSoftmaxHead(tail, 8.0),
    "bags_no_others": lambda tail: GroupSoftmaxHead(tail, 0.0),
    "bags_ratio_1": lambda tail: GroupSoftmaxHead(tail, 1.0),
    "bags_all_others": lambda tail: GroupSoftmaxHead(tail, None),
}
NAMES = {
    "focal": "focal",
    "eqlv2": "EQL v2",
    "eqlv2_focal": "EQL v2 + focal",
    "efl": "EFL",
    "efl_unweighted": "EFL without weighting factor",
    "seesaw": "Seesaw",
    "softmax": "softmax",
    "softmax_tuned": "softmax, classifier trained on",
    "softmax_reweighted": "softmax, classifier trained on, class weights",
    "bags": "BAGS, classifier only, 8 others",
    "bags_all_layers": "BAGS, all layers, 8 others",
    "bags_no_others": "BAGS, classifier only, no others",
    "bags_ratio_1": "BAGS, classifier only, 1 other",
    "bags_all_others": "BAGS, classifier only, all others",
}
