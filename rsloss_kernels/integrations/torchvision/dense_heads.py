"""RetinaNet's and FCOS's head with a loss of the library: all images and levels in one call, where torchvision loops over images."""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import ops
from torchvision.models.detection import fcos, retinanet

from rsloss_kernels import EQLv2Loss
from rsloss_kernels.integrations._ranking_head import RankingHeadLoss, giou_losses
from rsloss_kernels.integrations.torchvision.class_losses import QUALITY_LOSSES, check_labels, class_loss, make_dense_loss

ELEMENTWISE_BOX_LOSSES = {"l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}
IOU_BOX_LOSSES = {
    "giou": ops.generalized_box_iou_loss,
    "diou": ops.distance_box_iou_loss,
    "ciou": ops.complete_box_iou_loss,
}
# Of the background channel of EQL v2: as rare as objects are in torchvision's first logits, 0.01.
FIRST_BACKGROUND_LOGIT = math.log(99.0)


class Batch(NamedTuple):
    """The rows of all images, one after another, and what belongs to the P positive ones."""

    logits: Tensor  # [R, K]
    labels: Tensor  # [R], 0..K-1, K the background, -1 ignored
    positives: Tensor  # [P], rows
    anchors: Tensor  # [P, 4]
    boxes: Tensor  # [P, 4], of the objects
    offsets: Tensor  # [P, 4], predicted, in float32 or wider
    positives_per_image: Tensor  # [B]


def gather(
    targets: list[dict[str, Tensor]], head_outputs: dict[str, Tensor], anchors: list[Tensor], matched_idxs: list[Tensor]
) -> Batch:
    """Targets in torchvision's form: `matched_idxs` [A] per image, the index of an object, -1 the background, -2 ignored."""
    logits = head_outputs["cls_logits"].flatten(0, 1)
    num_classes = logits.shape[1]
    labels = torch.cat([target["labels"] for target in targets])
    check_labels(labels, num_classes)
    # What rows without an object point at, where no image has any.
    labels = F.pad(labels, (0, 1), value=num_classes)
    boxes = F.pad(torch.cat([target["boxes"] for target in targets]), (0, 0, 0, 1))
    objects, first = [], 0
    for matched, target in zip(matched_idxs, targets, strict=True):
        objects.append(matched.clamp(min=0) + first)
        first += target["labels"].shape[0]
    objects = torch.cat(objects)
    matched = torch.stack(matched_idxs)  # [B, A]
    is_positive = matched >= 0
    without_object = torch.where(matched == -1, num_classes, -1)
    positives = is_positive.flatten().nonzero().squeeze(1)
    return Batch(
        logits,
        torch.where(is_positive, labels[objects].view_as(matched), without_object).flatten(),
        positives,
        torch.cat(anchors)[positives],
        boxes[objects[positives]],
        _in_full_precision(head_outputs["bbox_regression"].flatten(0, 1)[positives]),
        is_positive.sum(1),
    )


def _in_full_precision(values: Tensor) -> Tensor:
    """Under autocast boxes would be decoded in 16 bits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _HeadWithLoss:
    """What both heads share. `loss` is a RankingHeadLoss, or a loss of the class logits alone."""

    loss: nn.Module
    log: dict[str, Tensor]

    def set_loss(self, loss: str | nn.Module, **options: object) -> None:
        classifier = self.classification_head
        channels = classifier.num_classes
        # On the device of the head, which may have been moved already.
        self.loss = make_dense_loss(loss, channels, **options).to(classifier.cls_logits.weight.device)
        self.log = {}
        if isinstance(self.loss, EQLv2Loss):
            # Nothing has ever been trained to be of class 0; as a background channel it starts out sure of it.
            with torch.no_grad():
                classifier.cls_logits.weight[::channels] = 0
                classifier.cls_logits.bias[::channels] = FIRST_BACKGROUND_LOGIT

    @property
    def is_ranking(self) -> bool:
        return isinstance(self.loss, RankingHeadLoss)

    def decode(self, batch: Batch) -> Tensor:
        """Predicted boxes of the positives, [P, 4]."""
        raise NotImplementedError

    def rank(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The losses of classes and boxes by ranking."""
        box_losses, ious = giou_losses(self.decode(batch), batch.boxes)
        result = self.loss(batch.logits, batch.labels, batch.positives, box_losses, ious)
        self.log = {**{name: loss.detach() for name, loss in result.classification.items()}, **result.log}
        return sum(result.classification.values()), result.box

    def classify(self, batch: Batch, row_weights: Tensor | None = None) -> Tensor:
        """The loss of the classes by any other loss; `row_weights` normalise the focal loss."""

        def quality() -> Tensor:
            with torch.no_grad():
                _, ious = giou_losses(self.decode(batch), batch.boxes)
            return torch.zeros_like(batch.labels, dtype=ious.dtype).index_copy(0, batch.positives, ious.clamp(0, 1))

        num_positives = batch.positives.shape[0]
        self.log = {"num_positives": torch.full((), float(num_positives), device=batch.logits.device)}
        return class_loss(self.loss, batch.logits, batch.labels, row_weights, num_positives, quality)

    def score(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs for inference, where the model takes the sigmoid of all channels."""
        if isinstance(self.loss, EQLv2Loss):
            scores = self.loss.get_activation(outputs["cls_logits"].roll(-1, -1))[..., :-1]
            background = torch.full_like(scores[..., :1], -torch.inf)
            outputs = {**outputs, "cls_logits": torch.cat([background, scores.logit()], -1)}
        return outputs


class RetinaNetHead(_HeadWithLoss, retinanet.RetinaNetHead):
    """torchvision's RetinaNetHead with a loss of this library: `RetinaNet(backbone, num_classes, head=RetinaNetHead(...))`.

    Parameters, their names and what comes out are torchvision's. Ranking losses (`loss` "rank_sort", "ap", "alrp") train the boxes by
    GIoU, weighted by score and balanced (see RankingHeadLoss), and want `score_thresh=0` of the model; all others keep the box loss of
    the head. "focal" gives torchvision's values: sums over the positives of each image, their mean over the images. The others divide
    by the positives of all images, GHM by itself. "eqlv2" takes channel 0 as its background channel: labels are 1..K-1 then.

    `log`, after each step of a ranking loss, on every process and without positives too: "bbox_unbalanced", "SB_weight", "num_positives",
    "positives_iou" and the parts of the ranking loss, 0-d and detached; of other losses "num_positives".

    Args:
        in_channels, num_anchors, num_classes, norm_layer: as in torchvision.
        loss: a name in DENSE_LOSSES, a module of the library, or a RankingHeadLoss.
        options: keywords of the loss that `loss` names.
    """

    def __init__(
        self,
        in_channels: int,
        num_anchors: int,
        num_classes: int,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        loss: str | nn.Module = "rank_sort",
        **options: object,
    ):
        super().__init__(in_channels, num_anchors, num_classes, norm_layer)
        self.set_loss(loss, **options)

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        outputs = super().forward(x)
        return outputs if self.training else self.score(outputs)

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Tensor], anchors: list[Tensor], matched_idxs: list[Tensor]
    ) -> dict[str, Tensor]:
        batch = gather(targets, head_outputs, anchors, matched_idxs)
        if self.is_ranking:
            classification, box = self.rank(batch)
        else:
            # The mean over the images of sums over the positives of each.
            weights = 1 / (batch.positives_per_image.clamp(min=1).double() * len(targets))  # [B]
            row_weights = weights[:, None].expand(-1, matched_idxs[0].shape[0]).flatten()
            classification = self.classify(batch, row_weights)
            box_losses = self.box_losses(batch)
            box = (box_losses * row_weights[batch.positives].to(box_losses.dtype)).sum()
        return {"classification": classification, "bbox_regression": box}

    def decode(self, batch: Batch) -> Tensor:
        return self.regression_head.box_coder.decode_single(batch.offsets, batch.anchors)

    def box_losses(self, batch: Batch) -> Tensor:
        """The head's own kind of box loss, of each positive, [P]."""
        kind = self.regression_head._loss_type
        if kind in ELEMENTWISE_BOX_LOSSES:
            wanted = self.regression_head.box_coder.encode_single(batch.boxes, batch.anchors)
            return ELEMENTWISE_BOX_LOSSES[kind](batch.offsets, wanted, reduction="none").sum(-1)
        return IOU_BOX_LOSSES[kind](self.decode(batch), batch.boxes, reduction="none")


class FCOSHead(_HeadWithLoss, fcos.FCOSHead):
    """torchvision's FCOSHead with a loss of this library: `FCOS(backbone, num_classes, head=FCOSHead(...))`.

    As RetinaNetHead, with FCOS's normalisation by the positives of all images. Losses whose score is the quality of the box (ranking
    losses, quality focal, varifocal, EQFL) need no centre-ness: it is neither trained (its parameters require no gradient) nor in the
    score, which is the sigmoid of the logit then.

    Args:
        in_channels, num_anchors, num_classes, num_convs: as in torchvision.
        loss, options: see RetinaNetHead.
    """

    def __init__(
        self,
        in_channels: int,
        num_anchors: int,
        num_classes: int,
        num_convs: int | None = 4,
        *,
        loss: str | nn.Module = "rank_sort",
        **options: object,
    ):
        super().__init__(in_channels, num_anchors, num_classes, num_convs)
        self.set_loss(loss, **options)

    def set_loss(self, loss: str | nn.Module, **options: object) -> None:
        super().set_loss(loss, **options)
        self.regression_head.bbox_ctrness.requires_grad_(self.has_centerness)

    @property
    def has_centerness(self) -> bool:
        return not (self.is_ranking or isinstance(self.loss, QUALITY_LOSSES))

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        outputs = super().forward(x)
        if self.training:
            return outputs
        outputs = self.score(outputs)
        # The model's score is the geometric mean of two sigmoids.
        return outputs if self.has_centerness else {**outputs, "bbox_ctrness": outputs["cls_logits"]}

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Tensor], anchors: list[Tensor], matched_idxs: list[Tensor]
    ) -> dict[str, Tensor]:
        batch = gather(targets, head_outputs, anchors, matched_idxs)
        if self.is_ranking:
            classification, box = self.rank(batch)
            return {"classification": classification, "bbox_regression": box}
        count = max(1, batch.positives.shape[0])
        losses = {
            "classification": self.classify(batch),
            "bbox_regression": ops.generalized_box_iou_loss(self.decode(batch), batch.boxes, reduction="sum") / count,
        }
        if self.has_centerness:
            predicted = _in_full_precision(head_outputs["bbox_ctrness"].flatten()[batch.positives])
            wanted = centerness(self.box_coder.encode(batch.anchors, batch.boxes))
            losses["bbox_ctrness"] = F.binary_cross_entropy_with_logits(predicted, wanted, reduction="sum") / count
        return losses

    def decode(self, batch: Batch) -> Tensor:
        return self.box_coder.decode(batch.offsets, batch.anchors)


def centerness(offsets: Tensor) -> Tensor:
    """[P, 4], distances to the left, top, right and bottom side, -> [P]."""
    pairs = offsets.view(-1, 2, 2)  # [[left, top], [right, bottom]]
    return (pairs.amin(1) / pairs.amax(1)).prod(-1).sqrt()
