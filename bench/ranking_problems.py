"""The problems of the ranking benchmarks: the grids of sizes, and the options that make one's own."""
import argparse
import itertools
from dataclasses import replace

from bench.logits import DISTRIBUTIONS, FORMS, Case, Inputs, make_inputs
from bench.problems import Problems

# (distribution, P, N, form[, segments])
GRID = [
    *[("trained", 1000, negatives, "dense") for negatives in (10**4, 10**5, 10**6, 10**7)],
    *[("trained", positives, 10**6, "dense") for positives in (50, 200, 5000, 20000, 10**5, 10**6)],
    ("trained", 200, 10**5, "dense"),
    ("init", 1000, 10**6, "dense"),
    ("separated", 1000, 10**6, "dense"),
    ("trained", 1000, 10**6, "index"),
]
SEGMENT_GRID = [("trained", 1000, 10**6, "index", segments) for segments in (2, 8, 64, 512, 4096)]
# Above this the tables of a GPU are not large enough.
CUDA_POSITIVES = 20_000
# Memory is the same from call to call, and on a CPU every entry starts a process: fewer problems do.
MEMORY_GRID = [*GRID[1:4], ("trained", 20000, 10**6, "dense"), ("trained", 1000, 10**6, "index")]
QUICK = [("trained", 50, 10**4, "dense"), ("trained", 200, 10**5, "dense"), ("trained", 1000, 10**6, "dense")]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--distribution", choices=tuple(DISTRIBUTIONS), help="own grid: with --positives and --negatives")
    parser.add_argument("--form", choices=FORMS, default="dense", help="form of the targets in an own grid")
    parser.add_argument("--positives", nargs="+", type=lambda text: int(float(text)), help="own grid")
    parser.add_argument("--negatives", nargs="+", type=lambda text: int(float(text)), help="own grid")
    parser.add_argument("--segments", type=int, default=1, help="own grid: equal segments of whole rows of 80 classes")


class RankingProblems(Problems):
    def make_case(self, arguments: argparse.Namespace, *entry: object) -> Case:
        """(distribution, P, N, form, segments). On a GPU with a capacity."""
        case = super().make_case(arguments, *entry)
        # On a GPU the number of positives is unknown to the host: a user gives a capacity with room to spare, here 2 to 4 times P.
        capacity = 1 << (2 * case.positives - 1).bit_length() if arguments.device == "cuda" else None
        return replace(case, max_positives=capacity)

    def entries(self, loss, arguments: argparse.Namespace) -> tuple[list[tuple], list[tuple]]:
        """As everywhere; the whole grid has segments too, and on a GPU no more positives than its tables take."""
        speed, memory = super().entries(loss, arguments)
        if speed is self.full:
            speed = [*speed, *SEGMENT_GRID * loss.has_segments]
            if arguments.device == "cuda":
                speed = [entry for entry in speed if entry[1] <= CUDA_POSITIVES]
        return speed, memory


def _own(arguments: argparse.Namespace) -> list[tuple]:
    if not (arguments.positives or arguments.negatives or arguments.distribution or arguments.segments > 1):
        return []
    pairs = itertools.product(arguments.positives or [1000], arguments.negatives or [10**6])
    return [(arguments.distribution or "trained", *pair, arguments.form, arguments.segments) for pair in pairs]


def _small(case: Case) -> list[Case]:
    return [replace(case, positives=20, negatives=size) for size in (2000, 3000)]


def _told(loss, inputs: Inputs) -> dict[str, float]:
    return {"relevant": inputs.relevant(loss.delta)}


PROBLEMS = RankingProblems(Case, make_inputs, add_options, _own, GRID, MEMORY_GRID, QUICK, _small, _told)
