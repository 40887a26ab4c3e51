"""The rows of a ranking loss's benchmark that must hold, each a figure with its limit: speed, memory, accuracy and scale."""
import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench import harness, ranking_bench
from bench import ranking_providers as field
from bench.logits import make_inputs

MEBIBYTE = 1 << 20
ACCURACY = [("trained", 1000, 10**6), ("init", 1000, 10**6), ("trained", 200, 10**5), ("trained", 20000, 10**5)]
LOSS_LIMIT, GRADIENT_LIMIT = 1e-7, 1e-6


@dataclass(frozen=True)
class Targets:
    """What a loss promises.

    cpu_speed: (distribution, P, N, {provider to compare with: largest ratio of ours to it}).
    reference_to_loop: largest ratio of the plain PyTorch backend to the published loop, on the first problem of cpu_speed.
    cuda_speed: captured; (distribution, P, N, provider or None, limit): microseconds, or the ratio to the provider.
    scale: further rows, functions of (loss, arguments, report), on a CPU.
    """

    cpu_speed: tuple
    cuda_speed: tuple
    reference_to_loop: float | None = None
    scale: tuple[Callable, ...] = ()


def check(loss: field.RankingLoss, targets: Targets, arguments: argparse.Namespace) -> list[dict]:
    """Measures and prints every row. Forward + gradient through autograd; medians of alternating runs, over the seeds."""
    rows = []

    def report(target: str, limit: float | None, unit: str, got: float | None, note: str | None = None) -> None:
        """Without a limit the figure is told, and that there is one is all that must hold."""
        passed = got is not None and (limit is None or got <= limit)
        figures = {"limit": limit, "unit": unit, "got": ranking_bench.rounded(got)}
        rows.append({"target": target, **figures, "passed": passed, "note": note})
        figure = "none" if got is None else f"{got:.4g}"
        bound = "no limit" if limit is None else f"limit {limit:.4g}"
        remark = f"  ({note})" if note else ""
        print(f"{'pass' if passed else 'FAIL'}  {target}: {figure} {unit}, {bound}{remark}", flush=True)

    if arguments.device == "cuda":
        _cuda_speed(loss, targets.cuda_speed, arguments, report)
        compiled, sizes = ["cuda", "triton"], targets.cuda_speed
    else:
        _cpu_speed(loss, targets, arguments, report)
        for rows_of_scale in targets.scale:
            rows_of_scale(loss, arguments, report)
        compiled, sizes = ["cpp"], targets.cpu_speed
    for backend in compiled:
        for size in sizes:
            memory(loss, backend, size[:3], arguments, report)
    _accuracy(loss, arguments, compiled, report)
    print(f"{sum(row['passed'] for row in rows)} of {len(rows)} targets hold")
    return rows


def _cpu_speed(loss, targets, arguments, report) -> None:
    ours, reference = loss.name("cpp"), loss.name("reference")
    missing = loss.why_not("cpp", "cpu")
    for number, (*size, limits) in enumerate(targets.cpu_speed):
        with_reference = number == 0 and targets.reference_to_loop is not None
        timings, title, relevant = _time(loss, arguments, size, [ours, *limits] + [reference] * with_reference, False)
        for name, limit in limits.items():
            got = timings[ours].ratio_to(timings[name]) if ours in timings else None
            report(f"{ours}, {title}", limit, f"x {name}", got, missing or f"{medians(timings, ours, name)}; {relevant}")
        if with_reference:
            got = timings[reference].ratio_to(timings[field.LOOP])
            note = f"{medians(timings, reference, field.LOOP)}; {relevant}"
            report(f"{reference}, {title}", targets.reference_to_loop, f"x {field.LOOP}", got, note)


def _cuda_speed(loss, rows, arguments, report) -> None:
    for *size, other, limit in rows:
        names = [loss.name(backend) for backend in ("cuda", "triton")]
        timings, title, relevant = _time(loss, arguments, size, names + ([other, field.FOCAL] if other else []), True)
        for backend, ours in zip(("cuda", "triton"), names, strict=True):
            timing = timings.get(ours)
            note = loss.why_not(backend, "cuda") or (timing and timing.failure)
            got = None
            if timing and not timing.failure:
                got = timing.median * 1e6 if other is None else timing.ratio_to(timings[other])
            unit = "us" if other is None else f"x {other}"
            report(f"{ours}, {title}, captured", limit, unit, got, note or f"{medians(timings, ours)}; {relevant}")


