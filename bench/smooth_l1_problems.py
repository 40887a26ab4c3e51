"""The problems of the smooth L1 benchmarks: encoded offsets of boxes, as the second stage of a detector has them."""
import argparse
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import problems

BETA = 0.4
# One box in this many is far off.
FAR = 10


@dataclass(frozen=True)
class Case(problems.Case):
    """One problem of `size` elements, offsets of size / 4 boxes.

    form: "dense", a weight for each element, as MMDetection's losses take them; "rows", one for each box; "unweighted".
    """

    size: int
    form: str = "dense"

    @property
    def title(self) -> str:
        return f"N={self.size:.3g} {self.form} {self.dtype}".replace("e+0", "e")


@dataclass
class Inputs(problems.Inputs):
    case: Case
    logits: Tensor  # [N / 4, 4], predicted offsets
    targets: Tensor
    weights: Tensor | None
    beta: Tensor  # 0-d, float64, as the dynamic loss holds it
    avg_factor: float

    def given(self) -> list[Tensor]:
        return [self.logits, self.targets] + ([] if self.weights is None else [self.weights])


def make_inputs(case: Case) -> Inputs:
    """The same numbers for the same case on every device; a quarter of the boxes counts."""
    generator = torch.Generator().manual_seed(case.seed)
    boxes = -(-case.size // 4)
    targets = torch.randn(boxes, 4, generator=generator)
    spread = torch.where(torch.rand(boxes, 1, generator=generator) < 1 / FAR, 2.0, BETA / 2)
    logits = targets + spread * torch.randn(boxes, 4, generator=generator)
    weights = (torch.rand(boxes, generator=generator) < 0.25).float()
    if case.form == "unweighted":
        weights = None
    elif case.form == "dense":
        weights = weights[:, None].expand(boxes, 4).contiguous()
    dtype = getattr(torch, case.dtype)
    logits, targets = (value.to(case.device, dtype) for value in (logits, targets))
    weights = None if weights is None else weights.to(case.device, dtype)
    return Inputs(case, logits, targets, weights, torch.tensor(BETA, dtype=torch.float64, device=case.device), float(boxes))


GRID = [*[(size, "dense") for size in (4096, 10**5, 10**6, 10**7)], (10**6, "rows"), (10**6, "unweighted")]
MEMORY_GRID = [(10**6, "dense")]
QUICK = [(4096, "dense"), (10**6, "dense"), (10**6, "unweighted")]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", type=lambda text: int(float(text)), help="own grid: elements")
    parser.add_argument("--form", choices=("dense", "rows", "unweighted"), default="dense", help="own grid: of the weights")


def _own(arguments: argparse.Namespace) -> list[tuple]:
    return [(size, arguments.form) for size in arguments.sizes or []]


def _small(case: Case) -> list[Case]:
    return [replace(case, size=size) for size in (2000, 3200)]


PROBLEMS = problems.Problems(Case, make_inputs, add_options, _own, GRID, MEMORY_GRID, QUICK, _small)
