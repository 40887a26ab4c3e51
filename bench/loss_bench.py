"""The benchmark of one loss: parsing, measuring, printing. bench_<stem>.py runs it.

A loss has `stem`, `title`, `problems`, `providers(case)`, `backends(device)`, `why_not(backend, device)` and `name(backend)`, and for the
rows that must hold `outputs(logits, inputs, backend)`, `num_losses` and `truth(inputs)`.
"""
import argparse
import contextlib
import datetime
import itertools
import pathlib
from collections.abc import Callable, Iterator

import torch

import rsloss_kernels
from bench import counts, harness, measures, profiling, results
from bench.providers import MODES, Forward, Provider
from rsloss_kernels import _backends

# What is measured, and the sections of the results file that it fills.
METRICS = {name: (name,) for name in ("speed", "memory", "syncs", "launches")}
METRICS |= {"both": ("speed", "memory"), "counts": ("syncs", "launches"), "all": tuple(METRICS)}

class OfOperator:
    """What a loss whose backends are those of one `operator` has in common with all others. `bind(inputs, backend)`: its forward."""

    stem: str
    operator: str

    def name(self, backend: str) -> str:
        return f"{self.stem} [{backend}]"

    def backends(self, device: str) -> list[str]:
        """The usable backends, the automatic choice first. On a CPU Triton is its interpreter, which is not timed."""
        usable = [backend for backend in _backends.usable(self.operator, device) if (backend, device) != ("triton", "cpu")]
        return sorted(usable, key=lambda backend: not self.is_automatic(backend, device))

    def is_automatic(self, backend: str, device: str) -> bool:
        return backend == _backends.resolve(self.operator, device)

    def why_not(self, backend: str, device: str) -> str | None:
        return _backends.why_not(self.operator, backend, device)

    def forced(self, backend: str, device: str) -> contextlib.AbstractContextManager:
        """In it, calls take `backend`; nothing is done for the one that they take anyway."""
        return contextlib.nullcontext() if self.is_automatic(backend, device) else rsloss_kernels.use_backend(backend)

    def ours(self, backend: str) -> Provider:
        def bind(inputs) -> Forward:
            return self.bind(inputs, backend)

        return Provider(self.name(backend), bind, is_ours=True, can_capture=backend != "reference")


def parse(loss, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"{loss.title} against the field")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="three problems, at most a minute")
    size.add_argument("--must-show", action="store_true", help="the rows that must hold; exit status 1 if one fails")
    parser.add_argument("--metric", choices=tuple(METRICS), default="both", help="both: speed and memory; counts: syncs and launches")
    parser.add_argument("--profile", action="store_true", help="instead: a trace and a table of kernels, into the folder of --out")
    parser.add_argument("--mode", choices=(*MODES, "all"), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), default="float32")
    parser.add_argument("--providers", nargs="+", metavar="TEXT", help="only those whose name contains one of these")
    parser.add_argument(
        "--timing",
        choices=("call", "captured", "both"),
        default="call",
        help="CUDA: whole calls from an idle device, or replays of a captured graph (device time alone)",
    )
    parser.add_argument(
        "--cache",
        choices=("cold", "warm"),
        default="cold",
        help="cold: after a call of another, on CUDA after L2 was overwritten; warm: one call of its own after another",
    )
    parser.add_argument("--budget", type=float, help="seconds of samples per provider and problem; default 0.6, quick 0.2, must-show 1.5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="draws of the inputs, times are medians over them; default 0 1 2 3 4, quick 0"
    )
    parser.add_argument("--out", type=pathlib.Path, help="folder of the results; nothing is written without it")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    loss.problems.add_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.budget is None:
        arguments.budget = 0.2 if arguments.quick else 1.5 if arguments.must_show else 0.6
    if arguments.seeds is None:
        arguments.seeds = [0] if arguments.quick else [0, 1, 2, 3, 4]
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    if arguments.timing != "call" and arguments.device != "cuda":
        parser.error("--timing captured needs --device cuda")
    if arguments.profile and not arguments.out:
        parser.error("--profile writes traces: name a folder with --out")
    return arguments


def run_grid(loss, arguments: argparse.Namespace, save: Callable[[dict], None]) -> dict[str, list[dict]]:
    """Measures, prints and saves one problem of the grid after the other. Returns the records by section."""
    sections = {name: [] for name in METRICS[arguments.metric]}
    cases = loss.problems.grid(loss, arguments)
    for case in dict.fromkeys(case for section in sections for case in cases[section]):
        for section, records in sections.items():
            if case not in cases[section]:
                continue
            for found, what in measured(loss, arguments, case, section):
                show(found, f"{case.title}, {what}")
                records += found
        save(sections)
    return sections


