"""The problems of the group softmax benchmarks: rows of a detector's second stage over 1230 classes, in groups as in LVIS v0.5."""
import argparse
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import problems
from rsloss_kernels import ClassGroups

# Classes of the groups of up to 10, 100, 1000 and more instances.
GROUP_SIZES = (161, 917, 138, 14)
# One foreground row in four, as the sampler of a two-stage detector has it.
FOREGROUND = 0.25
# Of the foreground rows: how many belong to each group where classes come as often as they have instances.
BY_INSTANCES = (0.0006, 0.03, 0.06, 0.9094)


@dataclass(frozen=True)
class Case(problems.Case):
    """`rows` rows of 1236 logits.

    classes: "even", foreground rows of every class alike, so that most others of most groups are kept; or "instances", as often as
    the classes have instances, so that rare groups keep few rows or none.
    """

    rows: int
    classes: str = "even"
    others_ratio: float = 8.0

    @property
    def title(self) -> str:
        return f"{self.rows} rows, classes {self.classes}, ratio {self.others_ratio:g}, {self.dtype}"


@dataclass
class Inputs(problems.Inputs):
    """`mapped` and `slices`: the targets within each group's slice of the logits, as the published form takes them."""

    case: Case
    logits: Tensor  # [N, 1236]
    labels: Tensor  # [N], 0 the background
    groups: ClassGroups
    maps: Tensor  # [G, C + 1]
    slices: list[tuple[int, int]]

    @property
    def mapped(self) -> list[Tensor]:
        return [of_group[self.labels] for of_group in self.maps]

    def given(self) -> list[Tensor]:
        return [self.logits, self.labels]


def make_inputs(case: Case) -> Inputs:
    """The same numbers for the same case on every device; drawn on the CPU in float32, then rounded to the case's dtype."""
    generator = torch.Generator().manual_seed(case.seed)
    classes = sum(GROUP_SIZES)
    order = torch.randperm(classes, generator=generator)
    lists = [sorted(part.tolist()) for part in order.split(GROUP_SIZES)]
    groups = ClassGroups(lists)
    shares = torch.tensor(GROUP_SIZES if case.classes == "even" else BY_INSTANCES, dtype=torch.float64)
    of_group = torch.multinomial(shares, case.rows, replacement=True, generator=generator)
    within = (torch.rand(case.rows, generator=generator, dtype=torch.float64) * torch.tensor(GROUP_SIZES)[of_group]).long()
    numbers = torch.tensor([lists[group][place] for group, place in zip(of_group.tolist(), within.tolist(), strict=True)])
    labels = torch.where(torch.rand(case.rows, generator=generator) < FOREGROUND, numbers + 1, 0)

    maps = torch.zeros((groups.num_groups, classes + 1), dtype=torch.int64)
    maps[0, 1:] = 1
    for group, members in enumerate(lists, start=1):
        maps[group, torch.tensor(members) + 1] = torch.arange(1, len(members) + 1)
    slices = [(start, end - start) for start, end in zip(groups.starts, groups.starts[1:], strict=False)]
    logits = torch.randn((case.rows, groups.num_logits), generator=generator) * 1.5
    # Half-trained: the targets stand out.
    for (start, _), targets in zip(slices, (of_group[labels] for of_group in maps), strict=True):
        logits[torch.arange(case.rows), start + targets] += 3.0
    moved = logits.to(case.device, getattr(torch, case.dtype)), labels.to(case.device), groups.to(case.device)
    return Inputs(case, *moved, maps.to(case.device), slices)


GRID = [(512,), (2048,), (8192,), (512, "instances"), (2048, "instances"), (2048, "even", 1.0), (2048, "even", float("inf"))]
MEMORY_GRID = [(512,), (2048,)]
QUICK = [(512,), (2048,), (2048, "instances")]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", nargs="+", type=int, help="own grid")
    parser.add_argument("--classes", choices=("even", "instances"), default="even", help="own grid: classes of the foreground rows")
    parser.add_argument("--ratio", type=float, default=8.0, help="own grid: others kept per foreground row")


def _own(arguments: argparse.Namespace) -> list[tuple]:
    return [(rows, arguments.classes, arguments.ratio) for rows in arguments.rows or []]


def _small(case: Case) -> list[Case]:
    return [replace(case, rows=rows) for rows in (7, 40)]


PROBLEMS = problems.Problems(Case, make_inputs, add_options, _own, GRID, MEMORY_GRID, QUICK, _small)
