"""Rank & Sort in the box heads of Faster and Cascade R-CNN: C sigmoid logits, no background class, every proposal used.

    bbox_head=dict(type="RankSortBBoxHead", loss_cls=dict(type="RankSortLoss", use_sigmoid=True), loss_bbox=dict(type="GIoULoss"))

over a config's `Shared2FCBBoxHead`; roi_heads.md has whole configs.
"""
import warnings
from typing import NamedTuple

import torch
from mmdet.models.roi_heads.bbox_heads import ConvFCBBoxHead
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.registry import MODELS
from mmdet.structures.bbox import get_box_tensor
from mmdet.utils import ConfigType, InstanceList
from torch import Tensor, nn

from rsloss_kernels import score_weights
from rsloss_kernels.integrations.mmdet.ranking import RankedLosses, RankingHead, positive_rows, warn_of_score_threshold


class RankedPositives(NamedTuple):
    """What a box head leaves on the sampling result of each image, for heads that train on the same positives (masks)."""

    reference: Tensor  # 0-d, detached: the classification loss of the batch
    weights: Tensor  # [P], detached: score weights of the image's positives


class SigmoidScores(nn.Module):
    """A ranking loss with what MMDetection's bbox heads and cascades ask of theirs: one logit per class, scores by sigmoid.

    Args:
        loss: config of `RankSortLoss`, `APLoss` or `ALRPLoss`.
    """

    custom_cls_channels = True
    custom_activation = True

    def __init__(self, loss: ConfigType):
        super().__init__()
        built = MODELS.build(loss)
        if not hasattr(built, "ranking_loss"):
            raise TypeError(f"RankSortBBoxHead: loss_cls must be RankSortLoss, APLoss or ALRPLoss, got {type(built).__name__}")
        self.ranking_loss = built.ranking_loss

    def get_cls_channels(self, num_classes: int) -> int:
        """Logits of a proposal: no background."""
        return num_classes

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """[A, C] logits -> [A, C + 1] scores, at least float32; that of the background, which MMDetection drops, is 0."""
        scores = cls_score.to(torch.promote_types(cls_score.dtype, torch.float32)).sigmoid()
        return torch.cat([scores, scores.new_zeros(len(scores), 1)], 1)


