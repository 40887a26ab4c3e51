"""The benchmark of one loss: parsing, measuring, printing. bench_<stem>.py runs it.

A loss has `stem`, `title`, `problems`, `providers(case)`, `backends(device)`, `why_not(backend, device)` and `name(backend)`, and for the
rows that must hold `outputs(logits, inputs, backend)`, `num_losses` and `truth(inputs)`.
"""
import argparse
import contextlib
import datetime
import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

import rsloss_kernels
from bench import harness, results
from bench.providers import FOCAL, MODES, Forward, Provider, workload
from rsloss_kernels import _backends

COPY = "copy floor"
CANNOT_CAPTURE = "it cannot be captured"


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
    parser.add_argument("--metric", choices=("speed", "memory", "both"), default="both")
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
    parser.add_argument("--cache", choices=("cold", "warm"), default="cold", help="CUDA: cold overwrites L2 before each call")
    parser.add_argument("--budget", type=float, help="seconds per provider and problem; default 0.6, quick 0.2, must-show 1.5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="draws of the inputs, times are medians over them; default 0 1 2 3 4, quick 0"
    )
    parser.add_argument("--out", type=pathlib.Path, help="folder of the results; nothing is written without it")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
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
    return arguments


def run_grid(loss, arguments: argparse.Namespace, save: Callable[[dict], None]) -> dict[str, list[dict]]:
    """Measures, prints and saves one problem of the grid after the other. Returns the records by section."""
    modes = MODES if arguments.mode == "all" else (arguments.mode,)
    captures = {"call": [False], "captured": [True], "both": [False, True]}[arguments.timing]
    wanted = {"speed": ["speed"], "memory": ["memory"], "both": ["speed", "memory"]}[arguments.metric]
    sections = {name: [] for name in wanted}
    cases, memory_cases = loss.problems.grid(loss, arguments)
    for case in cases:
        for mode, capture in itertools.product(modes, captures) if "speed" in wanted else ():
            records, _ = measure_speed(loss, arguments, case, mode, capture)
            show(records, f"{case.title}, {mode}{', captured' if capture else ''}")
            sections["speed"] += records
        if "memory" in wanted and case in memory_cases:
            records = measure_memory(loss, arguments, case)
            show(records, f"{case.title}, peak memory of forward + backward beyond the inputs")
            sections["memory"] += records
        save(sections)
    return sections


def chosen_providers(loss, arguments: argparse.Namespace, case) -> list[Provider]:
    everyone = loss.providers(case)
    if not arguments.providers:
        return everyone
    return [provider for provider in everyone if any(text in provider.name for text in arguments.providers)]


def time_draws(
    arguments: argparse.Namespace, build: Callable[[int], list[harness.Workload]], capture: bool = False
) -> dict[str, harness.Draws]:
    """Timings by name of the workloads that `build(seed)` makes, over all seeds; the budget is shared among them."""
    by_name = {}
    for seed in arguments.seeds:
        workloads = build(seed)
        budget = arguments.budget / len(arguments.seeds)
        timings = harness.measure(workloads, arguments.device, budget, capture=capture, cold=arguments.cache == "cold")
        for name, timing in timings.items():
            by_name.setdefault(name, []).append(timing)
    return {name: harness.Draws(timings) for name, timings in by_name.items()}


def measure_speed(
    loss, arguments: argparse.Namespace, case, mode: str, capture: bool
) -> tuple[list[dict], dict[str, harness.Draws]]:
    """The records of one problem, and its timings by provider."""
    chosen = chosen_providers(loss, arguments, case)
    skipped = {
        provider.name: provider.why_not(case) or (CANNOT_CAPTURE if capture and not provider.can_capture else None)
        for provider in chosen
    }
    told, elements, moved = {}, 0, 0

    def build(seed: int) -> list[harness.Workload]:
        nonlocal elements, moved
        inputs = loss.problems.make_inputs(replace(case, seed=seed))
        for name, value in loss.problems.told(loss, inputs).items():
            told.setdefault(name, []).append(rounded(value))
        elements, moved = inputs.logits.numel(), inputs.minimal_bytes()
        workloads = [workload(provider, inputs, mode) for provider in chosen if not skipped[provider.name]]
        return [harness.copy_floor(moved, case.device, inputs.working_set()), *workloads]

    timings = time_draws(arguments, build, capture)
    records = []
    for name in [COPY, *(provider.name for provider in chosen)]:
        timing = timings.get(name)
        record = case_fields(case, elements, name, skipped.get(name) or (timing and timing.failure))
        record |= {"mode": mode, "timing": "captured" if capture else "call", "moved_bytes": moved} | told
        record |= figures(timing, timings, elements, moved)
        records.append(record)
    return records, timings


def has_failed(loss, record: dict) -> bool:
    """Whether one of ours raised, rather than was left out for a reason known beforehand."""
    if record["skipped"] in (None, CANNOT_CAPTURE):
        return False
    case_type = loss.problems.case
    case = case_type(**{name: record[name] for name in case_type.__dataclass_fields__ if name in record})
    return any(
        provider.name == record["provider"] and provider.why_not(case) is None
        for provider in loss.providers(case)
        if provider.is_ours
    )


