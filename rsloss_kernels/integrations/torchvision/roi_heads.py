"""Faster R-CNN's box head with a loss of the library, and with what Dynamic R-CNN changes in it."""
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import roi_heads
from torchvision.ops import box_iou

from rsloss_kernels import DynamicLabelAssignment, DynamicSmoothL1Loss, assign_by_iou
from rsloss_kernels.integrations._ranking_head import RankingHeadLoss, giou_losses
from rsloss_kernels.integrations.torchvision.class_losses import check_labels

# As in torchvision.
SMOOTH_L1_BETA = 1 / 9


def rebound(function: Callable, **names: object) -> Callable:
    """`function` with other values for some names of its module.

    torchvision's RoIHeads calls the loss and the softmax as functions of its module rather than as methods. Its code runs as it is,
    masks and keypoints included, and nothing is changed for other models.
    """
    missing = set(names) - set(function.__code__.co_names)
    if missing:
        raise RuntimeError(f"{function.__qualname__} of this torchvision does not use {', '.join(sorted(missing))}")
    return types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__, function.__closure__
    )


class _ScoresAreGiven:
    """In place of torch.nn.functional, where the class logits are scores already."""

    @staticmethod
    def softmax(scores: Tensor, dim: int) -> Tensor:
        return scores


class RoIHeads(roi_heads.RoIHeads):
    """torchvision's RoIHeads with a loss of the classes, with a dynamic assignment and with a dynamic smooth L1 loss; each may be None.

    `class_loss`: GroupSoftmaxLoss, EQLv2Loss or SeesawLoss, which also gives the scores; or RankingHeadLoss, whose scores are sigmoids
    of C logits and which has a box loss of its own, GIoU. The classifier has as many channels as the loss asks for.
    `label_assignment`: DynamicLabelAssignment, in place of `proposal_matcher`. `smooth_l1`: DynamicSmoothL1Loss, in place of a beta of
    1/9; both normalise as torchvision, by the sampled boxes.

    `log`, after each training step: "iou_threshold" and "beta" of that step, where they are dynamic; of a ranking loss its parts ("rank"
    and "sort", "ap" or "alrp"), "bbox_unbalanced", "SB_weight", "num_positives" and "positives_iou", without positives too.
    """

    class_loss: nn.Module | None
    label_assignment: DynamicLabelAssignment | None
    smooth_l1: DynamicSmoothL1Loss | None
    log: dict[str, Tensor]

    def forward(self, *args, **kwargs):
        return rebound(roi_heads.RoIHeads.forward, fastrcnn_loss=self.box_head_losses)(self, *args, **kwargs)

    def box_head_losses(
        self, class_logits: Tensor, box_regression: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The losses of the classifier and of the boxes; all images in one call of each loss."""
        num_images = len(labels)
        labels, targets = torch.cat(labels), torch.cat(regression_targets)
        check_labels(labels.clamp(min=0), box_regression.shape[1] // 4)
        positives = (labels > 0).nonzero().squeeze(1)
        boxes = box_regression.view(labels.shape[0], -1, 4)[positives, labels[positives]]
        if isinstance(self.class_loss, RankingHeadLoss):
            return self.rank(class_logits, boxes, labels, targets[positives], positives)
        count = max(1, labels.numel())
        if self.smooth_l1 is None:
            box = F.smooth_l1_loss(boxes, targets[positives], beta=SMOOTH_L1_BETA, reduction="sum") / count
        else:
            self.log["beta"] = self.smooth_l1.beta.clone()
            box = self.smooth_l1(boxes, targets[positives], reduction_override="sum") / count
            self.smooth_l1.update(targets, labels > 0, num_images=num_images)
        return self.classify(class_logits, labels), box

    def rank(
        self, class_logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor, positives: Tensor
    ) -> tuple[Tensor, Tensor]:
        # GIoU is the same whatever the proposal that both boxes are decoded from: it cancels from every ratio of areas.
        unit = boxes.new_tensor([0, 0, 1, 1], dtype=torch.float32).expand(boxes.shape)
        box_losses, ious = giou_losses(*(self.box_coder.decode_single(codes.float(), unit) for codes in (boxes, targets)))
        losses = self.class_loss(class_logits, self.with_background_last(labels, class_logits.shape[1]), positives, box_losses, ious)
        self.log.update({name: loss.detach() for name, loss in losses.classification.items()} | losses.log)
        # Connected to the boxes where nothing is positive.
        return sum(losses.classification.values()), losses.box + boxes.sum() * 0

    @staticmethod
    def with_background_last(labels: Tensor, num_classes: int) -> Tensor:
        return torch.where(labels > 0, labels - 1, torch.where(labels == 0, num_classes, -1))

    def classify(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        if self.class_loss is None:
            return F.cross_entropy(class_logits, labels)
        if self.is_background_last:
            labels = self.with_background_last(labels, self.class_loss.num_classes)
        losses = self.class_loss(class_logits, labels)
        return sum(losses.values()) if isinstance(losses, dict) else losses

    @property
    def is_background_last(self) -> bool:
        """In the loss's channels and labels; in torchvision it is first."""
        return getattr(self.class_loss, "background", "last") == "last"

    def postprocess_detections(self, class_logits: Tensor, *args, **kwargs):
        detect = super().postprocess_detections
        if self.class_loss is None:
            return detect(class_logits, *args, **kwargs)
        if isinstance(self.class_loss, RankingHeadLoss):
            scores = F.pad(class_logits.sigmoid(), (1, 0))
        else:
            scores = self.class_loss.get_activation(class_logits)
            if self.is_background_last:
                scores = scores.roll(1, -1)
        return rebound(detect.__func__, F=_ScoresAreGiven)(self, scores, *args, **kwargs)

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        if self.label_assignment is None:
            return super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        threshold = self.label_assignment.iou_threshold
        self.log["iou_threshold"] = threshold.clone()
        matched, labels, overlaps = [], [], []
        for boxes, objects, classes in zip(proposals, gt_boxes, gt_labels, strict=True):
            if objects.shape[0] == 0:
                best, index = boxes.new_zeros(boxes.shape[0]), torch.zeros(boxes.shape[0], dtype=torch.int64, device=boxes.device)
                label = torch.zeros_like(index)
            else:
                best, index = box_iou(objects, boxes).max(0)
                label = torch.where(assign_by_iou(best, threshold) == 1, classes[index], 0)
            matched.append(index)
            labels.append(label)
            # The objects themselves stand behind the proposals; MMDetection's statistics leave them out.
            counted = best.shape[0] if self.label_assignment.variant == "original" else best.shape[0] - objects.shape[0]
            overlaps.append(best[:counted])
        self.label_assignment.update(overlaps)
        return matched, labels
