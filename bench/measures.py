"""Measures one problem of a loss: the times of all providers in turns, and the peak memory of each. Returns records of a results file."""
import argparse
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

from bench import harness, memory
from bench.providers import FOCAL, Provider, workload

CANNOT_CAPTURE = "it cannot be captured"


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
        elements, moved = inputs.elements, inputs.minimal_bytes()
        workloads = [workload(provider, inputs, mode) for provider in chosen if not skipped[provider.name]]
        return [harness.copy_floor(moved, case.device, inputs.working_set()), *workloads]

    timings = time_draws(arguments, build, capture)
    records = []
    for name in [harness.COPY, *(provider.name for provider in chosen)]:
        timing = timings.get(name)
        record = case_fields(case, elements, name, skipped.get(name) or (timing and timing.failure))
        record |= {"mode": mode, "timing": "captured" if capture else "call", "moved_bytes": moved} | told
        record |= figures(timing, timings, elements, moved)
        records.append(record)
    return records, timings


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
        "ratio_to_floor": rounded(timing.ratio_to(timings[harness.COPY])),
        "ratio_to_focal": rounded(timing.ratio_to(timings[FOCAL]) if FOCAL in timings else None),
    }


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def measure_memory(loss, arguments: argparse.Namespace, case) -> list[dict]:
    """Peak memory of forward + backward beyond the inputs. On a CPU every entry has a process of its own."""
    records = []
    elements = loss.problems.make_inputs(case).elements
    for provider in chosen_providers(loss, arguments, case):
        skipped, extra = provider.why_not(case), None
        if not skipped:
            try:
                if case.device == "cpu":
                    extra = alone(arguments, "memory", memory.FREED_ENVIRONMENT, case, provider.name)
                else:
                    extra = memory_here(loss, case, provider.name)
            except Exception as error:  # a peer that cannot run here must not end the comparison of the others
                skipped = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        per_element = None if extra is None else rounded(extra / elements)
        record = case_fields(case, elements, provider.name, skipped)
        records.append(record | {"extra_bytes": extra, "bytes_per_element": per_element})
    return records


def memory_here(loss, case, name: str) -> int | None:
    provider = named(loss, case, name)
    # Whatever is set up once, libraries and compiled code, belongs to no call.
    for small in loss.problems.small(case):
        workload(provider, loss.problems.make_inputs(small), "full").call()
    work = workload(provider, loss.problems.make_inputs(case), "full")
    # Compilation may happen once more at the real size; ours must show everything that a first call of this size takes.
    if provider.is_compiled:
        work.call()
    return memory.peak_extra_bytes(work.call, case.device)


def memory_of_each(loss, case, larger: list[dict], name: str) -> list[int | str | None]:
    """Of `case` and of others like it: each in a child of this process, which has computed nothing yet. Text: why there is none."""
    context = multiprocessing.get_context("fork")
    found = []
    for each in [case, *(loss.problems.case(**fields) for fields in larger)]:
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=lambda each=each, there=there: there.send(memory_here(loss, each, name)))
        child.start()
        there.close()
        try:
            found.append(here.recv())
        except EOFError:
            found.append("the process ended without a figure")
        child.join()
    return found


def named(loss, case, name: str) -> Provider:
    return next(provider for provider in loss.providers(case) if provider.name == name)


def times_and_faults(loss, case, names: list[str], budget: float, kept: int = 1 << 30) -> dict[str, list]:
    """Seconds of every round by name, warm, and the page faults of one call; see KEPT_ENVIRONMENT."""
    memory.keep_memory(kept)
    inputs = loss.problems.make_inputs(case)
    workloads = [workload(named(loss, case, name), inputs, "full") for name in names]
    timings = harness.measure(workloads, case.device, budget, cold=False)
    return {work.name: [timings[work.name].samples, memory.page_faults(work.call)] for work in workloads}


# What a process of its own can be asked for.
ALONE = {"memory": memory_here, "memories": memory_of_each, "times": times_and_faults}


def alone(arguments: argparse.Namespace, what: str, environment: dict[str, str], case, *others: object) -> object:
    """Of a function of ALONE, in a process of its own with that much more environment."""
    command = [sys.executable, arguments.program, "--alone", json.dumps([what, case.as_dict(), *others])]
    command += ["--threads", str(arguments.threads), "--device", case.device]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise RuntimeError(done.stderr or f"exit status {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def answer(loss, question: str) -> None:
    """In that process: prints the answer as its last line."""
    what, case, *others = json.loads(question)
    print(json.dumps(ALONE[what](loss, loss.problems.case(**case), *others)))
