"""Shows that the losses run on a GPU without the host: forward + backward captured in a CUDA graph, replayed with new data.

    python bench/gpu_capture.py                                   cuda and triton, captured, against eager and the float64 truth
    python bench/gpu_capture.py --sweep --backends cuda           many small problems, eager, to run under compute-sanitizer
    python bench/gpu_capture.py --sweep --device cpu --backends reference

A captured replay must equal the eager run bit by bit, for data with other numbers of positives than the captured ones. Eager
runs and the capture happen under `torch.cuda.set_sync_debug_mode("error")`. Exit status 1 if anything differs.
"""
import argparse
import contextlib
import pathlib
import sys

import torch
from torch import Tensor

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from bench.logits import Case, Inputs, make_inputs  # noqa: E402
from bench.peers.brute_force import brute_force_rank_sort  # noqa: E402
from rsloss_kernels import rank_sort_loss, use_backend  # noqa: E402

DELTA = 0.5
CAPACITY = 1024
LOSS_LIMIT, GRADIENT_LIMIT = 1e-7, 1e-6
# Of the sweep: nothing, single elements, sizes around a warp and a block, more than a block of positives.
SIZES = [(0, 0), (1, 0), (0, 5), (1, 1), (3, 31), (17, 1000), (40, 4097), (300, 20000), (1000, 3000)]


def run(logits: Tensor, targets: Tensor, quality: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both losses and the gradient of their sum, through the public function and autograd."""
    losses = rank_sort_loss(logits, targets, quality, delta=DELTA, max_positives=CAPACITY)
    (gradient,) = torch.autograd.grad(losses, logits)
    return losses.ranking.detach(), losses.sorting.detach(), gradient


def describe_error(got: tuple[Tensor, ...], inputs: Inputs) -> str | None:
    """None if `got` is within the gates of the float64 truth, else the errors in words."""
    ranking, sorting, gradient = (value.cpu() for value in got)
    if not bool((inputs.dense > 0).any()):
        is_zero = ranking == 0 and sorting == 0 and bool((gradient == 0).all())
        return None if is_zero else f"no positives, but losses {ranking.item()} and {sorting.item()}"
    # On the CPU: under compute-sanitizer the many small kernels of the brute force would take minutes.
    truth = brute_force_rank_sort(inputs.logits.cpu(), inputs.dense.cpu(), DELTA)
    # A loss that is exactly 0 has no relative error; rounding of the truth itself is about 1e-16.
    of_losses = [
        ((value.double() - wanted).abs() / wanted.abs().clamp(min=1e-9)).item()
        for value, wanted in zip((ranking, sorting), truth[:2], strict=True)
    ]
    of_gradient = ((gradient.double() - truth[2]).abs().max() / truth[2].abs().max().clamp(min=1e-12)).item()
    if max(of_losses) <= LOSS_LIMIT and of_gradient <= GRADIENT_LIMIT:
        return None
    return f"relative errors of the losses {of_losses}, of the gradient {of_gradient:.2e}"


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_capture(form: str, dtype: str) -> str:
    """Captures on one batch, replays on three others; raises `AssertionError` with the reason, else says what was done."""
    # Other numbers of positives in every batch, with the number of elements unchanged.
    batches = [
        make_inputs(Case(kind, positives, 50_000 - positives, form, dtype, "cuda", seed))
        for seed, (kind, positives) in enumerate([("trained", 300), ("init", 17), ("separated", 500), ("trained", 1)])
    ]
    static = batches[0]
    logits = static.logits.clone().requires_grad_()
    targets = static.targets.clone()
    quality = None if static.quality is None else static.quality.clone()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(logits, targets, quality)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with no_synchronisation():
        run(logits, targets, quality)
        with torch.cuda.graph(graph):
            outputs = run(logits, targets, quality)

    for inputs in [*batches[1:], batches[0]]:
        with torch.no_grad():
            logits.copy_(inputs.logits)
        targets.copy_(inputs.targets)
        if quality is not None:
            quality.copy_(inputs.quality)
        graph.replay()
        torch.cuda.synchronize()
        replayed = tuple(output.clone() for output in outputs)
        with no_synchronisation():
            eager = run(inputs.logits.clone().requires_grad_(), inputs.targets, inputs.quality)
        for name, one, other in zip(("ranking", "sorting", "gradient"), replayed, eager, strict=True):
            assert torch.equal(one, other), f"{inputs.case.title}: {name} of the replay differs from the eager run"
        if dtype == "float32":
            error = describe_error(replayed, inputs)
            assert error is None, f"{inputs.case.title}: {error}"
    return f"captured once, replayed on {len(batches)} batches, equal to eager bit by bit"


def check_sweep(device: str) -> str:
    """Small problems in every form and dtype, float32 against the truth."""
    count = 0
    for form in ("dense", "index"):
        for dtype in ("float32", "float16", "bfloat16", "float64"):
            for positives, negatives in SIZES:
                if form == "index":
                    negatives = max(negatives, 80 * positives)
                inputs = make_inputs(Case("trained", positives, negatives, form, dtype, device, seed=positives))
                got = run(inputs.logits.clone().requires_grad_(), inputs.targets, inputs.quality)
                assert all(bool(value.isfinite().all()) for value in got), f"{inputs.case.title}: not finite"
                if dtype == "float32":
                    error = describe_error(got, inputs)
                    assert error is None, f"{inputs.case.title}: {error}"
                count += 1
    return f"{count} small problems"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="cuda,triton", help="comma list")
    parser.add_argument("--sweep", action="store_true", help="small eager problems instead of captures")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; --sweep --device cpu runs without")
    if arguments.device == "cpu" and not arguments.sweep:
        parser.error("a capture needs a CUDA device")
    failed = 0
    for backend in arguments.backends.split(","):
        checks = [("sweep", lambda: check_sweep(arguments.device))]
        if not arguments.sweep:
            pairs = [("dense", "float32"), ("index", "float32"), ("dense", "bfloat16"), ("index", "float64")]
            checks = [(" ".join(pair), lambda pair=pair: check_capture(*pair)) for pair in pairs]
        for name, check in checks:
            try:
                with use_backend(backend):
                    print(f"pass  {backend} {name}: {check()}", flush=True)
            except Exception as error:  # whatever goes wrong with one check, the others still run
                failed += 1
                print(f"FAIL  {backend} {name}: {type(error).__name__}: {error}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