def case_fields(case, elements: int, provider: str, skipped: str | None) -> dict:
    fields = {key: value for key, value in case.as_dict().items() if key != "seed"}
    return fields | {"elements": elements, "provider": provider, "skipped": skipped}


def figures(timing: harness.Draws | None, timings: dict, elements: int, moved: int) -> dict:
    if timing is None or timing.failure:
        names = ("median_ms", "q1_ms", "q3_ms", "ns_per_element", "gb_per_s", "ratio_to_floor", "ratio_to_focal")
        return dict.fromkeys(names) | {"repetitions": 0}
    first, median, third = timing.quartiles
    return {
        "median_ms": rounded(median * 1e3),
        "q1_ms": rounded(first * 1e3),
        "q3_ms": rounded(third * 1e3),
        "repetitions": len(timing.samples),
        "ns_per_element": rounded(median * 1e9 / elements),
        "gb_per_s": rounded(moved / median / 1e9),
        "ratio_to_floor": rounded(timing.ratio_to(timings[COPY])),
        "ratio_to_focal": rounded(timing.ratio_to(timings[FOCAL]) if FOCAL in timings else None),
    }


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def measure_memory(loss, arguments: argparse.Namespace, case) -> list[dict]:
    """Peak memory of forward + backward beyond the inputs. On a CPU every entry has a process of its own."""
    records = []
    elements = loss.problems.make_inputs(case).logits.numel()
    for provider in chosen_providers(loss, arguments, case):
        skipped, extra = provider.why_not(case), None
        if not skipped:
            try:
                is_apart = case.device == "cpu"
                extra = memory_apart(arguments, case, provider.name) if is_apart else memory_here(loss, case, provider.name)
            except Exception as error:  # a peer that cannot run here must not end the comparison of the others
                skipped = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        per_element = None if extra is None else rounded(extra / elements)
        record = case_fields(case, elements, provider.name, skipped)
        records.append(record | {"extra_bytes": extra, "bytes_per_element": per_element})
    return records


def memory_here(loss, case, name: str) -> int | None:
    provider = next(provider for provider in loss.providers(case) if provider.name == name)
    # Whatever is set up once, libraries and compiled code, belongs to no call.
    for small in loss.problems.small(case):
        workload(provider, loss.problems.make_inputs(small), "full").call()
    work = workload(provider, loss.problems.make_inputs(case), "full")
    # Compilation may happen once more at the real size; ours must show everything that a first call of this size takes.
    if provider.is_compiled:
        work.call()
    return harness.peak_extra_bytes(work.call, case.device)


def memory_apart(arguments: argparse.Namespace, case, name: str) -> int | None:
    command = [sys.executable, arguments.program, "--memory-of", json.dumps([case.as_dict(), name])]
    command += ["--threads", str(arguments.threads), "--device", case.device]
    environment = os.environ | harness.MEMORY_ENVIRONMENT
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise RuntimeError(done.stderr or f"exit status {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def settings(arguments: argparse.Namespace, foreign_load: float | None) -> dict:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "seeds": arguments.seeds,
        "budget_s": arguments.budget,
        "foreign_load": rounded(foreign_load),
        "cache": arguments.cache if arguments.device == "cuda" else "as the calls before leave it",
    }


def show(records: list[dict], title: str) -> None:
    print(f"\n{title}", flush=True)
    for record in records:
        if record["skipped"]:
            print(f"  {record['provider']:<28} left out: {record['skipped']}")
        elif "extra_bytes" in record:
            size = "unknown" if record["extra_bytes"] is None else f"{record['extra_bytes'] / 2**20:10.2f} MiB"
            print(f"  {record['provider']:<28} {size}, {record['bytes_per_element']} bytes per element")
        else:
            ratios = f"{record['ratio_to_floor']:8.4g} x floor"
            if record["ratio_to_focal"] is not None:
                ratios += f" {record['ratio_to_focal']:8.4g} x focal"
            print(
                f"  {record['provider']:<28} {record['median_ms']:10.4g} ms ({record['q1_ms']:.4g} to {record['q3_ms']:.4g}, "
                f"{record['repetitions']}x) {record['ns_per_element']:8.4g} ns/element {record['gb_per_s']:8.4g} GB/s {ratios}"
            )


def main(
    loss, check: Callable[[argparse.Namespace], list[dict]], program: str, argv: list[str] | None
) -> int:
    """`check` measures the rows that must hold; `program` is the file to run in a process of its own, where memory is measured."""
    arguments = parse(loss, argv)
    arguments.program = str(pathlib.Path(program).resolve())
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        case, name = json.loads(arguments.memory_of)
        print(json.dumps(memory_here(loss, loss.problems.case(**case), name)))
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

    if arguments.must_show:
        rows = check(arguments)
        save({"targets": rows})
        broken = not all(row["passed"] for row in rows)
    else:
        sections = run_grid(loss, arguments, save)
        broken = any(has_failed(loss, record) for records in sections.values() for record in records)
    busy = load.fraction()
    if busy is not None and busy > harness.QUIET:
        print(f"\nother processes used {busy:.0%} of the processor: repeat the times when it is quiet")
    if arguments.out:
        print(f"\nwrote {results.path_of(arguments.out, loss.stem)}")
    return int(broken)