def measured(loss, arguments: argparse.Namespace, case, section: str) -> Iterator[tuple[list[dict], str]]:
    """Records of one problem, and what they tell."""
    if section == "memory":
        yield measures.measure_memory(loss, arguments, case), "peak memory of forward + backward beyond the inputs"
    elif section == "speed":
        modes = MODES if arguments.mode == "all" else (arguments.mode,)
        captures = {"call": [False], "captured": [True], "both": [False, True]}[arguments.timing]
        for mode, capture in itertools.product(modes, captures):
            records, _ = measures.measure_speed(loss, arguments, case, mode, capture)
            yield records, f"{mode}{', captured' if capture else ''}"
    else:
        what = counts.COUNTED[section, case.device]
        remark = f" ({counts.NO_DEVICE})" if (section, case.device) == ("syncs", "cpu") else ""
        yield counts.measure(loss, arguments, case, section), f"{what}{remark}"


def has_failed(loss, record: dict) -> bool:
    """Whether one of ours raised, rather than was left out for a reason known beforehand."""
    if record["skipped"] in (None, measures.CANNOT_CAPTURE, counts.COMPILED):
        return False
    case_type = loss.problems.case
    case = case_type(**{name: record[name] for name in case_type.__dataclass_fields__ if name in record})
    return any(
        provider.name == record["provider"] and provider.why_not(case) is None
        for provider in loss.providers(case)
        if provider.is_ours
    )


def settings(arguments: argparse.Namespace, foreign_load: float | None) -> dict:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "seeds": arguments.seeds,
        "budget_s": arguments.budget,
        "foreign_load": measures.rounded(foreign_load),
        "cache": "as each row says" if arguments.must_show else arguments.cache,
    }


def show(records: list[dict], title: str) -> None:
    print(f"\n{title}", flush=True)
    for record in records:
        if record["skipped"]:
            print(f"  {record['provider']:<28} left out: {record['skipped']}")
        elif "extra_bytes" in record:
            size = "unknown" if record["extra_bytes"] is None else f"{record['extra_bytes'] / 2**20:10.2f} MiB"
            print(f"  {record['provider']:<28} {size}, {record['bytes_per_element']} bytes per element")
        elif "counted" in record:
            print(f"  {record['provider']:<28} {record['forward']:6} in forward, {record['backward']:6} in backward")
        else:
            ratios = f"{record['ratio_to_floor']:8.4g} x floor"
            if record["ratio_to_focal"] is not None:
                ratios += f" {record['ratio_to_focal']:8.4g} x focal"
            print(
                f"  {record['provider']:<28} {record['median_ms']:10.4g} ms ({record['q1_ms']:.4g} to {record['q3_ms']:.4g}, "
                f"{record['repetitions']}x) {record['ns_per_element']:8.4g} ns/element {record['gb_per_s']:8.4g} GB/s {ratios}"
            )


def main(loss, check: Callable[[argparse.Namespace], list[dict]], program: str, argv: list[str] | None) -> int:
    """`check` measures the rows that must hold; `program` is the file to run where something is measured in a process of its own."""
    arguments = parse(loss, argv)
    arguments.program = str(pathlib.Path(program).resolve())
    torch.set_num_threads(arguments.threads)
    if arguments.alone:
        measures.answer(loss, arguments.alone)
        return 0
    machine = harness.machine(arguments.device)
    backends = ", ".join(loss.backends(arguments.device))
    where = f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {arguments.threads} threads"
    print(f"{where}, torch {machine['torch']}, backends: {backends}")
    load = harness.ForeignLoad()

    def save(sections: dict[str, list[dict]]) -> None:
        if arguments.out:
            shared = settings(arguments, load.fraction())
            with_settings = {name: {"settings": shared, "records": records} for name, records in sections.items()}
            results.update(arguments.out, loss.stem, machine, with_settings)

    broken = False
    if arguments.profile:
        for case in loss.problems.grid(loss, arguments)["profile"]:
            profiling.profile(loss, arguments, case)
    elif arguments.must_show:
        rows = check(arguments)
        save({"targets": rows})
        broken = not all(row["passed"] for row in rows)
    else:
        sections = run_grid(loss, arguments, save)
        broken = any(has_failed(loss, record) for records in sections.values() for record in records)
    busy = load.fraction()
    if busy is not None and busy > harness.QUIET:
        print(f"\nothers took {busy:.0%} of the processor: repeat the times when it is quiet")
    if arguments.out and not arguments.profile:
        print(f"\nwrote {results.path_of(arguments.out, loss.stem)}")
    return int(broken)