@MODELS.register_module()
class RankSortBBoxHead(RankingHead, ConvFCBBoxHead):
    """`ConvFCBBoxHead` trained by a ranking loss (Oksuz et al., Rank & Sort, ICCV 2021), for Faster and Cascade R-CNN.

    All proposals of all images are ranked in one call; a positive's quality is the IoU of its decoded box. The box loss is weighted
    by the scores and balanced against the classification loss, by each stage of a cascade for itself.

    Args:
        num_shared_fcs: as in `ConvFCBBoxHead`, but 2 by default, as in `Shared2FCBBoxHead`.
        loss_cls: `RankSortLoss` (the default), `APLoss` or `ALRPLoss`.
        loss_bbox: of decoded boxes, one number per box; `GIoULoss` by default.
        ranking: keywords of `RankingHead.init_ranking`.
        The others are those of `ConvFCBBoxHead`; boxes are always decoded.

    The classifier has `num_classes` channels, the scores are their sigmoids. Without positives all losses are zeros that are
    connected to the graph. (The authors' are then the constant 1 without a gradient; no option does that.)
    """

    def __init__(
        self,
        *args: object,
        num_shared_fcs: int = 2,
        loss_cls: dict | None = None,
        loss_bbox: dict | None = None,
        ranking: dict | None = None,
        **kwargs: object,
    ):
        if not kwargs.setdefault("reg_decoded_bbox", True):
            raise ValueError(f"{type(self).__name__}: reg_decoded_bbox must be True: the IoU of decoded boxes ranks them")
        super().__init__(
            *args,
            num_shared_fcs=num_shared_fcs,
            loss_cls={"type": SigmoidScores, "loss": loss_cls or {"type": "RankSortLoss"}},
            loss_bbox=loss_bbox or {"type": "GIoULoss"},
            **kwargs,
        )
        self.init_ranking(**(ranking or {}))
        self.is_sampler_checked = False

    def loss_and_target(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        rois: Tensor,
        sampling_results: list[SamplingResult],
        rcnn_train_cfg: ConfigType,
        concat: bool = True,
        reduction_override: str | None = None,
    ) -> dict:
        """As in `BBoxHead`, targets of all images in one; each sampling result gets an attribute `ranked`, RankedPositives."""
        self._check_reduction(reduction_override)
        self._check_sampler(sampling_results, rcnn_train_cfg)
        targets = self.get_targets(sampling_results, rcnn_train_cfg, concat=True)
        rows = rows_of_positives(sampling_results)
        ranked = self._ranked(cls_score, bbox_pred, rois, *targets[:3], rows)
        weights = score_weights(cls_score[rows], targets[0][rows])
        counts = [len(result.pos_priors) for result in sampling_results]
        for result, weights_of_image in zip(sampling_results, weights.split(counts), strict=True):
            result.ranked = RankedPositives(ranked.reference, weights_of_image)
        return dict(loss_bbox=ranked.losses, bbox_targets=targets)

    def loss(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        rois: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        bbox_weights: Tensor | None = None,
        reduction_override: str | None = None,
    ) -> dict[str, Tensor]:
        """The losses of proposals whose targets are known.

        Args:
            cls_score: [A, C], logits.
            bbox_pred: [A, 4 C], or [A, 4] if class-agnostic.
            rois: [A, 5], the image's number and the box.
            labels: [A], 0..C-1, C the background; label_weights: [A], rows of weight 0 are ignored.
            bbox_targets: [A, 4], boxes of the objects, read where there is one. bbox_weights are not used.
            reduction_override: None; a ranking has no other.

        Returns the losses and what is logged, see `RankingHead.ranked_losses`.
        """
        self._check_reduction(reduction_override)
        rows = positive_rows(labels, label_weights, self.num_classes)
        return self._ranked(cls_score, bbox_pred, rois, labels, label_weights, bbox_targets, rows).losses

    def predict_by_feat(
        self,
        rois: tuple[Tensor, ...],
        cls_scores: tuple[Tensor, ...],
        bbox_preds: tuple[Tensor, ...],
        batch_img_metas: list[dict],
        rcnn_test_cfg: ConfigType | None = None,
        rescale: bool = False,
    ) -> InstanceList:
        """As in `BBoxHead`; warns of a score threshold that is not said to be calibrated."""
        warn_of_score_threshold(type(self).__name__, rcnn_test_cfg)
        return super().predict_by_feat(rois, cls_scores, bbox_preds, batch_img_metas, rcnn_test_cfg, rescale)

    def _check_reduction(self, reduction_override: str | None) -> None:
        if reduction_override is not None:
            name = type(self).__name__
            raise ValueError(f"{name}: reduction_override must be None, a ranking has no other, got {reduction_override!r}")

    def _check_sampler(self, sampling_results: list[SamplingResult], rcnn_train_cfg: ConfigType) -> None:
        """Warns once where the sampler leaves proposals out, as configurations for other losses have it."""
        limit = (rcnn_train_cfg.get("sampler") or {}).get("num")
        if self.is_sampler_checked or limit is None:
            return
        if any(len(result.pos_priors) + len(result.neg_priors) >= limit for result in sampling_results):
            self.is_sampler_checked = True
            warnings.warn(
                f"{type(self).__name__}: train_cfg.rcnn.sampler.num is {limit}: proposals that it leaves out are not ranked. Ranking needs "
                "no sampler, set it to 10**9",
                stacklevel=3,
            )

    def _ranked(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        rois: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        rows: Tensor,
    ) -> RankedLosses:
        # 16 bits under autocast are too few for the coordinates.
        deltas = bbox_pred[rows].to(torch.promote_types(bbox_pred.dtype, rois.dtype))
        if not self.reg_class_agnostic:
            size = self.bbox_coder.encode_size
            of_class = labels[rows].view(-1, 1, 1).expand(-1, 1, size)
            deltas = deltas.view(-1, self.num_classes, size).gather(1, of_class).squeeze(1)
        boxes = get_box_tensor(self.bbox_coder.decode(rois[rows, 1:], deltas))
        return self.ranked_losses(cls_score, labels, label_weights, rows, boxes, bbox_targets[rows])


def rows_of_positives(sampling_results: list[SamplingResult]) -> Tensor:
    """[P]: where the positives lie among the proposals of all images, first in each. Reads nothing from the device."""
    rows, start = [], 0
    for result in sampling_results:
        count = len(result.pos_priors)
        rows.append(torch.arange(start, start + count, device=result.pos_priors.device))
        start += count + len(result.neg_priors)
    return torch.cat(rows)
