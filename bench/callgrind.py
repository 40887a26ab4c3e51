"""Instructions per element of the hot regions, function by function: a figure that no load on the machine moves. Not a gate.

    python bench/callgrind.py rank_sort --positives 1000 --negatives 1e5
    python bench/callgrind.py focal --loss EFL --sizes 1e5 --classes 1203 --calls 2
    python bench/callgrind.py rank_sort --tool perf                             one sum, by the counters of the processor

Counted is forward + backward of this library's compiled CPU backend in one thread, after calls that set up whatever is set up once.
Other options are those of bench_<loss>.py and choose the problem; the first one counts. Exit status 2 where the tool is missing or
the system does not count. Valgrind runs the program without AVX-512, so the instructions are those of the AVX2 kernels.
"""
import argparse
import importlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

BENCH = pathlib.Path(__file__).resolve().parent
sys.path.append(str(BENCH.parent))

import torch  # noqa: E402

from bench import loss_bench  # noqa: E402
from bench.providers import workload  # noqa: E402

BACKEND, LIBRARY = "cpp", "_ops_cpu"
WARM_UPS = 3
TOOLS = {"callgrind": "valgrind", "perf": "perf"}
HEADER = re.compile(r"(c?)(ob|fl|fi|fe|fn)=\((\d+)\)(?: (.*))?$")


def function_costs(text: str) -> dict[tuple[str, str], int]:
    """{(object, function): instructions of its own} from a file in callgrind's format with one event, names compressed or not."""
    names, costs = {"ob": {}, "fn": {}}, {}
    current = {"ob": "", "fn": ""}
    positions, is_call = 1, False
    for line in text.splitlines():
        if line.startswith("positions:"):
            positions = len(line.split()) - 1
        elif found := HEADER.match(line):
            callee, kind, number, name = found.groups()
            if kind in names:
                if name:
                    names[kind][number] = name
                if not callee:
                    current[kind] = names[kind][number]
        elif re.match(r"(ob|fn)=", line):
            current[line[:2]] = line[3:]
        elif line.startswith("calls="):
            # What follows is the cost of the callee, which stands with itself.
            is_call = True
        elif line[:1].isdigit() or line[:1] in ("+", "-", "*"):
            if not is_call:
                key = current["ob"], current["fn"]
                costs[key] = costs.get(key, 0) + int(line.split()[positions])
            is_call = False
    return costs


def perf_instructions(text: str) -> int | None:
    """From `perf stat -x,`; None where the system does not count them."""
    for line in text.splitlines():
        value, _, event, *_ = [*line.split(","), "", ""]
        if event.startswith("instructions"):
            return int(value) if value.isdigit() else None
    return None


def table(costs: dict[tuple[str, str], int], work: int, top: int) -> str:
    """Markdown. work: elements times calls."""
    of_library = {name: cost for (path, name), cost in costs.items() if LIBRARY in pathlib.PurePath(path).name}
    total, whole = sum(of_library.values()), sum(costs.values())
    lines = ["| function | instructions per element | share |", "|---|---|---|"]
    for name, cost in sorted(of_library.items(), key=lambda item: -item[1])[:top]:
        lines.append(f"| `{name[:100]}` | {cost / work:.4g} | {100 * cost / max(total, 1):.1f} % |")
    lines.append(f"| all functions of the library | {total / work:.4g} | 100.0 % |")
    lines.append(f"| Python, PyTorch and the C library around them | {(whole - total) / work:.4g} | |")
    return "\n".join(lines) + "\n"


def drive(question: str) -> int:
    """The program that is counted. toggle: tells valgrind where the region begins and ends."""
    stem, case, calls, toggle = json.loads(question)
    loss = importlib.import_module(f"bench.bench_{stem}").LOSS
    torch.set_num_threads(1)
    provider = next(one for one in loss.providers(loss.problems.case(**case)) if one.is_ours and f"[{BACKEND}]" in one.name)
    call = workload(provider, loss.problems.make_inputs(loss.problems.case(**case)), "full").call
    for _ in range(WARM_UPS):
        call()
    if toggle:
        instrument("on")
    for _ in range(calls):
        call()
    if toggle:
        instrument("off")
    return 0


def instrument(state: str) -> None:
    subprocess.run(["callgrind_control", "-i", state, str(os.getpid())], check=True, stdout=subprocess.DEVNULL)


def run(prefix: list[str], stem: str, case, calls: int, toggle: bool) -> subprocess.CompletedProcess:
    command = [*prefix, sys.executable, str(BENCH / "callgrind.py"), "--drive", json.dumps([stem, case.as_dict(), calls, toggle])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(prefix)} failed:\n{done.stderr.strip()}")
    return done


def by_callgrind(stem: str, case, calls: int) -> dict[tuple[str, str], int]:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "costs"
        prefix = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={path}"]
        run(prefix, stem, case, calls, toggle=True)
        return function_costs(path.read_text())


def by_perf(stem: str, case, calls: int) -> int | None:
    """Instructions of `calls` calls: what a run with twice as many has more."""
    counts = []
    for number in (calls, 2 * calls):
        with tempfile.NamedTemporaryFile() as file:
            run(["perf", "stat", "-x,", "-e", "instructions:u", "-o", file.name], stem, case, number, toggle=False)
            counts.append(perf_instructions(pathlib.Path(file.name).read_text()))
    return None if None in counts else counts[1] - counts[0]


def refuse(words: str) -> int:
    print(f"callgrind.py: {words}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loss", nargs="?", default="rank_sort", help="stem of a bench_<loss>.py")
    parser.add_argument("--tool", choices=tuple(TOOLS), default="callgrind")
    parser.add_argument("--calls", type=int, default=4)
    parser.add_argument("--top", type=int, default=12, help="functions that are shown")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    arguments, others = parser.parse_known_args(argv)
    if arguments.drive:
        return drive(arguments.drive)
    loss = importlib.import_module(f"bench.bench_{arguments.loss}").LOSS
    case = loss.problems.grid(loss, loss_bench.parse(loss, [*others, "--device", "cpu"]))["profile"][0]
    if not shutil.which(TOOLS[arguments.tool]):
        other = "; --tool perf is there" if arguments.tool == "callgrind" and shutil.which("perf") else ""
        return refuse(f"{TOOLS[arguments.tool]} is not installed{other}")
    missing = loss.why_not(BACKEND, "cpu")
    if missing:
        return refuse(missing)
    work = loss.problems.make_inputs(case).elements * arguments.calls
    title = f"**{arguments.loss}, {case.title}**, {arguments.calls} calls of forward + backward, one thread"
    if arguments.tool == "callgrind":
        print(f"{title}\n\n{table(by_callgrind(arguments.loss, case, arguments.calls), work, arguments.top)}")
        return 0
    instructions = by_perf(arguments.loss, case, arguments.calls)
    if instructions is None:
        return refuse("perf is there, but this system counts no instructions; --tool callgrind does without")
    print(f"{title}: {instructions / work:.4g} instructions per element, those of Python and PyTorch among them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
