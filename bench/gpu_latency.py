"""What a small call costs the host on a GPU, what its replay costs by itself, and ranking beside this library's own focal loss.

    python bench/gpu_latency.py [--out FOLDER]
    python bench/gpu_latency.py --once        one forward + backward between profiler marks, for ncu --profile-from-start off

Enqueued: from the call to its return, the device idle before. Prints rows with their limits, or aims, which nothing fails for; with
--out writes gpu_latency.json. Exit status 1 if a row fails, 2 without a CUDA device.
"""
import argparse
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from bench import harness, targets  # noqa: E402
from bench.bench_rank_sort import LOSS  # noqa: E402
from bench.logits import Case, make_inputs  # noqa: E402
from bench.providers import differentiated  # noqa: E402
from rsloss_kernels import sigmoid_focal_loss  # noqa: E402

# Positives and negatives of the small call, and its capacity.
TINY = 10, 1000, 64
FORWARD_US, BOTH_US = 50.0, 90.0
CALLS, WARM_UPS = 300, 30
# Positives, negatives, capacity; microseconds or None, and the ratio to the own focal loss or None, that are aimed at.
BESIDE_FOCAL = ((1000, 2 * 10**6, 2048, 20.0, None), (3000, 2 * 10**7, 8192, None, 1.3))
ONCE = (("float32", 3000, 2 * 10**7, 8192), ("bfloat16", 3000, 2 * 10**7, 8192), ("float32", 1000, 2 * 10**6, 2048))


def cuda_case(positives: int, negatives: int, capacity: int, dtype: str = "float32", form: str = "index") -> Case:
    return replace(Case("trained", positives, negatives, form, max_positives=capacity), dtype=dtype, device="cuda")


def enqueued_us(call: Callable[[], object]) -> float:
    """Microseconds until the call returns; the median."""
    samples = []
    for number in range(WARM_UPS + CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        kept = call()
        seconds = time.perf_counter() - start
        del kept
        if number >= WARM_UPS:
            samples.append(seconds)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(samples)


def host_rows(report: targets.Rows) -> None:
    inputs = make_inputs(cuda_case(*TINY, form="dense"))
    title = f"P={TINY[0]} N={TINY[1]}"
    for backend, limits in (("cuda", (FORWARD_US, BOTH_US)), ("triton", (None, None))):
        missing = LOSS.why_not(backend, "cuda")
        for mode, limit in zip(("forward", "full"), limits, strict=True):
            got = None
            if missing is None:
                plain = differentiated(backend, LOSS.forward(inputs, backend), inputs.logits, mode)
                got = enqueued_us(plain.call)
            report(f"{LOSS.name(backend)}, {title}, {mode}, enqueued", limit, "us", got, missing)
        if missing is None:
            replay = harness.captured(differentiated(backend, LOSS.forward(inputs, backend), inputs.logits))
            report(f"{LOSS.name(backend)}, {title}, full, replay enqueued", None, "us", enqueued_us(replay.call))
            again = differentiated(backend, LOSS.forward(inputs, backend), inputs.logits)
            timing = harness.measure([again], "cuda", 0.02, capture=True, cold=False)
            report(f"{LOSS.name(backend)}, {title}, full, replay on the device", None, "us", 1e6 * timing[backend].median)


def _own_focal(labels: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    """From class indices too, on the backend that it takes by itself."""
    return (sigmoid_focal_loss(logits, labels, reduction="sum"),)


def focal_rows(report: targets.Rows) -> None:
    for positives, negatives, capacity, microseconds, ratio in BESIDE_FOCAL:
        for dtype in ("float32", "bfloat16"):
            case = cuda_case(positives, negatives, capacity, dtype)
            inputs = make_inputs(case)
            ours = differentiated("ours", LOSS.forward(inputs, "cuda"), inputs.logits)
            theirs = differentiated("focal", functools.partial(_own_focal, inputs.targets), inputs.logits)
            for cold in (True, False):
                timings = harness.measure([ours, theirs], "cuda", 0.05, capture=True, cold=cold)
                failure = timings["ours"].failure or timings["focal"].failure
                note = failure or f"{timings['ours'].median * 1e6:.1f} us; {timings['focal'].median * 1e6:.1f} us"
                title = f"{LOSS.name('cuda')}, {case.title}, captured, {'cold' if cold else 'warm'}"
                if microseconds is not None:
                    got = None if failure else 1e6 * timings["ours"].median
                    report(title, targets.Aim(microseconds), "us", got, note)
                got = None if failure else timings["ours"].ratio_to(timings["focal"])
                report(title, None if ratio is None else targets.Aim(ratio), "x the own focal loss", got, note)


def run_once() -> None:
    for dtype, *size in ONCE:
        inputs = make_inputs(cuda_case(*size, dtype))
        workload = differentiated("once", LOSS.forward(inputs, "cuda"), inputs.logits)
        for _ in range(2):
            workload.call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        workload.call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="folder for gpu_latency.json")
    parser.add_argument("--once", action="store_true", help="nothing but the calls to profile")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_latency: this machine has no CUDA device, and there is nothing to measure without", file=sys.stderr)
        return 2
    if arguments.once:
        run_once()
        return 0
    report = targets.Rows()
    host_rows(report)
    focal_rows(report)
    records = report.close()
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        document = {"machine": harness.machine("cuda"), "records": records}
        (arguments.out / "gpu_latency.json").write_text(json.dumps(document, indent=1) + "\n")
    return int(not all(record["passed"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
