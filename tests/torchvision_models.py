"""Real models of torchvision, small, with images and objects; for the tests of its adapter."""
import functools
from collections import OrderedDict

import frameworks

frameworks.use_torchvision()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchvision.models import detection  # noqa: E402
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead  # noqa: E402
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor  # noqa: E402
from torchvision.models.detection.retinanet import RetinaNetHead  # noqa: E402
from torchvision.ops import MultiScaleRoIAlign  # noqa: E402

SIZE = 64
# Channels as torchvision counts them, the background among them: labels are 1..5.
CHANNELS = 6


class Backbone(nn.Module):
    """Two levels, of strides 8 and 16."""

    out_channels = 32

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 4, 1)
        self.first = nn.Conv2d(32, 32, 3, 2, 1)
        self.second = nn.Conv2d(32, 32, 3, 2, 1)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        first = self.first(self.stem(x).relu()).relu()
        return OrderedDict([("0", first), ("1", self.second(first).relu())])


def make_model(kind: str, seed: int = 1, **options: object) -> nn.Module:
    """ "retinanet", "fcos", "faster_rcnn" or "mask_rcnn", in training mode; the same for the same seed."""
    torch.manual_seed(seed)
    options = {"min_size": SIZE, "max_size": SIZE, **options}
    anchors = AnchorGenerator(((12,), (24,)), ((0.5, 1.0, 2.0),) * 2)
    if kind in ("retinanet", "fcos"):
        if kind == "retinanet":
            # Normalised, as in torchvision's second version of the model.
            head = RetinaNetHead(32, 3, CHANNELS, norm_layer=functools.partial(nn.GroupNorm, 8))
            model = detection.RetinaNet(Backbone(), CHANNELS, anchor_generator=anchors, head=head, **options)
        else:
            points = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
            model = detection.FCOS(Backbone(), CHANNELS, anchor_generator=points, **options)
            # At first every distance to a side is about 0, where its ReLU has no gradient for half of the boxes.
            nn.init.constant_(model.head.regression_head.bbox_reg.bias, 1.0)
        # Logits that differ, so that there is an order.
        nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.05)
        return model
    options |= {f"rpn_{when}_nms_top_n_{mode}": 50 for when in ("pre", "post") for mode in ("train", "test")}
    parts = {
        "rpn_anchor_generator": anchors,
        "box_roi_pool": MultiScaleRoIAlign(["0", "1"], 4, 2),
        "box_head": TwoMLPHead(32 * 16, 64),
        "box_predictor": FastRCNNPredictor(64, CHANNELS),
    }
    if kind == "mask_rcnn":
        masks = {"mask_roi_pool": MultiScaleRoIAlign(["0", "1"], 4, 2), "mask_head": nn.Conv2d(32, 16, 3, 1, 1)}
        return detection.MaskRCNN(Backbone(), mask_predictor=MaskRCNNPredictor(16, 8, CHANNELS), **masks, **parts, **options)
    return detection.FasterRCNN(Backbone(), **parts, **options)


def make_batch(images: int = 3, empty: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> tuple[list, list]:
    """Images and targets: one object in the first image, two in the second, ...; none in those of `empty`."""
    generator = torch.Generator().manual_seed(3)
    pictures, targets = [], []
    for image in range(images):
        pictures.append(torch.rand(3, SIZE, SIZE, generator=generator).to(dtype))
        corner, size = (torch.rand(image + 1, 2, generator=generator) for _ in range(2))
        corner = corner * (SIZE - 28)
        boxes, labels = torch.cat([corner, corner + 12 + size * 14], 1), torch.randint(1, CHANNELS, (image + 1,), generator=generator)
        if image in empty:
            boxes, labels = boxes[:0], labels[:0]
        masks = torch.zeros(len(labels), SIZE, SIZE, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        targets.append({"boxes": boxes.to(dtype), "labels": labels, "masks": masks})
    return pictures, targets


def gradients(model: nn.Module, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
