"""Detectors of MMDetection from small configurations, and a batch for them; `frameworks.use_mmdetection()` comes first."""
import torch
from torch import nn

STRIDES = [8, 16, 32, 64, 128]
CHANNELS = {18: [64, 128, 256, 512], 50: [256, 512, 1024, 2048]}
WIDTH = 64
# As published: GHM-C of 30 bins, GHM-R with ten times the weight.
GHM = {
    "loss_cls": {"type": "GHMC", "bins": 30, "momentum": 0.75, "use_sigmoid": True, "loss_weight": 1.0},
    "loss_bbox": {"type": "GHMR", "mu": 0.02, "bins": 10, "momentum": 0.7, "loss_weight": 10.0},
}


def atss(depth: int, classes: int, head: dict) -> nn.Module:
    anchors = {"type": "AnchorGenerator", "ratios": [1.0], "octave_base_scale": 8, "scales_per_octave": 1, "strides": STRIDES}
    training = {"assigner": {"type": "ATSSAssigner", "topk": 9}, "allowed_border": -1, "pos_weight": -1, "debug": False}
    return _one_stage("ATSS", depth, classes, anchors, (0.1, 0.1, 0.2, 0.2), training, head)


def retinanet(depth: int, classes: int, losses: dict) -> nn.Module:
    anchors = {"type": "AnchorGenerator", "ratios": [0.5, 1.0, 2.0], "octave_base_scale": 4, "scales_per_octave": 3, "strides": STRIDES}
    assigner = {"type": "MaxIoUAssigner", "pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0, "ignore_iof_thr": -1}
    training = {"assigner": assigner, "sampler": {"type": "PseudoSampler"}, "allowed_border": -1, "pos_weight": -1, "debug": False}
    return _one_stage("RetinaNet", depth, classes, anchors, (1.0,) * 4, training, {"type": "RetinaHead", **losses})


def _one_stage(
    kind: str, depth: int, classes: int, anchors: dict, stds: tuple[float, ...], training: dict, head: dict
) -> nn.Module:
    from mmdet.registry import MODELS
    from mmengine.config import ConfigDict
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    torch.manual_seed(0)
    channels = {"in_channels": WIDTH, "feat_channels": WIDTH, "stacked_convs": 2}
    coder = {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": list(stds)}
    config = {
        "type": kind,
        "data_preprocessor": {"type": "DetDataPreprocessor", "mean": [120.0] * 3, "std": [60.0] * 3},
        "backbone": {"type": "ResNet", "depth": depth, "norm_eval": False, "frozen_stages": -1},
        "neck": {
            "type": "FPN",
            "in_channels": CHANNELS[depth],
            "out_channels": WIDTH,
            "start_level": 1,
            "add_extra_convs": "on_output",
            "num_outs": len(STRIDES),
        },
        "bbox_head": {"num_classes": classes, "anchor_generator": anchors, "bbox_coder": coder, **channels, **head},
        "train_cfg": training,
        "test_cfg": {"score_thr": 0.0, "nms": {"type": "nms", "iou_threshold": 0.6}, "nms_pre": 1000, "max_per_img": 100},
    }
    return MODELS.build(ConfigDict(config)).train()


def batch(images: int, side: int, boxes: int, classes: int) -> dict:
    """Noise with objects of 1/8 to 1/2 of its side somewhere in it."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    data = {"inputs": [], "data_samples": []}
    for image in range(images):
        size = side * (0.125 + 0.375 * torch.rand(boxes, 2))
        corner = torch.rand(boxes, 2) * (side - size)
        shape = {name: (side, side) for name in ("img_shape", "ori_shape", "pad_shape", "batch_input_shape")}
        sample = DetDataSample(metainfo=shape | {"scale_factor": (1.0, 1.0), "img_id": image})
        sample.gt_instances = InstanceData(bboxes=torch.cat([corner, corner + size], 1), labels=torch.randint(0, classes, (boxes,)))
        data["inputs"].append(torch.randint(0, 256, (3, side, side), dtype=torch.uint8))
        data["data_samples"].append(sample)
    return data
