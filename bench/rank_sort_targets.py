"""The rows of the Rank & Sort benchmark that must hold, each a figure with its limit: speed, memory and accuracy."""
import argparse

import torch

import rsloss_kernels
from bench import bench_rank_sort as bench
from bench import rank_sort_providers as field
from bench.logits import Case, make_inputs
from bench.peers.brute_force import brute_force_rank_sort

MEBIBYTE = 1 << 20
# (distribution, P, N, [(provider to compare with, largest ratio of ours to it)])
CPU_SPEED = [
    ("trained", 1000, 10**6, [(field.FOCAL, 0.20), (field.LOOP, 1 / 250)]),
    ("init", 1000, 10**6, [(field.FOCAL, 0.30)]),
    ("trained", 200, 10**5, [(field.FOCAL, 0.50)]),
    ("trained", 20000, 10**6, [(field.FOCAL, 1.5)]),
]
ACCURACY = [("trained", 1000, 10**6), ("init", 1000, 10**6), ("trained", 200, 10**5), ("trained", 20000, 10**5)]
LOSS_LIMIT, GRADIENT_LIMIT = 1e-7, 1e-6
# (distribution, P, N, provider or None, limit): captured; microseconds, or the ratio to the provider.
CUDA_SPEED = [("trained", 1000, 2 * 10**6, None, 40.0), ("trained", 3000, 2 * 10**7, field.COMPILED_FOCAL, 2.0)]


def check(arguments: argparse.Namespace) -> list[dict]:
    """Measures and prints every row. Forward + gradient through autograd; medians of alternating runs."""
    rows = []

    def report(target: str, limit: float, unit: str, got: float | None, note: str | None = None) -> None:
        passed = got is not None and got <= limit
        rows.append(
            {"target": target, "limit": limit, "unit": unit, "got": bench.rounded(got), "passed": passed, "note": note}
        )
        figure = "none" if got is None else f"{got:.4g}"
        remark = f"  ({note})" if note else ""
        print(f"{'pass' if passed else 'FAIL'}  {target}: {figure} {unit}, limit {limit:.4g}{remark}", flush=True)

    if arguments.device == "cuda":
        _cuda_speed(arguments, report)
        compiled = ["cuda", "triton"]
    else:
        _cpu_speed(arguments, report)
        compiled = ["cpp"]
    _memory(arguments, compiled, report)
    _accuracy(arguments, compiled, report)
    print(f"{sum(row['passed'] for row in rows)} of {len(rows)} targets hold")
    return rows


def _cpu_speed(arguments, report) -> None:
    ours, reference = field.our_name("cpp"), field.our_name("reference")
    missing = field.why_no_backend("cpp", "cpu")
    for distribution, positives, negatives, limits in CPU_SPEED:
        wanted = [ours] + [name for name, _ in limits]
        is_first = (distribution, positives, negatives) == CPU_SPEED[0][:3]
        timings, title = _time(arguments, distribution, positives, negatives, wanted + [reference] * is_first, False)
        for name, limit in limits:
            got = timings[ours].ratio_to(timings[name]) if ours in timings else None
            report(f"{ours}, {title}", limit, f"x {name}", got, missing or _medians(timings, ours, name))
        if is_first:
            got = timings[reference].ratio_to(timings[field.LOOP])
            report(f"{reference}, {title}", 0.25, f"x {field.LOOP}", got, _medians(timings, reference, field.LOOP))


def _cuda_speed(arguments, report) -> None:
    for distribution, positives, negatives, other, limit in CUDA_SPEED:
        names = [field.our_name(backend) for backend in ("cuda", "triton")]
        wanted = names + ([other, field.FOCAL] if other else [])
        timings, title = _time(arguments, distribution, positives, negatives, wanted, True)
        for backend, ours in zip(("cuda", "triton"), names, strict=True):
            timing = timings.get(ours)
            note = field.why_no_backend(backend, "cuda") or (timing and timing.failure)
            if other is None:
                got = timing.median * 1e6 if timing and timing.samples else None
                report(f"{ours}, {title}, captured", limit, "us", got, note)
            else:
                got = timing.ratio_to(timings[other]) if timing else None
                report(f"{ours}, {title}, captured", limit, f"x {other}", got, note or _medians(timings, ours, other))


