"""Runs cases in processes of their own, so that one that crashes or hangs is told by name like any other."""
import argparse
import collections
import faulthandler
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Sequence

import harness
import torch

from . import cases, checks

LONGEST_CASE = 120  # seconds
STARTING = 900  # until all is imported, and compiled for the emulator


def open_backends(names: Sequence[str]) -> list:
    """Raises RuntimeError if one cannot run."""
    found = [harness._on_its_device(name) for name in names]
    if harness.Backend("triton", "cpu") in found:
        import quick_interpreter

        quick_interpreter.quicken()
    for backend in found:
        reason = backend.why_not()
        if reason is not None:
            raise RuntimeError(f"backend {backend.id} cannot run: {reason}")
    torch.set_num_threads(min(2, torch.get_num_threads()))
    return found


def run_case(name: str, backends: Sequence) -> tuple[list[str], str | None]:
    """The backends that ran the case, and what is wrong with it."""
    case = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            case = cases.draw(name)
            return [backend.name for backend in checks.check(case, backends)], None
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        if not isinstance(error, AssertionError):
            told += "\n" + "".join(traceback.format_tb(error.__traceback__)[-3:])
        return [], f"{case.describe() if case else cases.loss_of(name)}\n  {told}"


def report_failure(name: str, wrong: str, backends: Sequence[str]) -> None:
    print(f"FAILED {wrong}\n  repeat: python -m tests.fuzz --case {name} --backends {','.join(backends)}", flush=True)


def work(options: argparse.Namespace, losses: list[str], start: int, last: int | None, end: float | None, current, counts) -> None:
    """Cases `start`, `start + jobs`, ...; `counts` by loss: of each backend, then failures."""
    faulthandler.enable()
    backends = open_backends(options.backends)
    columns = len(options.backends) + 2
    number = start
    while (end is None or time.monotonic() < end) and (last is None or number < last):
        current[0], current[1] = number, int(time.monotonic())
        name = f"{options.seed}:{number}"
        number += options.jobs
        loss = cases.loss_of(name)
        if loss not in losses:
            continue
        ran, wrong = run_case(name, backends)
        row = losses.index(loss) * columns
        for backend in ran:
            counts[row + options.backends.index(backend)] += 1
        counts[row + columns - 2] += 1
        if wrong is not None:
            counts[row + columns - 1] += 1
            report_failure(name, wrong, options.backends)
    current[0] = -1


class Worker:
    """A process and what it was at."""

    def __init__(self, options, losses, job, last, end, counts):
        self.arguments, self.counts = (options, losses), counts
        self.last, self.end = last, end
        self.current = multiprocessing.get_context("spawn").Array("q", [job, int(time.monotonic())], lock=False)
        self.start(job)

    def start(self, number: int) -> None:
        self.current[0], self.current[1] = number, int(time.monotonic()) + STARTING
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(
            target=work, args=(*self.arguments, number, self.last, self.end, self.current, self.counts), daemon=True
        )
        self.process.start()

    def is_done(self, options: argparse.Namespace, losses: list[str]) -> bool:
        """A process that died or hangs starts again behind the case that it was at."""
        is_hung = time.monotonic() - self.current[1] > LONGEST_CASE and self.process.is_alive() and self.current[0] >= 0
        if is_hung:
            self.process.kill()
            self.process.join()
        if self.process.is_alive():
            return False
        if self.process.exitcode == 0:
            return True
        if self.process.exitcode == 1:  # an exception outside of a case: there is nothing to go on with
            raise SystemExit(2)
        number = self.current[0]
        name = f"{options.seed}:{number}"
        reason = f"more than {LONGEST_CASE} s" if is_hung else f"the process died with {self.process.exitcode}"
        self.counts[losses.index(cases.loss_of(name)) * (len(options.backends) + 2) + len(options.backends) + 1] += 1
        report_failure(name, f"{cases.loss_of(name)}: {reason}", options.backends)
        self.start(number + options.jobs)
        return False


def run(options: argparse.Namespace) -> int:
    losses = options.losses.split(",") if options.losses else list(cases.DRAWS)
    unknown = [loss for loss in losses if loss not in cases.DRAWS]
    if unknown:
        raise SystemExit(f"--losses: wanted some of {', '.join(cases.DRAWS)}, got {', '.join(unknown)}")
    last = None
    if options.cases is not None:
        last, left = 0, options.cases
        while left:
            left -= cases.loss_of(f"{options.seed}:{last}") in losses
            last += 1
    print(f"seed {options.seed}, backends {', '.join(options.backends)}, {options.jobs} processes", flush=True)
    begin = time.monotonic()
    end = None if options.seconds is None else begin + options.seconds
    columns = len(options.backends) + 2
    counts = multiprocessing.get_context("spawn").Array("q", len(losses) * columns, lock=False)
    workers = [Worker(options, losses, job, last, end, counts) for job in range(options.jobs)]
    while not all([worker.is_done(options, losses) for worker in workers]):
        time.sleep(0.2)
    rows = {loss: counts[place * columns : (place + 1) * columns] for place, loss in enumerate(losses)}
    total = collections.Counter()
    print(f"{'loss':20}" + "".join(f"{name:>11}" for name in [*options.backends, "cases", "failed"]))
    for loss, row in rows.items():
        print(f"{loss:20}" + "".join(f"{value:>11}" for value in row))
        total.update(dict(enumerate(row)))
    print(f"{'all':20}" + "".join(f"{total[place]:>11}" for place in range(columns)))
    print(f"{time.monotonic() - begin:.0f} s")
    return 1 if total[columns - 1] else 0
