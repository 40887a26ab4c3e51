"""The problems of the Seesaw loss benchmarks: rows of a detector's second stage over 1203 classes, as in LVIS v1."""
import argparse
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import problems

# One foreground row in four, as the sampler of a two-stage detector has it.
FOREGROUND = 0.25
# Counts of the classes so far: e^0 to e^MOST_LOG, as many between any two powers.
MOST_LOG = 10.0


@dataclass(frozen=True)
class Case(problems.Case):
    """`rows` rows of `classes` + 2 logits, foreground rows of every class alike."""

    rows: int
    classes: int = 1203

    @property
    def title(self) -> str:
        return f"{self.rows} rows, {self.classes} classes, {self.dtype}"


@dataclass
class Inputs(problems.Inputs):
    case: Case
    logits: Tensor  # [N, C + 2]
    labels: Tensor  # [N], C the background
    counts: Tensor  # [C + 1], whole numbers in float64

    def given(self) -> list[Tensor]:
        return [self.logits, self.labels]


def make_inputs(case: Case) -> Inputs:
    """The same numbers for the same case on every device; drawn on the CPU in float32, then rounded to the case's dtype."""
    generator = torch.Generator().manual_seed(case.seed)
    numbers = torch.randint(0, case.classes, (case.rows,), generator=generator)
    labels = torch.where(torch.rand(case.rows, generator=generator) < FOREGROUND, numbers, case.classes)
    counts = (torch.rand(case.classes + 1, generator=generator, dtype=torch.float64) * MOST_LOG).exp().floor()
    logits = torch.randn((case.rows, case.classes + 2), generator=generator) * 1.5
    # Half-trained: the targets stand out, in the objectness (foreground first) too.
    rows = torch.arange(case.rows)
    logits[rows, numbers] += torch.where(labels < case.classes, 3.0, 0.0)
    logits[rows, torch.where(labels < case.classes, case.classes, case.classes + 1)] += 3.0
    moved = logits.to(case.device, getattr(torch, case.dtype)), labels.to(case.device), counts.to(case.device)
    return Inputs(case, *moved)


GRID = [(512,), (2048,), (8192,), (512, 80), (2048, 80)]
MEMORY_GRID = [(512,), (2048,)]
QUICK = [(512,), (2048,), (512, 80)]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", nargs="+", type=int, help="own grid")
    parser.add_argument("--classes", type=int, default=1203, help="own grid")


def _own(arguments: argparse.Namespace) -> list[tuple]:
    return [(rows, arguments.classes) for rows in arguments.rows or []]


def _small(case: Case) -> list[Case]:
    return [replace(case, rows=rows) for rows in (7, 40)]


PROBLEMS = problems.Problems(Case, make_inputs, add_options, _own, GRID, MEMORY_GRID, QUICK, _small)
