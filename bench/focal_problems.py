"""The problems of the benchmarks of element-wise sigmoid losses: class logits as a detector in training has them, few classes or many."""
import argparse
import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import problems
from bench.logits import DISTRIBUTIONS, NUM_CLASSES
from bench.peers.ghm import one_hot_targets

FOCAL_LOSS, EFL, EQLV2 = "focal", "EFL", "EQLv2"
# As in LVIS.
MANY_CLASSES = 1203
# One foreground row in this many.
FOREGROUND = 13
# Of a map.
WIDTH = 32


@dataclass(frozen=True)
class Case(problems.Case):
    """One problem of about `size` elements in rows of `classes`, of EQLv2 one column more; of EFL as the map of a head, which it is for.

    form: "index", a class index for each row; "dense", targets of every element, focal loss alone.
    """

    loss: str
    size: int
    classes: int = NUM_CLASSES
    form: str = "index"
    distribution: str = "trained"

    @property
    def title(self) -> str:
        size = f"N={self.size:.3g}".replace("e+0", "e")
        return f"{self.loss} {self.distribution} {size} C={self.classes} {self.form} {self.dtype}"


@dataclass
class Inputs(problems.Inputs):
    """`targets` as the loss takes them, `labels` and `dense` the same for the others."""

    case: Case
    logits: Tensor  # [A, C], of EQLv2 [A, C + 1], of EFL [1, C, A / WIDTH, WIDTH]
    targets: Tensor
    labels: Tensor  # [A], C the background
    dense: Tensor  # as the logits; the background is a column of EQLv2 alone
    pos_neg: Tensor  # [C], a state of the equalized losses

    def given(self) -> list[Tensor]:
        return [self.logits, self.targets]


def make_inputs(case: Case) -> Inputs:
    """The same numbers for the same case on every device; drawn on the CPU in float32, then rounded to the case's dtype."""
    generator = torch.Generator().manual_seed(case.seed)
    width = case.classes + int(case.loss == EQLV2)
    is_map = case.loss == EFL
    rows = -(-case.size // (width * WIDTH)) * WIDTH if is_map else -(-case.size // width)
    labels = torch.randint(case.classes, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) > 1 / FOREGROUND] = case.classes
    dense = one_hot_targets(labels, width).float()
    draw = DISTRIBUTIONS[case.distribution]
    is_positive = dense > 0
    logits = draw(rows * width, False, generator).view(rows, width)
    logits[is_positive] = draw(int(is_positive.sum()), True, generator)
    if is_map:
        logits, dense = (values.T.reshape(1, width, rows // WIDTH, WIDTH).contiguous() for values in (logits, dense))
    pos_neg = torch.rand(case.classes, generator=generator, dtype=torch.float64)
    dtype = getattr(torch, case.dtype)
    dense = dense.to(case.device, torch.float64 if dtype == torch.float64 else torch.float32)
    labels, logits = labels.to(case.device), logits.to(case.device, dtype)
    return Inputs(case, logits, dense if case.form == "dense" else labels, labels, dense, pos_neg.to(case.device))


# (loss, N[, classes[, form[, distribution]]])
GRID = [
    *[(FOCAL_LOSS, size) for size in (10**4, 10**5, 10**6, 10**7)],
    *[(FOCAL_LOSS, 10**6, classes) for classes in (1, 3, MANY_CLASSES)],
    (FOCAL_LOSS, 10**6, NUM_CLASSES, "dense"),
    (FOCAL_LOSS, 10**6, NUM_CLASSES, "index", "init"),
    *[(EFL, size, MANY_CLASSES) for size in (10**5, 10**6, 10**7)],
    (EFL, 10**6, NUM_CLASSES),
    (EQLV2, 10**6, MANY_CLASSES),
    (EQLV2, 10**6, NUM_CLASSES),
]
MEMORY_GRID = [(FOCAL_LOSS, 10**6), (EFL, 10**6, MANY_CLASSES), (EQLV2, 10**6, MANY_CLASSES)]
QUICK = [(FOCAL_LOSS, 10**6), (EFL, 10**5, MANY_CLASSES), (EQLV2, 10**5, MANY_CLASSES)]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loss", choices=(FOCAL_LOSS, EFL, EQLV2), help="own grid: with --sizes and --classes")
    parser.add_argument("--sizes", nargs="+", type=lambda text: int(float(text)), help="own grid: elements")
    parser.add_argument("--classes", nargs="+", type=int, help="own grid")
    parser.add_argument("--form", choices=("index", "dense"), default="index", help="own grid: form of the targets")
    parser.add_argument("--distribution", choices=tuple(DISTRIBUTIONS), default="trained", help="own grid: of the logits")


def _own(arguments: argparse.Namespace) -> list[tuple]:
    if not (arguments.loss or arguments.sizes or arguments.classes):
        return []
    kind = arguments.loss or FOCAL_LOSS
    if kind != FOCAL_LOSS and arguments.form == "dense":
        raise SystemExit(f"--loss {kind} takes no dense targets")
    pairs = itertools.product(arguments.sizes or [10**6], arguments.classes or [NUM_CLASSES])
    return [(kind, *pair, arguments.form, arguments.distribution) for pair in pairs]


def _small(case: Case) -> list[Case]:
    return [replace(case, size=size) for size in (2 * case.classes, 5 * case.classes)]


PROBLEMS = problems.Problems(Case, make_inputs, add_options, _own, GRID, MEMORY_GRID, QUICK, _small)