def _time(arguments, distribution: str, positives: int, negatives: int, names: list[str], capture: bool) -> tuple[dict, str]:
    case = bench.make_case(arguments, distribution, positives, negatives)
    chosen = argparse.Namespace(**{**vars(arguments), "providers": names})
    records, timings = bench.measure_speed(chosen, case, "full", capture)
    bench.show(records, f"{case.title}, full{', captured' if capture else ''}")
    return timings, case.title


def _medians(timings: dict, *names: str) -> str:
    known = [timings[name] for name in names if name in timings]
    return "; ".join(timing.failure or f"{timing.median * 1e3:.4g} ms" for timing in known)


def _memory(arguments, backends: list[str], report) -> None:
    rows = CPU_SPEED if arguments.device == "cpu" else CUDA_SPEED
    for backend in backends:
        for distribution, positives, negatives, *_ in rows:
            case = bench.make_case(arguments, distribution, positives, negatives)
            elements = positives + negatives
            slots = case.max_positives or positives
            limit = elements * getattr(torch, case.dtype).itemsize + elements / 8 + 600 * slots + MEBIBYTE
            chosen = argparse.Namespace(**{**vars(arguments), "providers": [field.our_name(backend)]})
            records = bench.measure_memory(chosen, case) if field.why_no_backend(backend, case.device) is None else []
            got = records[0]["extra_bytes"] / MEBIBYTE if records and records[0]["extra_bytes"] is not None else None
            note = records[0]["skipped"] if records else field.why_no_backend(backend, case.device)
            report(f"{field.our_name(backend)}, {case.title}, extra memory", limit / MEBIBYTE, "MiB", got, note)


def _accuracy(arguments, compiled: list[str], report) -> None:
    """Losses relative to the truth, the gradient relative to its largest entry; float32 logits."""
    backends = list(dict.fromkeys([*compiled, *field.our_backends(arguments.device)]))
    for entry in ACCURACY:
        case = Case(**{**bench.make_case(arguments, *entry).as_dict(), "dtype": "float32"})
        inputs = make_inputs(case)
        truth = brute_force_rank_sort(inputs.logits, inputs.dense, field.DELTA)
        for backend in backends:
            missing = field.why_no_backend(backend, case.device)
            loss_error = gradient_error = None
            if missing is None:
                try:
                    loss_error, gradient_error = errors(backend, inputs, truth)
                except Exception as error:  # a backend that fails must not hide the figures of the others
                    missing = f"{type(error).__name__}: {error}".splitlines()[0]
            name = field.our_name(backend)
            report(f"{name}, {case.title}, losses", LOSS_LIMIT, "relative", loss_error, missing)
            report(f"{name}, {case.title}, gradient", GRADIENT_LIMIT, "of the largest", gradient_error, missing)


def errors(backend: str, inputs, truth) -> tuple[float, float]:
    """The larger relative error of the two losses, and the largest gradient error over the largest entry."""
    leaf = inputs.logits.detach().clone().requires_grad_()
    with rsloss_kernels.use_backend(backend):
        losses = rsloss_kernels.rank_sort_loss(
            leaf, inputs.targets, inputs.quality, delta=field.DELTA, max_positives=inputs.case.max_positives
        )
    (gradient,) = torch.autograd.grad(losses, leaf)
    of_losses = [abs(got.double() - wanted) / wanted for got, wanted in zip(losses, truth[:2], strict=True)]
    of_gradient = (gradient.double() - truth[2]).abs().max() / truth[2].abs().max()
    return max(of_losses).item(), of_gradient.item()
