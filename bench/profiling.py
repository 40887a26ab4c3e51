"""`--profile`: the trace of a provider's forward and backward for a trace viewer, and where their time goes, kernel by kernel.

On a CPU a kernel is an operator below autograd, timed as it is dispatched. On CUDA the kernels are read from the trace with their
registers, shared memory and occupancy, below the operator that launched them. What an operator must move is the size of the tensors
that it is given and returns; compiled code passes no dispatcher and is in the trace alone.
"""
import argparse
import gzip
import json
import pathlib
import re
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench import harness, measures
from bench.counts import Observer
from bench.providers import Provider, workload

CALLS = 5
BANDWIDTH_SECONDS = 0.2
IN_TRACE = "Compiled code passes no dispatcher: its time is in the trace.\n"
KERNEL_FIGURES = ("registers per thread", "shared memory", "est. achieved occupancy %")


@dataclass
class Operator:
    """Sums over all calls. kernels: {name: Kernel} that it launched on a device."""

    calls: int = 0
    seconds: float = 0.0
    moved: int = 0
    kernels: dict = field(default_factory=dict)


@dataclass
class Kernel:
    calls: int = 0
    seconds: float = 0.0
    figures: tuple = ()


class Costs(Observer):
    """Calls, seconds and bytes by operator."""

    def __init__(self):
        super().__init__()
        self.operators: dict[str, Operator] = {}

    def observe(self, function, args, kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds = time.perf_counter() - start
        operator = self.operators.setdefault(function._schema.name, Operator())
        operator.calls += 1
        operator.seconds += seconds
        operator.moved += moved_bytes(function, args, kwargs, result)
        return result


def moved_bytes(function: torch._ops.OpOverload, args: tuple, kwargs: dict, result: object) -> int:
    """Of everything that is read and written; a view and memory that is only taken move nothing."""
    if function.is_view or function._schema.name.partition("::")[2].lstrip("_").startswith(("empty", "new_empty", "detach")):
        return 0
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
    # An expanded tensor is no larger than what it is made of.
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)


def read_kernels(events: list[dict], operators: dict[str, Operator]) -> None:
    """Puts the kernels of a trace below their operators, whose seconds become those of their kernels."""
    launchers = [event for event in events if event.get("cat") == "cpu_op" and "External id" in event.get("args", {})]
    names = {event["args"]["External id"]: event["name"] for event in launchers}
    kernels = [event for event in events if event.get("cat") == "kernel"]
    for operator in operators.values():
        operator.seconds = 0.0
    for event in kernels:
        operator = operators.setdefault(names.get(event["args"].get("External id"), "outside of operators"), Operator())
        kernel = operator.kernels.setdefault(event["name"], Kernel())
        kernel.calls += 1
        kernel.seconds += event["dur"] / 1e6
        kernel.figures = tuple(event["args"].get(name) for name in KERNEL_FIGURES)
        operator.seconds += event["dur"] / 1e6


def table(operators: dict[str, Operator], bandwidth: float, calls: int = CALLS) -> str:
    """Markdown, per step, slowest first. bandwidth: bytes per second of the copy."""
    has_kernels = any(operator.kernels for operator in operators.values())
    heads = ["kernel", "calls", "us", "bytes that must move", "GB/s", "share of the floor"]
    heads += ["registers", "shared memory", "occupancy, %"] * has_kernels
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, operator in sorted(operators.items(), key=lambda item: -item[1].seconds):
        rate = operator.moved / operator.seconds if operator.seconds else 0.0
        share = f"{100 * rate / bandwidth:.0f} %" if operator.moved else "-"
        cells = [f"`{name}`", _per(operator.calls, calls), _per(operator.seconds * 1e6, calls), f"{operator.moved / calls:,.0f}"]
        cells += [f"{rate / 1e9:.3g}", share]
        lines.append("| " + " | ".join(cells + [""] * (len(heads) - len(cells))) + " |")
        for kernel_name, kernel in operator.kernels.items():
            cells = [f"- `{kernel_name[:80]}`", _per(kernel.calls, calls), _per(kernel.seconds * 1e6, calls), "", "", ""]
            lines.append("| " + " | ".join([*cells, *("-" if value is None else str(value) for value in kernel.figures)]) + " |")
    return "\n".join(lines) + "\n"


def _per(total: float, calls: int) -> str:
    return f"{total / calls:.4g}"


def profile(loss, arguments: argparse.Namespace, case) -> list[pathlib.Path]:
    """Writes and prints what the providers cost: those that were asked for, else this library's automatic choice."""
    inputs = loss.problems.make_inputs(case)
    chosen = measures.chosen_providers(loss, arguments, case)
    chosen = [provider for provider in chosen if not provider.why_not(case)]
    moved = inputs.minimal_bytes()
    floor = harness.copy_floor(moved, case.device, inputs.working_set())
    bandwidth = moved / harness.measure([floor], case.device, BANDWIDTH_SECONDS)[harness.COPY].median
    written = []
    for provider in chosen if arguments.providers else chosen[:1]:
        name = re.sub(r"[^\w.=-]+", "_", f"{loss.stem} {case.title} {provider.name}").strip("_")
        trace = arguments.out / f"{name}.trace.json.gz"
        operators = trace_and_costs(provider, inputs, case.device, trace)
        title = f"**{provider.name}, {case.title}**, forward + backward, per step; a copy moves {bandwidth / 1e9:.3g} GB/s"
        text = f"{title}\n\n{table(operators, bandwidth) if operators else IN_TRACE}"
        print(f"\n{text}\n{trace}", flush=True)
        trace.with_name(f"{name}.md").write_text(text)
        written += [trace, trace.with_name(f"{name}.md")]
    return written


def trace_and_costs(provider: Provider, inputs, device: str, path: pathlib.Path) -> dict[str, Operator]:
    """Writes the trace of CALLS steps, and takes the costs of as many more, which the trace would slow down."""
    work = workload(provider, inputs, "full")
    for _ in range(2):
        work.call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(activities=activities) as recorded:
        for number in range(CALLS):
            with torch.profiler.record_function(f"step {number}"):
                work.call()
        if device == "cuda":
            torch.cuda.synchronize()
    recorded.export_chrome_trace(str(path))
    if provider.is_compiled:
        operators = {}
    else:
        with Costs() as costs:
            for _ in range(CALLS):
                work.call()
        operators = costs.operators
    if device == "cuda":
        with gzip.open(path, "rt") as file:
            read_kernels(json.load(file)["traceEvents"], operators)
    return operators
