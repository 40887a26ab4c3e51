"""The rows of a benchmark that must hold, of the losses that rank nothing: each a figure with its limit for speed, memory, accuracy."""
import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench import targets

# Of the losses, of the gradient.
LIMITS = 1e-7, 2e-6
Speed = Sequence[tuple[tuple, Mapping[str, float | None]]]


@dataclass(frozen=True)
class Targets:
    """What a loss promises, by entries of its problems.

    warm_speed: (entry, {what it is compared to: largest ratio, None: told only}); see --cache.
    cold_speed: likewise, but the ratios are aims; None: those of warm_speed.
    cuda_speed: captured; (entry, largest ratio to the copy). Their memory is measured on CUDA.
    memory: on a CPU; at most the gradient and a MiB.
    accuracy: to LIMITS.
    further: of (arguments, report), more rows on a CPU.
    """

    warm_speed: Speed
    cuda_speed: Sequence[tuple[tuple, float]]
    memory: Sequence[tuple]
    accuracy: Sequence[tuple]
    cold_speed: Speed | None = None
    further: Callable[[argparse.Namespace, targets.Rows], None] = lambda arguments, report: None


def check(loss, promised: Targets, arguments: argparse.Namespace) -> list[dict]:
    """Measures and prints every row. Forward + gradient through autograd; medians of alternating runs, over the seeds."""
    report = targets.Rows()
    make_case = loss.problems.make_case
    if arguments.device == "cuda":
        compiled, sizes = ["cuda", "triton"], [entry for entry, _ in promised.cuda_speed]
        cases = [(make_case(arguments, *entry), limit) for entry, limit in promised.cuda_speed]
        targets.captured(loss, arguments, report, cases)
    else:
        compiled, sizes = ["cpp"], promised.memory
        compare_warm_and_cold(loss, promised.warm_speed, promised.cold_speed, arguments, report)
        promised.further(arguments, report)
    memory_and_accuracy(loss, compiled, sizes, promised.accuracy, arguments, report)
    return report.close()


def compare_warm_and_cold(loss, warm: Speed, cold: Speed | None, arguments: argparse.Namespace, report: targets.Rows) -> None:
    """Of the compiled backend on a CPU. The limits hold for warm calls; cold ones have aims, by default as large."""
    aims = [(entry, targets.as_aims(limits)) for entry, limits in (warm if cold is None else cold)]
    for cache, rows in (("warm", warm), ("cold", aims)):
        for entry, limits in rows:
            case = loss.problems.make_case(arguments, *entry)
            compare(loss, "cpp", case, limits, targets.changed(arguments, cache=cache), report)


def compare(loss, backend: str, case, limits: Mapping[str, float | None], arguments: argparse.Namespace, report: targets.Rows) -> None:
    """A row for each of the others, all timed in turns."""
    ours, missing = loss.name(backend), loss.why_not(backend, case.device)
    timings, _ = targets.time_case(loss, arguments, case, [ours, *limits])
    for other, limit in limits.items():
        got = timings[ours].ratio_to(timings[other]) if ours in timings else None
        report(f"{ours}, {case.title}, {arguments.cache}", limit, f"x {other}", got, missing or targets.medians(timings, ours, other))


def memory_and_accuracy(
    loss, compiled: list[str], sizes: Sequence[tuple], accuracy: Sequence[tuple], arguments: argparse.Namespace, report: targets.Rows
) -> None:
    """Memory of the compiled backends, accuracy of all."""
    for backend in compiled:
        for entry in sizes:
            case = loss.problems.make_case(arguments, *entry)
            gradient = loss.problems.make_inputs(case).gradient_bytes
            targets.memory(loss, backend, case, gradient + targets.MEBIBYTE, arguments, report)
    backends = list(dict.fromkeys([*compiled, *loss.backends(arguments.device)]))
    for entry in accuracy:
        targets.accuracy(loss, loss.problems.make_case(arguments, *entry), backends, LIMITS, report)
