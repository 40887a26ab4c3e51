"""A one-stage, anchor-free detector with two levels of features, strides 8 and 16, and one head for both; the levels serve the
two-stage detector too."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (8, 16)


class Predictions(NamedTuple):
    """A is the number of locations of both levels together."""

    logits: Tensor  # [B, A, C], or as many as the loss has
    boxes: Tensor  # [B, A, 4], x1 y1 x2 y2 in pixels
    centerness: Tensor  # [B, A], logits


class Pyramid(nn.Module):
    """Features [B, width, H / stride, W / stride] of the levels, from images [B, 3, H, W] in [-0.5, 0.5]."""

    def __init__(self, width: int = 32, group_norm: bool = False):
        super().__init__()
        norm = _group_norm if group_norm else nn.BatchNorm2d
        self.stem = nn.Sequential(_block(3, width // 2, 2, norm), _block(width // 2, width, 2, norm))
        self.stage3 = nn.Sequential(_block(width, 2 * width, 2, norm), _block(2 * width, 2 * width, 1, norm))
        self.stage4 = nn.Sequential(_block(2 * width, 2 * width, 2, norm), _block(2 * width, 2 * width, 1, norm))
        self.lateral3 = nn.Conv2d(2 * width, width, 1)
        self.lateral4 = nn.Conv2d(2 * width, width, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features3 = self.stage3(self.stem(images))
        level4 = self.lateral4(self.stage4(features3))
        return self.lateral3(features3) + F.interpolate(level4, scale_factor=2.0), level4


class Detector(nn.Module):
    """`num_logits`: of each location, one per class for most losses. `first_logit`: their level before training, one for all or one
    for each. `group_norm`: no statistics of a batch anywhere. `trains_centerness`: else that branch gets no gradient."""

    def __init__(
        self,
        num_logits: int,
        first_logit: float | Sequence[float] = 0.0,
        group_norm: bool = False,
        trains_centerness: bool = False,
        width: int = 32,
    ):
        super().__init__()
        self.pyramid = Pyramid(width, group_norm)
        # Both levels share the towers but not their statistics: running means of a batch norm would be those of neither.
        self.class_tower = _block(width, width, 1, _group_norm)
        self.box_tower = _block(width, width, 1, _group_norm)
        self.classify = nn.Conv2d(width, num_logits, 3, padding=1)
        self.regress = nn.Conv2d(width, 4, 3, padding=1)
        # Where processes train together, each waits for a gradient of every parameter that asks for one.
        self.center = nn.Conv2d(width, 1, 3, padding=1).requires_grad_(trains_centerness)
        with torch.no_grad():
            self.classify.bias.copy_(torch.as_tensor(first_logit))

    def forward(self, images: Tensor) -> Predictions:
        """`images`: uint8 [B, 3, H, W], both sides multiples of 16."""
        levels = []
        for features, stride in zip(self.pyramid(images.float().div(255).sub(0.5)), STRIDES, strict=True):
            for_class, for_box = self.class_tower(features), self.box_tower(features)
            distances = F.softplus(self.regress(for_box)).flatten(2).transpose(1, 2) * stride  # [B, HW, 4]
            points = locations(*features.shape[-2:], stride, images.device)
            boxes = torch.cat([points - distances[..., :2], points + distances[..., 2:]], -1)
            logits = self.classify(for_class).flatten(2).transpose(1, 2)
            levels.append((logits, boxes, self.center(for_box).flatten(1)))
        return Predictions(*(torch.cat(parts, 1) for parts in zip(*levels, strict=True)))


def locations(height: int, width: int, stride: int, device) -> Tensor:
    """Centres of the cells, [H W, 2] as (x, y) in pixels."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return (torch.stack([x, y], -1).reshape(-1, 2) + 0.5) * stride


def _block(inputs: int, outputs: int, stride: int, norm) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm(outputs), nn.ReLU(inplace=True))


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, channels)
