"""One-stage heads and RPN whose losses see all levels and images of a batch at once: ranked, or in a single call of any loss."""
import warnings

import torch
from mmdet.models.dense_heads import ATSSHead, RetinaHead, RPNHead
from mmdet.models.task_modules.samplers import PseudoSampler
from mmdet.models.utils import images_to_levels
from mmdet.registry import MODELS
from mmdet.structures.bbox import cat_boxes, get_box_tensor
from torch import Tensor

from rsloss_kernels.integrations.mmdet.ranking import RankingHead, positive_rows, warn_of_score_threshold


class _Rows:
    """Mixin before an AnchorHead: what its maps and targets are as rows, one per anchor, levels and images one after another."""

    def rows_of(self, maps: list[Tensor], channels: int) -> Tensor:
        """[A, channels] of maps [N, anchors * channels, H, W]."""
        return torch.cat([level.permute(0, 2, 3, 1).reshape(-1, channels) for level in maps])

    def targets_of(
        self, cls_scores: list[Tensor], batch_gt_instances: list, batch_img_metas: list[dict], batch_gt_instances_ignore: list | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        """Anchors [A, 4], labels and their weights [A], box targets and their weights [A, 4], and the framework's average factor."""
        sizes = [level.shape[-2:] for level in cls_scores]
        anchors, flags = self.get_anchors(sizes, batch_img_metas, device=cls_scores[0].device)
        targets = self.get_targets(
            [list(levels) for levels in anchors],
            flags,
            batch_gt_instances,
            batch_img_metas,
            batch_gt_instances_ignore=batch_gt_instances_ignore,
        )
        *targets, avg_factor = targets
        if len(targets) == 4:  # ATSSHead returns the anchors, AnchorHead does not
            sizes = [len(level) for level in anchors[0]]
            targets = [images_to_levels([get_box_tensor(cat_boxes(levels)) for levels in anchors], sizes), *targets]
        anchors, labels, label_weights, box_targets, box_weights = targets
        of_coordinates = [torch.cat([level.reshape(-1, 4) for level in levels]) for levels in (anchors, box_targets, box_weights)]
        labels, label_weights = (torch.cat([level.flatten() for level in levels]) for levels in (labels, label_weights))
        return of_coordinates[0], labels, label_weights, *of_coordinates[1:], avg_factor


class _RankingDenseHead(_Rows, RankingHead):
    """Mixin: boxes are compared as boxes, and one call ranks the anchors of a batch."""

    def __init__(
        self,
        *args: object,
        loss_cls: dict | None = None,
        loss_bbox: dict | None = None,
        ranking: dict | None = None,
        **kwargs: object,
    ):
        if not kwargs.setdefault("reg_decoded_bbox", True):
            raise ValueError(f"{type(self).__name__}: reg_decoded_bbox must be True: the IoU of decoded boxes ranks them")
        loss_cls = {"type": "RankSortLoss", **(loss_cls or {})}
        loss_cls.setdefault("use_sigmoid", True)
        super().__init__(*args, loss_cls=loss_cls, loss_bbox=loss_bbox or {"type": "GIoULoss"}, **kwargs)
        self.init_ranking(**(ranking or {}))
        self.check_ranking_configs()

    def check_ranking_configs(self) -> None:
        """Warns of what configurations for other losses bring along."""
        name = type(self).__name__
        warn_of_score_threshold(name, self.test_cfg)
        sampler = getattr(self, "sampler", None)
        if sampler is not None and not isinstance(sampler, PseudoSampler):
            warnings.warn(
                f"{name}: train_cfg.sampler is {type(sampler).__name__}: anchors that it leaves out are not ranked. Ranking needs no sampler",
                stacklevel=3,
            )

    def loss_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        batch_gt_instances: list,
        batch_img_metas: list[dict],
        batch_gt_instances_ignore: list | None = None,
    ) -> dict[str, Tensor]:
        """As in AnchorHead; see `RankingHead.ranked_losses` for the keys."""
        targets = self.targets_of(cls_scores, batch_gt_instances, batch_img_metas, batch_gt_instances_ignore)
        anchors, labels, label_weights, box_targets, *_ = targets
        logits, deltas = self.rows_of(cls_scores, self.cls_out_channels), self.rows_of(bbox_preds, 4)
        rows = positive_rows(labels, label_weights, self.num_classes)
        boxes = self.bbox_coder.decode(anchors[rows], deltas[rows])
        return self.ranked_losses(logits, labels, label_weights, rows, get_box_tensor(boxes), box_targets[rows]).losses


