"""Which way of launching the ranking kernels is the fastest: every way of csrc/common/launch_options.h, measured in one call.

    python bench/gpu_variants.py [--out FOLDER] [--budget SECONDS]

Forward, and forward + backward, of Rank & Sort as replays of CUDA graphs, in turns, with a cold and a warm L2 cache. Every way must give
the bits of the first one, and that is checked against every pair in float64. Prints a table and the way that is fastest where it
matters; with --out writes gpu_variants.json. Exit status 1 if a way differs, 2 without a CUDA device.
"""
import argparse
import ctypes
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from bench import harness  # noqa: E402
from bench.bench_rank_sort import LOSS  # noqa: E402
from bench.logits import Case, Inputs, make_inputs  # noqa: E402
from bench.providers import differentiated  # noqa: E402
from rsloss_kernels import use_backend  # noqa: E402


class Options(NamedTuple):
    """LaunchOptions of csrc/common/launch_options.h."""

    is_programmatic: bool = False
    blocks_per_processor: int = 1
    most_replicas: int = 32


DEFAULT = "as it is"
WAYS = {
    DEFAULT: Options(),
    "early starts": Options(is_programmatic=True),
    "two blocks of 768": Options(blocks_per_processor=2),
    "four replicas": Options(most_replicas=4),
    "all three": Options(True, 2, 4),
}
# Distribution, positives, negatives, capacity; each in both dtypes. The sizes that the library promises something for.
PROBLEMS = (("trained", 1000, 2 * 10**6, 2048), ("trained", 3000, 2 * 10**7, 8192), ("init", 1000, 2 * 10**6, 2048))
DTYPES = ("float32", "bfloat16")
LOSS_LIMIT, GRADIENT_LIMIT = 1e-7, 1e-6
Outputs = tuple[Tensor, ...]


def find_setter() -> Callable[..., bool]:
    """The function of the compiled library that is loaded. Raises `RuntimeError` where none is."""
    for path in torch.ops.loaded_libraries:
        setter = getattr(ctypes.CDLL(path), "rsloss_set_launch_options", None)
        if setter is not None:
            setter.restype, setter.argtypes = ctypes.c_bool, (ctypes.c_bool, ctypes.c_int, ctypes.c_int)
            return setter
    raise RuntimeError("gpu_variants: the CUDA library of rsloss_kernels is not loaded")


@contextmanager
def launched(setter: Callable[..., bool], options: Options) -> Iterator[None]:
    if not setter(*options):
        raise ValueError(f"gpu_variants: the library refuses {options}")
    try:
        yield
    finally:
        setter(*WAYS[DEFAULT])


def compare_ways(setter: Callable[..., bool], inputs: Inputs) -> dict[str, str | None]:
    """By way: None, or in words how its losses and gradient differ from those of the default, and that from the truth."""
    outputs = {name: _evaluate(setter, options, inputs) for name, options in WAYS.items()}
    *losses, gradient = outputs[DEFAULT]
    *true_losses, true_gradient = LOSS.truth(inputs)
    of_losses = max(abs(got.item() / true.item() - 1) for got, true in zip(losses, true_losses, strict=True))
    of_gradient = ((gradient.double() - true_gradient).abs().max() / true_gradient.abs().max()).item()
    rounding = torch.finfo(gradient.dtype).eps if gradient.element_size() == 2 else 0.0
    verdicts = {}
    for name, values in outputs.items():
        is_equal = all(torch.equal(one, other) for one, other in zip(values, outputs[DEFAULT], strict=True))
        verdicts[name] = None if is_equal else "other bits than the default"
    if of_losses > LOSS_LIMIT or of_gradient > GRADIENT_LIMIT + rounding:
        verdicts[DEFAULT] = f"errors of {of_losses:.1e} in a loss, {of_gradient:.1e} in the gradient"
    return verdicts


def _evaluate(setter: Callable[..., bool], options: Options, inputs: Inputs) -> Outputs:
    with launched(setter, options), use_backend("cuda"):
        leaf = inputs.logits.detach().clone().requires_grad_()
        losses = LOSS.call(leaf, inputs, max_positives=inputs.case.max_positives)
        (gradient,) = torch.autograd.grad(sum(losses), leaf)
    return *(loss.detach() for loss in losses), gradient


def time_ways(setter: Callable[..., bool], inputs: Inputs, mode: str, cold: bool, budget: float) -> dict[str, harness.Timing]:
    """Every way captured in a graph of its own."""
    workloads = []
    for name, options in WAYS.items():
        plain = differentiated(name, LOSS.forward(inputs, "cuda"), inputs.logits, mode)

        def call(plain=plain, options=options):
            with launched(setter, options):
                return plain.call()

        workloads.append(harness.Workload(name, call))
    return harness.measure(workloads, "cuda", budget, capture=True, cold=cold)


def measure_problem(setter: Callable[..., bool], case: Case, budget: float) -> list[dict]:
    inputs = make_inputs(case)
    verdicts = compare_ways(setter, inputs)
    records = []
    for mode in ("forward", "full"):
        for cold in (True, False):
            timings = time_ways(setter, inputs, mode, cold, budget)
            for name, timing in timings.items():
                problem = {"problem": case.title, "mode": mode, "cache": "cold" if cold else "warm", "way": name}
                figures = dict.fromkeys(("low_us", "median_us", "high_us", "ratio"))
                if timing.failure is None:
                    low, median, high = (1e6 * quartile for quartile in timing.quartiles)
                    figures = {"low_us": low, "median_us": median, "high_us": high, "ratio": timing.ratio_to(timings[DEFAULT])}
                wrong = verdicts[name] or timing.failure
                records.append({**problem, "options": WAYS[name]._asdict(), **figures, "wrong": wrong})
    return records


def show(records: list[dict]) -> None:
    previous = None
    for record in records:
        problem = f"{record['problem']}, {record['mode']}, {record['cache']}"
        if problem != previous:
            print(problem, flush=True)
        previous = problem
        times = "no time"
        if record["median_us"] is not None:
            times = f"{record['median_us']:8.1f} us ({record['low_us']:.1f} to {record['high_us']:.1f})  {record['ratio']:.3f} x"
        print(f"  {record['way']:<18} {times}  {record['wrong'] or ''}".rstrip(), flush=True)


def summary(records: list[dict]) -> dict[str, float]:
    """By way the geometric mean of its ratios to the default over all problems of forward + backward; of ways that are right."""
    wrong = {record["way"] for record in records if record["wrong"]}
    ratios = {}
    for record in records:
        if record["way"] not in wrong and record["mode"] == "full":
            ratios.setdefault(record["way"], []).append(record["ratio"])
    return {name: statistics.geometric_mean(values) for name, values in ratios.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="folder for gpu_variants.json")
    parser.add_argument("--budget", type=float, default=0.03, help="seconds of replays for each way, mode and state of the cache")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_variants: this machine has no CUDA device, and there is nothing to measure without", file=sys.stderr)
        return 2
    setter, records = find_setter(), []
    for *problem, capacity in PROBLEMS:
        for dtype in DTYPES:
            case = replace(Case(*problem, "index", max_positives=capacity), dtype=dtype, device="cuda")
            mine = measure_problem(setter, case, arguments.budget)
            show(mine)
            records += mine
    means = summary(records)
    for name, mean in sorted(means.items(), key=lambda item: item[1]):
        print(f"{name:<20} {mean:.3f} x the default, forward + backward, mean over all problems")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        document = {"machine": harness.machine("cuda"), "means": means, "records": records}
        (arguments.out / "gpu_variants.json").write_text(json.dumps(document, indent=1) + "\n")
    return int(any(record["wrong"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
