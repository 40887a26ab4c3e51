"""Detection losses put together from one for the classes and one for the boxes: what each does about easy examples and outliers.

GHM-C with the paper's 30 bins and momentum 0.75, GHM-R with its 10 bins and momentum 0.7. Its mu of 0.02 belongs to a detector whose
errors are a few percent of a box; in a short training they are a tenth, and with mu 0.02 nearly all of them would be outliers in the
last bin, which counts no more than the few accidental hits in any other. Both losses correct the bias of the first steps, whose
weights would otherwise be 1 / (1 - momentum) times too large. Both normalise themselves; the other losses are sums over the number of
positives. Their state is in the checkpoints with the rest.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digits_detector.assignment import Assignment
from digits_detector.boxes import relative_corners
from digits_detector.class_losses import cross_entropy_sum, focal_loss_sum, hard_example_sum, over_positives
from digits_detector.model import Predictions
from rsloss_kernels import GHMC, GHMR, authentic_smooth_l1_loss

CLASS_BINS, CLASS_MOMENTUM = 30, 0.75
BOX_BINS, BOX_MOMENTUM, MU = 10, 0.7, 0.1
SMOOTH_L1_BETA = 1 / 9
SUMS = {"ce": cross_entropy_sum, "ohem": hard_example_sum, "focal": focal_loss_sum}
CLASS_LOSSES = (*SUMS, "ghm_c")
# Weights of the box losses. GHM-R is a mean over the bins of gradient norms, small where most errors are; 10 as in the paper's code.
BOX_WEIGHTS = {"smooth_l1": 2.0, "asl1": 2.0, "ghm_r": 10.0}
# Names of the settings: any of the first with any of the second, and "ghm" for GHM-C with GHM-R.
PAIRS = {f"{classes}+{boxes}": (classes, boxes) for classes in CLASS_LOSSES for boxes in BOX_WEIGHTS}
PAIRS["ghm"] = PAIRS.pop("ghm_c+ghm_r")
LOSS_NAMES = {"ce": "CE", "ohem": "OHEM", "focal": "focal", "ghm_c": "GHM-C"}
LOSS_NAMES |= {"smooth_l1": "smooth L1", "asl1": "ASL1", "ghm_r": "GHM-R"}


class ClassAndBoxLoss(nn.Module):
    """Boxes are compared by their corners in units of the object's sides: GHM-R needs errors of one scale, whatever the object's."""

    def __init__(self, name: str, box_weight: float | None = None, process_group: str | None = None):
        super().__init__()
        self.class_loss, self.box_loss = PAIRS[name]
        self.box_weight = BOX_WEIGHTS[self.box_loss] if box_weight is None else box_weight
        self.process_group = process_group
        if self.class_loss == "ghm_c":
            self.ghm_c = GHMC(CLASS_BINS, CLASS_MOMENTUM, bias_correction=True, process_group=process_group)
        if self.box_loss == "ghm_r":
            self.ghm_r = GHMR(MU, BOX_BINS, BOX_MOMENTUM, bias_correction=True, process_group=process_group)

    def forward(self, predictions: Predictions, assigned: Assignment) -> dict[str, Tensor]:
        is_positive = (assigned.labels < predictions.logits.shape[-1]).to(predictions.boxes.dtype)
        classification = self.of_classes(predictions.logits, assigned.labels, is_positive)
        return {"classification": classification, "box": self.box_weight * self.of_boxes(predictions.boxes, assigned, is_positive)}

    def of_classes(self, logits: Tensor, labels: Tensor, is_positive: Tensor) -> Tensor:
        if self.class_loss == "ghm_c":
            return self.ghm_c(logits, labels)
        return over_positives(SUMS[self.class_loss](logits, labels), is_positive, self.process_group)

    def of_boxes(self, boxes: Tensor, assigned: Assignment, is_positive: Tensor) -> Tensor:
        corners, wanted = relative_corners(boxes, assigned.boxes), torch.zeros_like(boxes)
        weights = is_positive[..., None].expand(boxes.shape)
        if self.box_loss == "ghm_r":
            return self.ghm_r(corners, wanted, weights)
        if self.box_loss == "asl1":
            total = authentic_smooth_l1_loss(corners, wanted, weights, mu=MU, reduction="sum")
        else:
            total = (F.smooth_l1_loss(corners, wanted, reduction="none", beta=SMOOTH_L1_BETA) * weights).sum()
        return over_positives(total, is_positive, self.process_group)