@MODELS.register_module()
class RankSortRetinaHead(_RankingDenseHead, RetinaHead):
    """RetinaHead trained by ranking: Rank & Sort, or what `loss_cls` says (APLoss, ALRPLoss).

    Args: those of RetinaHead, with `loss_cls` RankSortLoss and `loss_bbox` GIoULoss by default and boxes always decoded; and `ranking`,
    keywords of `RankingHead.init_ranking`. With APLoss the published weight of the boxes is `ranking=dict(box_weight=2.0)`.
    """


@MODELS.register_module()
class RankSortATSSHead(_RankingDenseHead, ATSSHead):
    """ATSSHead trained by ranking, without its centerness: the scores themselves are trained to sort boxes by IoU.

    Args as in RankSortRetinaHead; `loss_centerness` has no effect.
    """

    def _init_layers(self) -> None:
        super()._init_layers()
        del self.atss_centerness

    def forward_single(self, x: Tensor, scale: torch.nn.Module) -> tuple[Tensor, Tensor]:
        """Logits and box deltas of a level."""
        of_classes = of_boxes = x
        for layer in self.cls_convs:
            of_classes = layer(of_classes)
        for layer in self.reg_convs:
            of_boxes = layer(of_boxes)
        return self.atss_cls(of_classes), scale(self.atss_reg(of_boxes)).float()


@MODELS.register_module()
class RankSortRPNHead(_RankingDenseHead, RPNHead):
    """RPNHead trained by ranking, with "rpn" in the names of its losses.

    Args as in RankSortRetinaHead; `ranking` has `head_weight` 0.2, as published. In `train_cfg.rpn` leave the sampler out: `sampler=None`.
    """

    def __init__(self, *args: object, ranking: dict | None = None, **kwargs: object):
        super().__init__(*args, ranking={"head_weight": 0.2, **(ranking or {})}, **kwargs)

    def loss_by_feat(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """As in RPNHead."""
        losses = super().loss_by_feat(*args, **kwargs)
        return {f"loss_rpn_{key.removeprefix('loss_')}" if "loss" in key else f"rpn_{key}": value for key, value in losses.items()}


@MODELS.register_module()
class FlatRetinaHead(_Rows, RetinaHead):
    """RetinaHead that calls each of its losses once per step, for the anchors of all levels and images.

    For losses that look at the whole batch: GHM's densities and the gradient sums of equalized focal loss would otherwise be those of
    one level after another. With focal loss and L1 the values are RetinaHead's.
    """

    def loss_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        batch_gt_instances: list,
        batch_img_metas: list[dict],
        batch_gt_instances_ignore: list | None = None,
    ) -> dict[str, Tensor]:
        """As in RetinaHead: "loss_cls" and "loss_bbox"."""
        targets = self.targets_of(cls_scores, batch_gt_instances, batch_img_metas, batch_gt_instances_ignore)
        anchors, labels, label_weights, box_targets, box_weights, avg_factor = targets
        logits, deltas = self.rows_of(cls_scores, self.cls_out_channels), self.rows_of(bbox_preds, 4)
        boxes = get_box_tensor(self.bbox_coder.decode(anchors, deltas)) if self.reg_decoded_bbox else deltas
        return {
            "loss_cls": self.loss_cls(logits, labels, label_weights, avg_factor=avg_factor),
            "loss_bbox": self.loss_bbox(boxes, box_targets, box_weights, avg_factor=avg_factor),
        }
