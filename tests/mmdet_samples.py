"""Small models of MMDetection and batches for them; call `frameworks.use_mmdetection()` before importing this."""
import logging

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import Tensor, nn

CLASSES = 5
SIDE = 64
CHANNELS = 16
STRIDES = [8, 16, 32]


def make_batch(generator: torch.Generator, images: int = 2, boxes: int = 3) -> dict:
    """Inputs of a detector: noise, with bright boxes in it. `boxes` per image may be 0."""
    data = {"inputs": [], "data_samples": []}
    for _ in range(images):
        image = torch.rand(3, SIDE, SIDE, generator=generator) * 0.2
        corner = torch.rand(boxes, 2, generator=generator) * (SIDE - 32)
        size = 12 + torch.rand(boxes, 2, generator=generator) * 20
        corners = torch.cat([corner, corner + size], 1)
        labels = torch.randint(0, CLASSES, (boxes,), generator=generator)
        for (left, top, right, bottom), label in zip(corners.int().tolist(), labels.tolist(), strict=True):
            image[label % 3, top:bottom, left:right] += 0.3 + 0.1 * label
        shape = (SIDE, SIDE)
        known = {"img_shape": shape, "ori_shape": shape, "pad_shape": shape, "batch_input_shape": shape, "scale_factor": (1.0, 1.0)}
        sample = DetDataSample(metainfo=known | {"img_id": len(data["inputs"])})
        sample.gt_instances = InstanceData(bboxes=corners, labels=labels)
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        data["inputs"].append((image * 255).clamp(0, 255).to(torch.uint8))
        data["data_samples"].append(sample)
    return data


def training_batch() -> dict:
    """The same in every run: how far a few steps get depends on it."""
    return make_batch(torch.Generator().manual_seed(1))


def detector(kind: str, seed: int = 0, **parts: object) -> nn.Module:
    """A detector on an untrained ResNet-18 whose weights `seed` decides; `parts` are `bbox_head`, `train_cfg` and so on."""
    init_default_scope("mmdet")
    torch.manual_seed(seed)
    config = {
        "type": kind,
        "data_preprocessor": {"type": "DetDataPreprocessor", "mean": [40.0] * 3, "std": [60.0] * 3, "pad_size_divisor": 32},
        "backbone": {"type": "ResNet", "depth": 18, "base_channels": 16, "norm_eval": False, "out_indices": (1, 2, 3), "frozen_stages": -1},
        "neck": {"type": "FPN", "in_channels": [32, 64, 128], "out_channels": CHANNELS, "num_outs": 3},
    }
    model = MODELS.build(ConfigDict(config | parts))
    logging.disable(logging.INFO)  # every parameter in turn
    model.init_weights()
    logging.disable(logging.NOTSET)
    return model.train()


def losses_of(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum that MMDetection minimises, and what it logs."""
    data = model.data_preprocessor(batch, training=True)
    return model.parse_losses(model(**data, mode="loss"))


def fix_norms(model: nn.Module) -> nn.Module:
    """Batch norm would see other images in one process than in two."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def anchors(scales: int = 1, ratios: tuple[float, ...] = (1.0,), base: int = 4) -> dict:
    return {"type": "AnchorGenerator", "octave_base_scale": base, "scales_per_octave": scales, "ratios": list(ratios), "strides": STRIDES}


def coder(stds: tuple[float, ...] = (0.1, 0.1, 0.2, 0.2)) -> dict:
    return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": list(stds)}


def dense_head(kind: str, **parts: object) -> dict:
    """Of RetinaHead and ATSSHead and what derives from them."""
    config = {
        "type": kind,
        "num_classes": CLASSES,
        "in_channels": CHANNELS,
        "feat_channels": CHANNELS,
        "stacked_convs": 1,
        "anchor_generator": anchors(),
        "bbox_coder": coder(),
    }
    if "ATSS" in kind:
        config["norm_cfg"] = {"type": "GN", "num_groups": 4}
    return config | parts


MAX_IOU = {"type": "MaxIoUAssigner", "pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0, "ignore_iof_thr": -1}
RETINA_TRAINING = {"assigner": MAX_IOU, "sampler": {"type": "PseudoSampler"}, "allowed_border": -1, "pos_weight": -1, "debug": False}
ATSS_TRAINING = {"assigner": {"type": "ATSSAssigner", "topk": 9}, "allowed_border": -1, "pos_weight": -1, "debug": False}
TESTING = {"nms_pre": 100, "min_bbox_size": 0, "score_thr": 0.0, "nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 20}
