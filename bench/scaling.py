"""Time and memory against one size of the problem: elements, positives, classes, bins, processes.

    python bench/scaling.py --out bench/results/<machine>            all of them, about five minutes
    python bench/scaling.py --against p c --budget 0.1               two of them, printed
    python bench/plot.py bench/results/<machine>/scaling.json        a picture of each, with the exponents

Forward + backward, float32. Writes scaling.json, a section for each size; an exponent is that of the upper half of the range.
On a CPU; 1e8 elements need about 8 GiB, and `--most` leaves out larger problems.
"""
import argparse
import importlib
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Compiling in this process keeps it apart from the load that others put on the machine.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
BENCH = pathlib.Path(__file__).resolve().parent
sys.path.append(str(BENCH.parent))

import torch  # noqa: E402

from bench import exponents, harness, loss_bench, measures, memory, results, world  # noqa: E402
from bench.focal_problems import EFL, FOCAL_LOSS  # noqa: E402
from bench.ghm_problems import CLASSES  # noqa: E402
from bench.providers import FOCAL  # noqa: E402
from bench.ranking_providers import LOOP  # noqa: E402

STEM = "scaling"
POSITIVES, ELEMENTS = 1000, 10**6
# Of the records of speed.
TOLD = ("provider", "skipped", "median_ms", "q1_ms", "q3_ms", "repetitions")


@dataclass(frozen=True)
class Line:
    """A problem of a loss that grows.

    entry: of the size, the entry of the loss's problems. others: who takes part beside this library.
    """

    stem: str
    problem: str
    entry: Callable[[int], tuple]
    values: Sequence[int]
    others: tuple[str, ...] = ()


def powers(first: int, last: int) -> list[int]:
    return [10**power for power in range(first, last + 1)]


CLASS_COUNTS = [10, 80, 320, 1203, 4812]
LINES = {
    "against_n": [
        Line("rank_sort", f"Rank & Sort, trained, P={POSITIVES}", lambda n: ("trained", POSITIVES, n), powers(3, 8), (FOCAL,)),
        Line("focal", "focal, class indices of 80", lambda n: (FOCAL_LOSS, n), powers(3, 8)),
        Line("ghm", "GHM-C, 30 bins, class indices of 80", lambda n: (CLASSES, n, 30, "index"), powers(3, 8)),
    ],
    "against_p": [
        Line("rank_sort", "Rank & Sort, trained, N=1e6", lambda p: ("trained", p, ELEMENTS), powers(0, 6), (LOOP,)),
        Line("ap", "AP, trained, N=1e6", lambda p: ("trained", p, ELEMENTS), powers(0, 6)),
        Line("alrp", "aLRP, trained, N=1e6", lambda p: ("trained", p, ELEMENTS), powers(0, 6)),
    ],
    "against_c": [
        Line("focal", "focal, N=1e6", lambda c: (FOCAL_LOSS, ELEMENTS, c), CLASS_COUNTS),
        Line("focal", "EFL, N=1e6", lambda c: (EFL, ELEMENTS, c), CLASS_COUNTS, ("published EFL",)),
        Line("seesaw", "Seesaw, 512 rows", lambda c: (512, c), CLASS_COUNTS, ("published Seesaw",)),
    ],
    "against_bins": [Line("ghm", "GHM-C, N=1e6", lambda bins: (CLASSES, ELEMENTS, bins, "index"), [1, 4, 16, 64, 256], ("MMDetection's",))],
}
PROCESSES = [1, 2, 4]


def measure_line(line: Line, arguments: argparse.Namespace) -> list[dict]:
    """The records of one line, printed as they come."""
    loss = importlib.import_module(f"bench.bench_{line.stem}").LOSS
    ours = loss.name(loss.backends("cpu")[0])
    chosen = argparse.Namespace(**vars(arguments), providers=[ours, *line.others], program=str(BENCH / f"bench_{line.stem}.py"))
    cases = {value: loss.problems.make_case(chosen, *line.entry(value)) for value in line.values if value <= arguments.most}
    records = []
    for x, case in cases.items():
        found, _ = measures.measure_speed(loss, chosen, case, "full", capture=False)
        loss_bench.show(found, f"{case.title}, full")
        for record in found:
            if record["provider"] != harness.COPY:
                records.append({"problem": line.problem, "x": x} | {name: record[name] for name in TOLD} | {"extra_bytes": None})
    for provider in [ours, *line.others]:
        timed = {record["x"]: record for record in records if record["provider"] == provider and not record["skipped"]}
        if not timed:
            continue
        first, *larger = [cases[x] for x in timed]
        rest = [case.as_dict() for case in larger], provider
        found = measures.alone(chosen, "memories", memory.FREED_ENVIRONMENT, first, *rest)
        for record, extra in zip(timed.values(), found, strict=True):
            record["extra_bytes"] = extra if isinstance(extra, int) else None
            print(f"{provider}, {line.problem}, {record['x']:g}: {extra} bytes beyond the inputs", flush=True)
    return records


def measure_world(arguments: argparse.Namespace) -> list[dict]:
    """One ranking over all processes, that share the threads, beside the same elements in one process, and each its own ranking."""
    loss = importlib.import_module("bench.bench_rank_sort").LOSS
    case = loss.problems.case("trained", POSITIVES, min(ELEMENTS, arguments.most), max_positives=2048)
    records = []
    for x in PROCESSES:
        times = world.measure(loss.stem, case, x, "gloo", arguments.threads, arguments.budget)
        for key, words in world.MEANING.items():
            median = measures.rounded(times[key] * 1e3)
            records.append({"problem": f"Rank & Sort, {case.title}, gloo", "x": x, "provider": words, "skipped": None})
            records[-1] |= {"median_ms": median, "q1_ms": None, "q3_ms": None, "repetitions": None, "extra_bytes": None}
            print(f"{x} processes, {words}: {median} ms", flush=True)
    return records


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name.removeprefix("against_") for name in exponents.AXES]
    parser.add_argument("--against", nargs="+", choices=names, default=names)
    parser.add_argument("--most", type=lambda text: int(float(text)), default=10**8, help="no larger size, default 1e8")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds per provider and problem")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, help="folder of the results; nothing is written without it")
    arguments = parser.parse_args(argv)
    for name, value in {"device": "cpu", "dtype": "float32", "seeds": [0], "cache": "cold", "must_show": False}.items():
        setattr(arguments, name, value)
    torch.set_num_threads(arguments.threads)
    for name in arguments.against:
        section, load = f"against_{name}", harness.ForeignLoad()
        lines = LINES.get(section, ())
        records = [record for line in lines for record in measure_line(line, arguments)] if lines else measure_world(arguments)
        for figure, what in exponents.FIGURES.items():
            for (problem, provider), points in exponents.lines(records, figure).items():
                fitted = exponents.fit(points)
                if fitted:
                    where = f"{fitted.low:g} to {fitted.high:g}"
                    print(f"{provider}, {problem}: {what} as {exponents.AXES[section]} to the {fitted.exponent:.2f}, {where}")
        if arguments.out:
            part = {section: {"settings": loss_bench.settings(arguments, load.fraction()), "records": records}}
            print(f"wrote {results.update(arguments.out, STEM, harness.machine('cpu'), part)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
