"""Outputs of a detection head at random, as maps and as the rows that users make of them."""
import copy
import math

import torch
from torch import Tensor


class Head:
    """Outputs of a head at random: maps, and for each place and anchor a label and a quality, with ties in all of them."""

    def __init__(self, generator, batch=2, anchors=2, classes=4, sizes=((5, 7), (3, 2)), layout="anchor_major", dtype=torch.float32):
        self.batch, self.anchors, self.classes, self.sizes, self.layout = batch, anchors, classes, sizes, layout
        draw = [torch.randn((batch, anchors * classes, *size), generator=generator) * 2 for size in sizes]
        # Halves of integers: many equal logits.
        self.maps = [(level * 2).round().div(2).to(dtype) if number == 0 else level.to(dtype) for number, level in enumerate(draw)]
        self.counts = [math.prod(size) * anchors for size in sizes]
        shape = (batch, sum(self.counts))
        labels = torch.randint(-1, classes, shape, generator=generator)
        self.labels = torch.where(torch.rand(shape, generator=generator) < 0.25, labels, classes)
        self.quality = torch.rand(shape, generator=generator).mul(8).ceil().div(8)

    def image(self) -> "Head":
        """One image of such a head."""
        one = copy.copy(self)
        one.batch = 1
        return one

    def channels_last(self) -> "Head":
        self.maps = [level.movedim(1, -1).contiguous().movedim(-1, 1) for level in self.maps]
        return self

    @property
    def options(self) -> dict:
        return {"layout": self.layout, "num_classes": self.classes}

    def rows(self, maps: list[Tensor]) -> Tensor:
        """[B, K, C], as users do it."""
        order = (0, 3, 1, 2) if self.layout == "anchor_major" else (0, 3, 2, 1)
        split = (self.anchors, self.classes) if self.layout == "anchor_major" else (self.classes, self.anchors)
        named = [level.flatten(2) if level.dim() > 2 else level[..., None] for level in maps]
        named = [level.reshape(self.batch, *split, level.shape[2]).permute(order) for level in named]
        return torch.cat([level.flatten(1, 2) for level in named], 1)

    def dense(self) -> Tensor:
        """[B, K, C]: the quality of the label, 0 elsewhere, -1 where a row is ignored."""
        one_hot = torch.nn.functional.one_hot(self.labels.clamp(min=0), self.classes + 1)[..., : self.classes]
        return torch.where(self.labels[..., None] < 0, -1.0, one_hot * self.quality[..., None])

    def as_maps(self, rows: Tensor) -> list[Tensor]:
        """[B, K, C] in the shapes of the maps."""
        maps = []
        for level, size in zip(rows.split(self.counts, 1), self.sizes, strict=True):
            named = level.reshape(self.batch, math.prod(size), self.anchors, self.classes)
            named = named.permute((0, 2, 3, 1) if self.layout == "anchor_major" else (0, 3, 2, 1))
            maps.append(named.reshape(self.batch, self.anchors * self.classes, *size).contiguous())
        return maps

    def per_level(self, values: Tensor) -> list[Tensor]:
        """[B, K] as [B, *spatial, A] of each level."""
        split = zip(values.split(self.counts, 1), self.sizes, strict=True)
        return [level.reshape(self.batch, *size, self.anchors) for level, size in split]

    def targets(self, form: str) -> object:
        of_form = {
            "labels": lambda: self.labels,
            "labels_per_level": lambda: self.per_level(self.labels),
            "dense": self.dense,
            "dense_maps": lambda: self.as_maps(self.dense()),
        }
        return of_form[form]()

    def third(self, loss, form: str) -> tuple:
        if loss.third == "quality" and not form.startswith("dense"):
            return (self.per_level(self.quality) if form == "labels_per_level" else self.quality,)
        if loss.third != "regression_losses":
            return ()
        return (self.quality[(self.labels >= 0) & (self.labels < self.classes)] if form.startswith("dense") else self.quality,)
