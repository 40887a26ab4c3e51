"""Rank & Sort in the mask head of Mask R-CNN: dice losses weighted by the scores of the boxes, balanced against their ranking."""
import copy

import torch
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.registry import MODELS
from mmdet.utils import ConfigType, InstanceList
from torch import Tensor

from rsloss_kernels import SelfBalancing, score_weighted_mean


@MODELS.register_module()
class RankSortMaskHead(FCNMaskHead):
    """`FCNMaskHead` beside a `RankSortBBoxHead`, which ranks the positives whose masks these are.

    The loss is the mean of the masks' losses, each weighted by the score of its box, scaled to the classification loss of the box head
    (Oksuz et al., Rank & Sort, ICCV 2021). Zero, connected to the graph, without positives.

    Args:
        loss_mask: of one number per mask; by default DiceLoss with the authors' 1e-5 in the denominator (`eps=5e-6`, it is added twice).
        mask_weight: None: self-balancing (a weight of `loss_mask` then cancels). A number: factor of the loss.
        process_group: None, or "default": the mean and the balancing are those of all processes. As in `loss_cls` of the box head.
        The others are those of `FCNMaskHead`.

    It returns the loss as "loss_mask", and to be logged "mask_unbalanced" and "mask_SB_weight".
    """

    def __init__(
        self,
        *args: object,
        loss_mask: dict | None = None,
        mask_weight: float | None = None,
        process_group: str | None = None,
        **kwargs: object,
    ):
        super().__init__(*args, loss_mask=loss_mask or {"type": "DiceLoss", "eps": 5e-6}, **kwargs)
        self.process_group = process_group
        self.mask_weight = mask_weight
        self.balancing = SelfBalancing(process_group=process_group) if mask_weight is None else None

    def loss_and_target(
        self,
        mask_preds: Tensor,
        sampling_results: list[SamplingResult],
        batch_gt_instances: InstanceList,
        rcnn_train_cfg: ConfigType,
    ) -> dict:
        """As in `FCNMaskHead`; `mask_preds` is [P, C, h, w], or [P, 1, h, w] if class-agnostic."""
        if not all(hasattr(result, "ranked") for result in sampling_results):
            raise TypeError("RankSortMaskHead: bbox_head must be a RankSortBBoxHead, whose ranking weighs and balances the masks")
        targets = self.get_targets(sampling_results, batch_gt_instances, rcnn_train_cfg)  # [P, h, w]
        labels = torch.cat([result.pos_gt_labels for result in sampling_results])
        if self.class_agnostic:
            labels = torch.zeros_like(labels)
        weights = torch.cat([result.ranked.weights for result in sampling_results])
        rows = torch.arange(len(labels), device=labels.device)
        logits = mask_preds[rows, labels]
        # The sum of a thousand squares does not fit into 16 bits.
        losses = self.loss_mask(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction_override="none")
        unscaled = score_weighted_mean(losses, weights, process_group=self.process_group)
        reference = sampling_results[0].ranked.reference
        loss = unscaled * self.mask_weight if self.balancing is None else self.balancing(reference, unscaled)
        factor = torch.full_like(unscaled, self.mask_weight) if self.balancing is None else self.balancing.SB_weight.clone()
        logged = {"mask_unbalanced": unscaled.detach(), "mask_SB_weight": factor.detach().float()}
        return dict(loss_mask={"loss_mask": loss} | logged, mask_targets=targets)


@MODELS.register_module()
class RankSortRoIHead(StandardRoIHead):
    """`StandardRoIHead` that trains `max_masks` masks of a batch at most, drawn at random, as published: without a sampler there may be
    more positives than there is memory for masks.

    Raises ValueError: masks without a `mask_roi_extractor` of their own.
    """

    def __init__(self, *args: object, max_masks: int = 200, **kwargs: object):
        super().__init__(*args, **kwargs)
        if self.with_mask and self.share_roi_extractor:
            raise ValueError("RankSortRoIHead: mask_roi_extractor must be given")
        self.max_masks = max_masks

    def mask_loss(
        self,
        x: tuple[Tensor, ...],
        sampling_results: list[SamplingResult],
        bbox_feats: Tensor,
        batch_gt_instances: InstanceList,
    ) -> dict:
        """As in `StandardRoIHead`."""
        return super().mask_loss(x, draw_positives(sampling_results, self.max_masks), bbox_feats, batch_gt_instances)


def draw_positives(sampling_results: list[SamplingResult], most: int) -> list[SamplingResult]:
    """The same results, with `most` positives of all images together if there are more, each as likely as any other."""
    counts = [len(result.pos_priors) for result in sampling_results]
    if sum(counts) <= most:
        return sampling_results
    is_drawn = torch.zeros(sum(counts), dtype=torch.bool)
    is_drawn[torch.randperm(sum(counts))[:most]] = True
    drawn = []
    for result, is_of_image in zip(sampling_results, is_drawn.split(counts), strict=True):
        rows = is_of_image.nonzero().squeeze(1).to(result.pos_priors.device)
        few = copy.copy(result)
        for name in ("pos_inds", "pos_priors", "pos_is_gt", "pos_assigned_gt_inds", "pos_gt_labels", "pos_gt_bboxes"):
            setattr(few, name, getattr(result, name)[rows])
        if hasattr(result, "ranked"):
            few.ranked = result.ranked._replace(weights=result.ranked.weights[rows])
        drawn.append(few)
    return drawn