def _time(loss, arguments, size, names: list[str], capture: bool) -> tuple[dict[str, harness.Draws], str, str]:
    case = ranking_bench.make_case(arguments, *size)
    chosen = argparse.Namespace(**{**vars(arguments), "providers": names})
    records, timings = ranking_bench.measure_speed(loss, chosen, case, "full", capture)
    ranking_bench.show(records, f"{case.title}, full{', captured' if capture else ''}")
    return timings, case.title, told_relevant(records[0]["relevant"])


def told_relevant(fractions: list[float]) -> str:
    """The fraction is an extreme value: it differs from draw to draw, and the time with it."""
    low, high = min(fractions), max(fractions)
    return f"{low:.2g} of the negatives matter" if low == high else f"{low:.2g} to {high:.2g} of the negatives matter"


def medians(timings: dict[str, harness.Draws], *names: str) -> str:
    known = [timings[name] for name in names if name in timings]
    return "; ".join(timing.failure or f"{timing.median * 1e3:.4g} ms" for timing in known)


def memory(loss, backend: str, size: tuple, arguments, report, limit: float | None = None) -> None:
    """Peak bytes of forward + gradient beyond the inputs: the gradient, a bit mask, the tables and a mebibyte, or `limit`."""
    case = ranking_bench.make_case(arguments, *size)
    elements = case.positives + case.negatives
    slots = case.max_positives or case.positives
    if limit is None:
        limit = elements * getattr(torch, case.dtype).itemsize + elements / 8 + 600 * slots + MEBIBYTE
    missing, got = loss.why_not(backend, case.device), None
    if missing is None:
        chosen = argparse.Namespace(**{**vars(arguments), "providers": [loss.name(backend)]})
        (record,) = ranking_bench.measure_memory(loss, chosen, case)
        got, missing = record["extra_bytes"], record["skipped"]
    got = None if got is None else got / MEBIBYTE
    report(f"{loss.name(backend)}, {case.title}, extra memory", limit / MEBIBYTE, "MiB", got, missing)


def _accuracy(loss, arguments, compiled: list[str], report) -> None:
    """Losses relative to the truth, the gradient relative to its largest entry; float32 logits."""
    backends = list(dict.fromkeys([*compiled, *loss.backends(arguments.device)]))
    for entry in ACCURACY:
        case = replace(ranking_bench.make_case(arguments, *entry), dtype="float32")
        inputs = make_inputs(case)
        truth = loss.truth(inputs)
        for backend in backends:
            missing = loss.why_not(backend, case.device)
            loss_error = gradient_error = None
            if missing is None:
                try:
                    loss_error, gradient_error = errors(loss, backend, inputs, truth)
                except Exception as error:  # a backend that fails must not hide the figures of the others
                    missing = f"{type(error).__name__}: {error}".splitlines()[0]
            name = loss.name(backend)
            report(f"{name}, {case.title}, losses", LOSS_LIMIT, "relative", loss_error, missing)
            report(f"{name}, {case.title}, gradient", GRADIENT_LIMIT, "of the largest", gradient_error, missing)


def errors(loss, backend: str, inputs, truth) -> tuple[float, float]:
    """The largest relative error of the losses (of aLRP: and of the ranks), and that of the gradient over its largest entry."""
    leaf = inputs.logits.detach().clone().requires_grad_()
    outputs = loss.outputs(leaf, inputs, backend)
    (gradient,) = torch.autograd.grad(outputs[: loss.num_losses], leaf)
    of_values = [
        ((got.double() - wanted).abs() / wanted).max().item() for got, wanted in zip(outputs, truth[:-1], strict=False)
    ]
    of_gradient = (gradient.double() - truth[-1]).abs().max() / truth[-1].abs().max()
    return max(of_values), of_gradient.item()
