"""The rows of a ranking loss's benchmark that must hold, each a figure with its limit: speed, memory, accuracy and scale."""
import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench import harness, targets
from bench import ranking_providers as field
from bench.providers import FOCAL
from bench.ranking_problems import PROBLEMS

ACCURACY = [("trained", 1000, 10**6), ("init", 1000, 10**6), ("trained", 200, 10**5), ("trained", 20000, 10**5)]
LIMITS = 1e-7, 1e-6  # of the losses, of the gradient


@dataclass(frozen=True)
class Targets:
    """What a loss promises.

    warm_speed: (distribution, P, N, {provider to compare with: largest ratio of ours to it, None: told only}); see --cache.
    cold_speed: likewise, but the ratios are aims.
    reference_to_loop: largest ratio of the plain PyTorch backend to the published loop, on the first problem of warm_speed.
    cuda_speed: captured; (distribution, P, N, provider or None, limit): microseconds, or the ratio to the provider.
    scale: further rows, functions of (loss, arguments, report), on a CPU.
    """

    warm_speed: tuple
    cold_speed: tuple
    cuda_speed: tuple
    reference_to_loop: float | None = None
    scale: tuple[Callable, ...] = ()


def check(loss: field.RankingLoss, promised: Targets, arguments: argparse.Namespace) -> list[dict]:
    """Measures and prints every row. Forward + gradient through autograd; medians of alternating runs, over the seeds."""
    report = targets.Rows()
    if arguments.device == "cuda":
        _cuda_speed(loss, promised.cuda_speed, arguments, report)
        compiled, sizes = ["cuda", "triton"], promised.cuda_speed
    else:
        warm, cold = (targets.changed(arguments, cache=cache) for cache in ("warm", "cold"))
        _cpu_speed(loss, promised.warm_speed, warm, report, promised.reference_to_loop)
        _cpu_speed(loss, [(*size, targets.as_aims(aims)) for *size, aims in promised.cold_speed], cold, report)
        for rows_of_scale in promised.scale:
            rows_of_scale(loss, arguments, report)
        compiled, sizes = ["cpp"], promised.warm_speed
    for backend in compiled:
        for size in sizes:
            memory(loss, backend, size[:3], arguments, report)
    backends = list(dict.fromkeys([*compiled, *loss.backends(arguments.device)]))
    for entry in ACCURACY:
        targets.accuracy(loss, replace(PROBLEMS.make_case(arguments, *entry), dtype="float32"), backends, LIMITS, report)
    return report.close()


def _cpu_speed(loss, rows, arguments, report, reference_to_loop: float | None = None) -> None:
    ours, reference = loss.name("cpp"), loss.name("reference")
    missing = loss.why_not("cpp", "cpu")
    for number, (*size, limits) in enumerate(rows):
        with_reference = number == 0 and reference_to_loop is not None
        timings, title, relevant = _time(loss, arguments, size, [ours, *limits] + [reference] * with_reference, False)
        for name, limit in limits.items():
            got = timings[ours].ratio_to(timings[name]) if ours in timings else None
            note = missing or f"{targets.medians(timings, ours, name)}; {relevant}"
            report(f"{ours}, {title}, {arguments.cache}", limit, f"x {name}", got, note)
        if with_reference:
            got = timings[reference].ratio_to(timings[field.LOOP])
            note = f"{targets.medians(timings, reference, field.LOOP)}; {relevant}"
            report(f"{reference}, {title}, {arguments.cache}", reference_to_loop, f"x {field.LOOP}", got, note)


def _cuda_speed(loss, rows, arguments, report) -> None:
    for *size, other, limit in rows:
        names = [loss.name(backend) for backend in ("cuda", "triton")]
        timings, title, relevant = _time(loss, arguments, size, names + ([other, FOCAL] if other else []), True)
        for backend, ours in zip(("cuda", "triton"), names, strict=True):
            timing = timings.get(ours)
            note = loss.why_not(backend, "cuda") or (timing and timing.failure)
            got = None
            if timing and not timing.failure:
                got = timing.median * 1e6 if other is None else timing.ratio_to(timings[other])
            unit = "us" if other is None else f"x {other}"
            report(f"{ours}, {title}, captured, {arguments.cache}", limit, unit, got, note or f"{targets.medians(timings, ours)}; {relevant}")


def _time(loss, arguments, size, names: list[str], capture: bool) -> tuple[dict[str, harness.Draws], str, str]:
    case = PROBLEMS.make_case(arguments, *size)
    timings, records = targets.time_case(loss, arguments, case, names, capture)
    return timings, case.title, told_relevant(records[0]["relevant"])


def told_relevant(fractions: list[float]) -> str:
    """The fraction is an extreme value: it differs from draw to draw, and the time with it."""
    low, high = min(fractions), max(fractions)
    return f"{low:.2g} of the negatives matter" if low == high else f"{low:.2g} to {high:.2g} of the negatives matter"


def memory(loss, backend: str, size: tuple, arguments, report, limit: float | None = None) -> None:
    """The gradient, a bit mask, the tables and a mebibyte, or `limit`."""
    case = PROBLEMS.make_case(arguments, *size)
    elements = case.positives + case.negatives
    slots = case.max_positives or case.positives
    if limit is None:
        limit = elements * getattr(torch, case.dtype).itemsize + elements / 8 + 600 * slots + targets.MEBIBYTE
    targets.memory(loss, backend, case, limit, arguments, report)
