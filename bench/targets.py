"""Rows that must hold, each a figure with its limit, whatever the family of the loss: how they are told, memory and accuracy."""
import argparse
from collections.abc import Mapping, Sequence

import torch

from bench import harness, loss_bench, measures

MEBIBYTE = 1 << 20


class Aim(float):
    """In place of a limit: told with the row, which holds without it."""


def as_aims(limits: Mapping[str, float | None]) -> dict[str, Aim | None]:
    return {name: None if limit is None else Aim(limit) for name, limit in limits.items()}


def verdict(record: Mapping[str, object]) -> str:
    """Of a row with a limit: pass or FAIL. Of others, which only must have a figure: told or FAIL, and met or missed with an aim."""
    if not record["passed"]:
        return "FAIL"
    if record["aim"] is not None:
        return "met" if record["got"] <= record["aim"] else "missed"
    return "told" if record["limit"] is None else "pass"


class Rows:
    """Collects the records of a results file and prints each as it comes."""

    def __init__(self):
        self.records = []

    def __call__(self, target: str, limit: float | None, unit: str, got: float | None, note: str | None = None) -> None:
        """Without a limit the figure is told, and that there is one is all that must hold."""
        limit, aim = (None, float(limit)) if isinstance(limit, Aim) else (limit, None)
        passed = got is not None and (limit is None or got <= limit)
        figures = {"limit": limit, "aim": aim, "unit": unit, "got": measures.rounded(got)}
        self.records.append({"target": target, **figures, "passed": passed, "note": note})
        figure = "none" if got is None else f"{got:.4g}"
        bound = f"limit {limit:.4g}" if limit is not None else "no limit" if aim is None else f"aim {aim:.4g}"
        remark = f"  ({note})" if note else ""
        print(f"{verdict(self.records[-1]):<6}  {target}: {figure} {unit}, {bound}{remark}", flush=True)

    def close(self) -> list[dict]:
        print(summary(self.records))
        return self.records


def summary(records: Sequence[Mapping[str, object]]) -> str:
    """How many of the rows with a limit hold, how many of those with an aim meet it."""
    verdicts = [verdict(record) for record in records]
    words = [f"{verdicts.count('pass')} of {sum(record['limit'] is not None for record in records)} rows that must hold do"]
    if any(record["aim"] is not None for record in records):
        words.append(f"{verdicts.count('met')} of {sum(record['aim'] is not None for record in records)} aims are met")
    return ", ".join(words)


def changed(arguments: argparse.Namespace, **options: object) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(arguments), **options})


def time_case(loss, arguments, case, names: list[str], capture: bool = False) -> tuple[dict[str, harness.Draws], list[dict]]:
    """Timings of the providers named so, beside the copy; printed. And their records."""
    records, timings = measures.measure_speed(loss, changed(arguments, providers=names), case, "full", capture)
    loss_bench.show(records, f"{case.title}, full{', captured' if capture else ''}, {arguments.cache}")
    return timings, records


def medians(timings: dict[str, harness.Draws], *names: str) -> str:
    known = [timings[name] for name in names if name in timings]
    return "; ".join(timing.failure or f"{timing.median * 1e3:.4g} ms" for timing in known)


def memory(loss, backend: str, case, limit: float, arguments, report: Rows) -> None:
    """Peak bytes of forward + gradient beyond the inputs."""
    missing, got = loss.why_not(backend, case.device), None
    if missing is None:
        (record,) = measures.measure_memory(loss, changed(arguments, providers=[loss.name(backend)]), case)
        got, missing = record["extra_bytes"], record["skipped"]
    got = None if got is None else got / MEBIBYTE
    report(f"{loss.name(backend)}, {case.title}, extra memory", limit / MEBIBYTE, "MiB", got, missing)


def accuracy(loss, case, backends: list[str], limits: tuple[float, float], report: Rows) -> None:
    """Losses relative to the truth, the gradient relative to its largest entry."""
    inputs = loss.problems.make_inputs(case)
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
        report(f"{name}, {case.title}, losses", limits[0], "relative", loss_error, missing)
        report(f"{name}, {case.title}, gradient", limits[1], "of the largest", gradient_error, missing)


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


def captured(loss, arguments: argparse.Namespace, report: Rows, cases: list[tuple]) -> None:
    """Rows of (case, limit) on CUDA: forward and backward as one graph over the copy of what they must move, of both backends."""
    for case, limit in cases:
        names = {backend: loss.name(backend) for backend in ("cuda", "triton")}
        timings, _ = time_case(loss, arguments, case, list(names.values()), capture=True)
        for backend, ours in names.items():
            timing = timings.get(ours)
            got = timing.ratio_to(timings[harness.COPY]) if timing and not timing.failure else None
            note = loss.why_not(backend, "cuda") or medians(timings, ours, harness.COPY)
            report(f"{ours}, {case.title}, captured, {arguments.cache}", limit, f"x {harness.COPY}", got, note)
