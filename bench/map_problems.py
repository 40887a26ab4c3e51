"""The problems of the benchmark of maps: the five levels of a head as its convolutions leave them, with class indices."""
import argparse
import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import problems
from bench.logits import DISTRIBUTIONS, NUM_CLASSES
from bench.peers.ghm import one_hot_targets

FOCAL_LOSS, RANK_SORT = "focal", "rank_sort"
STRIDES = (8, 16, 32, 64, 128)
# Of an image.
OBJECTS = 70


@dataclass(frozen=True)
class Case(problems.Case):
    """`images` square images of `pixels`, `anchors` at each place, 80 classes."""

    loss: str
    images: int
    pixels: int
    anchors: int = 1

    @property
    def title(self) -> str:
        return f"{self.loss}, {self.images} x {self.pixels} px, {self.anchors} per place, {self.dtype}"


@dataclass
class Inputs(problems.Inputs):
    """A row of the levels put together is a place and an anchor, [B, K, C] in the order (level, h, w, anchor)."""

    case: Case
    logits: list[Tensor]  # [B, A * C, H, W] per level
    labels: Tensor  # [B, K], C the background
    quality: Tensor  # [B, K]

    @property
    def dense(self) -> Tensor:
        return one_hot_targets(self.labels.flatten(), NUM_CLASSES).view(*self.labels.shape, NUM_CLASSES).float()

    def given(self) -> list[Tensor]:
        return [*self.logits, self.labels, *[self.quality] * (self.case.loss == RANK_SORT)]


def rows_of(maps: list[Tensor]) -> Tensor:
    """[B, K, C], as heads put their levels together."""
    rows = [level.permute(0, 2, 3, 1).reshape(len(level), -1, NUM_CLASSES) for level in maps]
    return torch.cat(rows, 1)


def make_inputs(case: Case) -> Inputs:
    """The same numbers for the same case on every device; drawn on the CPU in float32, then rounded to the case's dtype."""
    generator = torch.Generator().manual_seed(case.seed)
    draw = DISTRIBUTIONS["trained"]
    sides = [-(-case.pixels // stride) for stride in STRIDES]
    rows = sum(side * side for side in sides) * case.anchors
    labels = torch.full((case.images, rows), NUM_CLASSES)
    for image in labels:
        objects = min(OBJECTS, rows // 2)
        image[torch.randperm(rows, generator=generator)[:objects]] = torch.randint(NUM_CLASSES, (objects,), generator=generator)
    logits = draw(case.images * rows * NUM_CLASSES, False, generator).view(case.images, rows, NUM_CLASSES)
    image, row = (labels < NUM_CLASSES).nonzero(as_tuple=True)
    logits[image, row, labels[image, row]] = draw(len(image), True, generator)
    quality = 1 - torch.rand(labels.shape, generator=generator)
    maps = []
    for side, level in zip(sides, logits.split([side * side * case.anchors for side in sides], 1), strict=True):
        places = level.reshape(case.images, side, side, case.anchors * NUM_CLASSES).permute(0, 3, 1, 2)
        maps.append(places.to(case.device, getattr(torch, case.dtype), memory_format=torch.contiguous_format).contiguous())
    return Inputs(case, maps, labels.to(case.device), quality.to(case.device))


# (loss, images, pixels[, anchors])
GRID = [(loss, *size) for loss in (FOCAL_LOSS, RANK_SORT) for size in ((1, 256), (2, 512), (4, 800), (1, 800, 9))]
MEMORY_GRID = [(loss, 2, 512) for loss in (FOCAL_LOSS, RANK_SORT)]
QUICK = [(FOCAL_LOSS, 2, 256), (RANK_SORT, 2, 256)]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loss", choices=(FOCAL_LOSS, RANK_SORT), help="own grid: with --images, --pixels and --anchors")
    parser.add_argument("--images", type=int, default=2, help="own grid")
    parser.add_argument("--pixels", nargs="+", type=int, help="own grid: of a side of the images")
    parser.add_argument("--anchors", nargs="+", type=int, default=[1], help="own grid: per place")


def _own(arguments: argparse.Namespace) -> list[tuple]:
    if not (arguments.loss or arguments.pixels):
        return []
    sizes = itertools.product(arguments.pixels or [512], arguments.anchors)
    return [(arguments.loss or RANK_SORT, arguments.images, *size) for size in sizes]


def _small(case: Case) -> list[Case]:
    return [replace(case, pixels=pixels) for pixels in (32, 64)]


PROBLEMS = problems.Problems(Case, make_inputs, add_options, _own, GRID, MEMORY_GRID, QUICK, _small)
