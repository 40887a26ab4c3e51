"""Small two-stage detectors of MMDetection, Faster, Mask and Cascade R-CNN; `mm` is `frameworks.mmdetection()`."""
import copy

import numpy as np
import torch
from torch import Tensor, nn

REGIONS = 40
# Every proposal and the objects themselves: no sampler, in MMDetection's words.
ALL = {"type": "RandomSampler", "num": 10**9, "pos_fraction": 0.25, "neg_pos_ub": -1, "add_gt_as_proposals": True}
SOME = ALL | {"num": 24}
RANKED = {"type": "RankSortBBoxHead"}
SOFTMAX = {"type": "Shared2FCBBoxHead", "loss_bbox": {"type": "L1Loss"}}


def rpn_parts(mm, head: dict | None = None) -> tuple[dict, dict, dict]:
    """Head, training and testing of an RPN that is not trained by ranking, unless `head` says so."""
    config = {
        "type": "RPNHead",
        "in_channels": mm.CHANNELS,
        "feat_channels": mm.CHANNELS,
        "anchor_generator": mm.anchors(),
        "bbox_coder": mm.coder((1.0,) * 4),
    }
    assigner = {"type": "MaxIoUAssigner", "pos_iou_thr": 0.7, "neg_iou_thr": 0.3, "min_pos_iou": 0.3, "ignore_iof_thr": -1}
    sampler = SOME | {"num": 64, "pos_fraction": 0.5, "add_gt_as_proposals": False}
    training = {"assigner": assigner, "sampler": sampler, "allowed_border": -1, "pos_weight": -1, "debug": False}
    proposals = {"nms_pre": 100, "max_per_img": REGIONS, "nms": {"type": "nms", "iou_threshold": 0.7}, "min_bbox_size": 0}
    if head:
        training["sampler"] = None
    return config | (head or {}), training, proposals


def extractor(mm, size: int = 7) -> dict:
    layer = {"type": "RoIAlign", "output_size": size, "sampling_ratio": 2}
    return {"type": "SingleRoIExtractor", "roi_layer": layer, "out_channels": mm.CHANNELS, "featmap_strides": mm.STRIDES, "finest_scale": 16}


def region_training(threshold: float = 0.5, **parts: object) -> dict:
    assigner = {"type": "MaxIoUAssigner", "pos_iou_thr": threshold, "neg_iou_thr": threshold, "min_pos_iou": threshold}
    assigner |= {"match_low_quality": False, "ignore_iof_thr": -1}
    return {"assigner": assigner, "sampler": ALL, "pos_weight": -1, "debug": False, "mask_size": 14} | parts


def two_stage(
    mm,
    box_head: dict = RANKED,
    *,
    mask_head: dict | None = None,
    cascade: bool = False,
    kind: str | None = None,
    rpn: dict | None = None,
    training: dict | None = None,
    testing: dict | None = None,
    seed: int = 0,
) -> nn.Module:
    """A detector with this box head (in each of two stages, if a cascade), the same for masks; `kind` of RoI head, `training` of it."""
    rpn_head, rpn_training, proposals = rpn_parts(mm, rpn)
    base = {"in_channels": mm.CHANNELS, "fc_out_channels": 32, "num_classes": mm.CLASSES, "bbox_coder": mm.coder()}
    boxes = base | {"reg_class_agnostic": cascade} | box_head
    heads: dict = {"type": kind or "StandardRoIHead", "bbox_roi_extractor": extractor(mm), "bbox_head": boxes}
    regions: object = region_training(**(training or {}))
    if cascade:
        heads |= {"type": "CascadeRoIHead", "num_stages": 2, "stage_loss_weights": [1, 0.5]}
        heads["bbox_head"] = [copy.deepcopy(boxes) for _ in range(2)]
        regions = [region_training(threshold, **(training or {})) for threshold in (0.5, 0.6)]
    if mask_head:
        masks = {"num_convs": 1, "in_channels": mm.CHANNELS, "conv_out_channels": 8, "num_classes": mm.CLASSES} | mask_head
        heads |= {"mask_roi_extractor": extractor(mm), "mask_head": masks}
    found = {"score_thr": 0.0, "nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 20, "mask_thr_binary": 0.5}
    return mm.detector(
        ("Cascade" if cascade else "Mask" if mask_head else "Faster") + ("RCNN"),
        seed,
        rpn_head=rpn_head,
        roi_head=heads,
        train_cfg={"rpn": rpn_training, "rpn_proposal": proposals, "rcnn": regions},
        test_cfg={"rpn": proposals, "rcnn": found | (testing or {})},
    )


def with_masks(batch: dict) -> dict:
    """The batch with a mask in every box: its lower left triangle."""
    from mmdet.structures.mask import BitmapMasks

    for sample in batch["data_samples"]:
        height, width = sample.metainfo["img_shape"]
        masks = np.zeros((len(sample.gt_instances), height, width), np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, sample.gt_instances.bboxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = np.tri(bottom - top, right - left, dtype=np.uint8)
        sample.gt_instances.masks = BitmapMasks(masks, height, width)
    return batch


def box_heads(model: nn.Module) -> list[nn.Module]:
    head = model.roi_head.bbox_head
    return list(head) if isinstance(head, nn.ModuleList) else [head]


def numbers(log: dict[str, Tensor]) -> dict[str, float]:
    return {key: float(value.detach()) for key, value in log.items()}


def train(mm, model: nn.Module, batch: dict, steps: int = 10, rate: float = 1e-2) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the steps, and what the last one logs."""
    torch.manual_seed(0)  # the samplers draw from it
    optimiser = torch.optim.AdamW(model.parameters(), rate)
    losses, log = [], {}
    for _ in range(steps):
        loss, log = mm.losses_of(model, copy.deepcopy(batch))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses, log


def predict(model: nn.Module, batch: dict) -> list:
    model.eval()
    with torch.no_grad():
        found = model(**model.data_preprocessor(copy.deepcopy(batch), False), mode="predict")
    model.train()
    return [sample.pred_instances for sample in found]
