"""The problems of the ranking benchmarks: the grids of sizes, and the options that make one's own."""
import argparse
from dataclasses import replace

from bench.logits import DISTRIBUTIONS, FORMS, Case, Inputs, make_inputs
from bench.loss_bench import Problems

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


def make_case(
    arguments: argparse.Namespace, distribution: str, positives: int, negatives: int, form: str = "dense", segments: int = 1
) -> Case:
    # On a GPU the number of positives is unknown to the host: a user gives a capacity with room to spare, here 2 to 4 times P.
    capacity = 1 << (2 * positives - 1).bit_length() if arguments.device == "cuda" else None
    where = (arguments.dtype, arguments.device, arguments.seeds[0], capacity, segments)
    return Case(distribution, positives, negatives, form, *where)


def grid(loss, arguments: argparse.Namespace) -> tuple[list[Case], list[Case]]:
    """The problems for speed, and those of them for memory."""
    if arguments.positives or arguments.negatives or arguments.distribution or arguments.segments > 1:
        distribution = arguments.distribution or "trained"
        pairs = [(p, n) for p in arguments.positives or [1000] for n in arguments.negatives or [10**6]]
        own = [make_case(arguments, distribution, p, n, arguments.form, arguments.segments) for p, n in pairs]
        return own, own
    speed, memory = (QUICK, QUICK[-1:]) if arguments.quick else (GRID + SEGMENT_GRID * loss.has_segments, MEMORY_GRID)
    if arguments.device == "cuda":
        speed = [entry for entry in speed if entry[1] <= CUDA_POSITIVES]
    return [make_case(arguments, *entry) for entry in speed], [make_case(arguments, *entry) for entry in memory]


def _small(case: Case) -> list[Case]:
    return [replace(case, positives=20, negatives=size) for size in (2000, 3000)]


def _told(loss, inputs: Inputs) -> dict[str, float]:
    return {"relevant": inputs.relevant(loss.delta)}


PROBLEMS = Problems(Case, make_inputs, add_options, grid, _small, _told)
