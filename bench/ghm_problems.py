"""The problems of the GHM benchmarks: class logits as a detector in training has them, and offsets of boxes."""
import argparse
import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import problems
from bench.logits import DISTRIBUTIONS, NUM_CLASSES
from bench.peers.ghm import one_hot_targets

CLASSES, BOXES = "GHM-C", "GHM-R"
MU = 0.02
# One foreground row in this many, one ignored row in this many.
FOREGROUND, IGNORED = 13, 100


@dataclass(frozen=True)
class Case(problems.Case):
    """One problem of about `size` elements.

    loss: GHM-C, `size` / 80 rows of 80 classes; or GHM-R, `size` / 4 boxes.
    form: "dense", targets and weights of every element, as MMDetection's losses take them; "index", GHM-C with a class index and a
        weight for each row; "unweighted", dense targets alone.
    """

    loss: str
    size: int
    bins: int
    form: str = "dense"
    momentum: float = 0.0
    distribution: str = "trained"

    @property
    def title(self) -> str:
        size = f"N={self.size:.3g}".replace("e+0", "e")
        momentum = f" m={self.momentum:g}" if self.momentum else ""
        return f"{self.loss} {self.distribution} {size} {self.bins} bins{momentum} {self.form} {self.dtype}"


@dataclass
class Inputs(problems.Inputs):
    """`targets` and `weights` as the loss takes them, `dense` the same targets element by element."""

    case: Case
    logits: Tensor  # [A, 80], or offsets [A, 4]
    targets: Tensor
    weights: Tensor | None
    dense: Tensor

    def given(self) -> list[Tensor]:
        return [self.logits, self.targets] + ([] if self.weights is None else [self.weights])


def make_inputs(case: Case) -> Inputs:
    """The same numbers for the same case on every device; drawn on the CPU in float32, then rounded to the case's dtype."""
    generator = torch.Generator().manual_seed(case.seed)
    width = NUM_CLASSES if case.loss == CLASSES else 4
    rows = -(-case.size // width)
    row_weights = (torch.rand(rows, generator=generator) > 1 / IGNORED).float()
    if case.loss == CLASSES:
        labels = torch.randint(width, (rows,), generator=generator)
        labels[torch.rand(rows, generator=generator) > 1 / FOREGROUND] = width
        dense = one_hot_targets(labels, width).float()
        draw = DISTRIBUTIONS[case.distribution]
        is_positive = dense > 0
        logits = draw(rows * width, False, generator).view(rows, width)
        logits[is_positive] = draw(int(is_positive.sum()), True, generator)
    else:
        dense = torch.randn(rows, width, generator=generator)
        # Most errors are of the order of mu; one box in ten is far off.
        spread = torch.where(torch.rand(rows, 1, generator=generator) < 0.1, 0.5, 2 * MU)
        logits = dense + spread * torch.randn(rows, width, generator=generator)
    dtype = getattr(torch, case.dtype)
    wide = {"device": case.device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}
    dense, row_weights, logits = dense.to(**wide), row_weights.to(**wide), logits.to(case.device, dtype)
    if case.form == "index":
        return Inputs(case, logits, labels.to(case.device), row_weights, dense)
    weights = None if case.form == "unweighted" else row_weights[:, None].expand(rows, width).contiguous()
    return Inputs(case, logits, dense, weights, dense)


# (loss, N, bins, form[, momentum[, distribution]])
GRID = [
    *[(CLASSES, size, 10, "dense") for size in (10**4, 10**5, 10**6, 10**7)],
    *[(CLASSES, 10**6, bins, "dense") for bins in (1, 30, 256)],
    (CLASSES, 10**6, 10, "unweighted"),
    (CLASSES, 10**6, 10, "index"),
    (CLASSES, 10**6, 30, "index"),
    (CLASSES, 10**7, 30, "index"),
    (CLASSES, 10**6, 30, "index", 0.75),
    (CLASSES, 10**6, 30, "index", 0.0, "init"),
    *[(BOXES, size, 10, "dense") for size in (10**4, 10**5, 10**6, 10**7)],
    (BOXES, 10**6, 30, "dense"),
    (BOXES, 10**6, 10, "dense", 0.7),
]
MEMORY_GRID = [(CLASSES, 10**6, 10, "dense"), (CLASSES, 10**6, 30, "index"), (CLASSES, 10**7, 10, "dense"), (BOXES, 10**6, 10, "dense")]
QUICK = [(CLASSES, 10**5, 10, "dense"), (CLASSES, 10**6, 30, "index"), (BOXES, 10**5, 10, "dense")]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loss", choices=(CLASSES, BOXES), help="own grid: with --sizes and --bins")
    parser.add_argument("--sizes", nargs="+", type=lambda text: int(float(text)), help="own grid: elements")
    parser.add_argument("--bins", nargs="+", type=int, help="own grid")
    parser.add_argument("--form", choices=("dense", "index", "unweighted"), default="dense", help="own grid: form of the targets")
    parser.add_argument("--distribution", choices=tuple(DISTRIBUTIONS), default="trained", help="own grid: of the class logits")
    parser.add_argument("--momentum", type=float, default=0.0, help="own grid")


def _own(arguments: argparse.Namespace) -> list[tuple]:
    if not (arguments.loss or arguments.sizes or arguments.bins):
        return []
    if arguments.loss == BOXES and arguments.form == "index":
        raise SystemExit("--loss GHM-R takes no class indices")
    rest = arguments.form, arguments.momentum, arguments.distribution
    pairs = itertools.product(arguments.sizes or [10**6], arguments.bins or [10])
    return [(arguments.loss or CLASSES, *pair, *rest) for pair in pairs]


def _small(case: Case) -> list[Case]:
    return [replace(case, size=size) for size in (2000, 3200)]


PROBLEMS = problems.Problems(Case, make_inputs, add_options, _own, GRID, MEMORY_GRID, QUICK, _small)
