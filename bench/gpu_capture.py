"""Shows that the losses run on a GPU without the host: forward + backward captured in a CUDA graph, replayed with new data.

    python bench/gpu_capture.py                                   cuda and triton, captured, against eager and the float64 truth
    python bench/gpu_capture.py --many                            as many positives as change the method, eager
    python bench/gpu_capture.py --sweep --backends cuda           many small problems, eager, to run under compute-sanitizer
    python bench/gpu_capture.py --sweep --device cpu --backends reference

A captured replay must equal the eager run bit by bit, for data with other numbers of positives than the captured ones. Eager
runs and the capture happen under `torch.cuda.set_sync_debug_mode("error")`. Exit status 1 if anything differs.
"""
import argparse
import contextlib
import functools
import pathlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from bench.logits import Case, Inputs, make_inputs  # noqa: E402
from bench.peers.brute_force import (  # noqa: E402
    brute_force_alrp,
    brute_force_average_precision,
    brute_force_rank_sort,
)
from bench.peers.ghm import ghm_truth  # noqa: E402
from rsloss_kernels import (  # noqa: E402
    ClassGroups,
    _backends,
    _library,
    alrp_loss,
    average_precision_loss,
    equalized_focal_loss,
    ghm_classification_loss,
    ghm_regression_loss,
    group_softmax_loss,
    quality_focal_loss,
    rank_sort_loss,
    sigmoid_focal_loss,
    use_backend,
)

DELTA = 0.5
CAPACITY = 1024
BINS, MU = 30, 5.0
LOSS_LIMIT = 1e-7
# Of the sweep: nothing, single elements, sizes around a warp and a block, more than a block of positives.
SIZES = [(0, 0), (1, 0), (0, 5), (1, 1), (3, 31), (17, 1000), (40, 4097), (300, 20000), (1000, 3000)]
# Positives and capacity: many tiles, merges and bins that do not fit shared memory.
MANY = [(20_000, 20_000), (20_000, 65_536), (65_536, 65_536)]


@dataclass(frozen=True)
class Loss:
    """call: of the logits, the inputs and options; truth: of logits, dense targets and inputs. The losses, then the gradient.

    ranks: without a positive it is 0, and its options are those of the ranking losses. dtypes: of the sweep.
    """

    call: Callable[..., object]
    num_losses: int
    truth: Callable[[Tensor, Tensor, Inputs], tuple[Tensor, ...]]
    ranks: bool = True
    forms: tuple[str, ...] = ("dense", "index")
    gradient_limit: float = 1e-6
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16", "float64")


def _alrp_truth(logits: Tensor, dense: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    loss, _, gradient = brute_force_alrp(logits, dense, inputs.regression_of_positives.to(logits.device), DELTA)
    return loss, gradient


def _ghm_classification(logits: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    """A first step with momentum and without bias: equal to none. Class indices come with weights, whose size does not matter."""
    is_index = inputs.case.form == "index"
    target = inputs.targets if is_index else (inputs.targets > 0).float()
    state = {name: torch.zeros(BINS, dtype=dtype, device=logits.device) for name, dtype in STATE.items()}
    return ghm_classification_loss(logits, target, inputs.quality, bins=BINS, momentum=0.75, **state)


def _rows(logits: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Logits and targets; flat ones as of one class."""
    return (logits, inputs.targets) if logits.dim() > 1 else (logits[:, None], inputs.targets[:, None])


def _focal(logits: Tensor, inputs: Inputs) -> Tensor:
    return sigmoid_focal_loss(*_rows(logits, inputs), reduction="sum")


def _quality_focal(logits: Tensor, inputs: Inputs) -> Tensor:
    return quality_focal_loss(*_rows(logits, inputs), inputs.quality, beta=1.5, reduction="sum")


def _equalized_focal(logits: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    """Another exponent for every class, and the sums over classes."""
    return equalized_focal_loss(logits, inputs.targets, torch.linspace(0, 1, logits.shape[-1], device=logits.device))


@functools.cache
def _groups(num_logits: int, device: str) -> ClassGroups:
    """Five groups with a column of others each: so many classes that the logits of the other losses fit."""
    counts = [(1, 20, 200, 2000)[number % 4] for number in range(num_logits - 6)]
    groups = ClassGroups.from_counts(counts).to(device)
    assert groups.num_logits == num_logits
    return groups


def _group_softmax(logits: Tensor, inputs: Inputs) -> Tensor:
    """The qualities of the rows serve as keys, many of them equal, so that a replay samples what the eager run does."""
    groups = _groups(logits.shape[1], str(logits.device))
    sample = _library.operator("group_softmax_sample", _backends.resolve("group_softmax_sample", logits.device.type))
    keys = inputs.quality.float().expand(len(groups.others), -1).contiguous()
    options = (groups.starts, groups.others, groups.background_group, False, 1.5)
    weights = sample(inputs.targets, groups.class_columns, keys, *options)
    return group_softmax_loss(logits, inputs.targets, groups, sample_weights=weights, background="last").sum()


def _reference_truth(call: Callable[[Tensor, Inputs], object]) -> Callable[[Tensor, Tensor, Inputs], tuple[Tensor, ...]]:
    """The reference on the logits in float64."""

    def truth(logits: Tensor, _: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
        leaf = logits.double().requires_grad_()
        quality = None if inputs.quality is None else inputs.quality.to(logits.device)
        with use_backend("reference"):
            outputs = call(leaf, replace(inputs, targets=inputs.targets.to(logits.device), quality=quality))
        loss = outputs if isinstance(outputs, Tensor) else outputs[0]
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient

    return truth


STATE = {"acc_sum": torch.float32, "num_updates": torch.int64}
LOSSES = {
    "rank_sort": Loss(
        lambda logits, inputs, **options: rank_sort_loss(logits, inputs.targets, inputs.quality, **options),
        2,
        lambda logits, dense, _: brute_force_rank_sort(logits, dense, DELTA),
    ),
    "average_precision": Loss(
        lambda logits, inputs, **options: average_precision_loss(logits, inputs.targets, **options),
        1,
        lambda logits, dense, _: brute_force_average_precision(logits, dense, DELTA),
        dtypes=("float32",),
    ),
    "alrp": Loss(
        lambda logits, inputs, **options: alrp_loss(logits, inputs.targets, inputs.regression, **options),
        1,
        _alrp_truth,
        dtypes=("float32",),
    ),
    "ghm_classification": Loss(
        _ghm_classification,
        1,
        lambda logits, dense, _: ghm_truth(logits, (dense > 0).double(), None, BINS),
        ranks=False,
        gradient_limit=2e-6,
    ),
    # The qualities serve as targets of boxes; so wide a mu spreads the differences over the bins.
    "ghm_regression": Loss(
        lambda logits, inputs: ghm_regression_loss(logits, inputs.targets, bins=BINS, mu=MU),
        1,
        lambda logits, dense, _: ghm_truth(logits, dense, None, BINS, MU),
        ranks=False,
        forms=("dense",),
        gradient_limit=2e-6,
    ),
    "sigmoid_focal": Loss(_focal, 1, _reference_truth(_focal), ranks=False, gradient_limit=2e-6),
    "quality_focal": Loss(
        _quality_focal, 1, _reference_truth(_quality_focal), ranks=False, gradient_limit=2e-6, dtypes=("float32",)
    ),
    "equalized_focal": Loss(
        _equalized_focal,
        1,
        _reference_truth(_equalized_focal),
        ranks=False,
        forms=("index",),
        gradient_limit=2e-6,
        dtypes=("float32", "float64"),
    ),
    "group_softmax": Loss(
        _group_softmax, 1, _reference_truth(_group_softmax), ranks=False, forms=("index",), gradient_limit=2e-6
    ),
}


def run(name: str, inputs: Inputs, capacity: int = CAPACITY) -> tuple[Tensor, ...]:
    """All that the public function returns and the gradient of the sum of its losses, through autograd."""
    options = {"delta": DELTA, "max_positives": capacity} if LOSSES[name].ranks else {}
    if inputs.case.segments > 1:
        options |= {"segments": inputs.segment_ids, "num_segments": inputs.case.segments}
    outputs = LOSSES[name].call(inputs.logits, inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    (gradient,) = torch.autograd.grad(outputs[: LOSSES[name].num_losses], inputs.logits)
    return *(output.detach() for output in outputs), gradient


@functools.cache
def true_values(name: str, case: Case, device: str) -> tuple[Tensor, ...]:
    """The losses and their gradient in float64: means over the segments that hold a positive. Computed on `device`."""
    inputs, segments, num_losses = make_inputs(case), case.segments, LOSSES[name].num_losses
    pairs = zip(inputs.logits.to(device).chunk(segments), inputs.dense.to(device).chunk(segments), strict=True)
    parts, holders = [], 0
    for logits, dense in pairs:
        if bool((dense > 0).any()) or not LOSSES[name].ranks:
            parts.append(LOSSES[name].truth(logits, dense, inputs))
            holders += 1
        else:
            parts.append((*[torch.zeros((), dtype=torch.float64, device=device)] * num_losses, torch.zeros_like(logits).double()))
    *losses, gradients = zip(*parts, strict=True)
    return *(sum(loss) / holders for loss in losses), torch.cat(gradients) / holders


def describe_error(name: str, got: tuple[Tensor, ...], inputs: Inputs, device: str) -> str | None:
    """None if `got` is within the gates of the float64 truth, computed on `device`, else the errors in words."""
    losses, gradient = got[: LOSSES[name].num_losses], got[-1].to(device)
    if inputs.logits.numel() == 0 or (LOSSES[name].ranks and not bool((inputs.dense > 0).any())):
        is_zero = all(bool((value == 0).all()) for value in (*losses, gradient))
        return None if is_zero else f"nothing to learn from, but losses {[loss.item() for loss in losses]}"
    *wanted, true_gradient = true_values(name, inputs.case, device)
    # A loss that is exactly 0 has no relative error; rounding of the truth itself is about 1e-16.
    of_losses = [abs(value.item() - true.item()) / max(abs(true.item()), 1e-9) for value, true in zip(losses, wanted, strict=True)]
    of_gradient = ((gradient.double() - true_gradient).abs().max() / true_gradient.abs().max().clamp(min=1e-12)).item()
    rounding = torch.finfo(gradient.dtype).eps if gradient.element_size() == 2 else 0.0
    if max(of_losses) <= LOSS_LIMIT and of_gradient <= LOSSES[name].gradient_limit + rounding:
        return None
    return f"relative errors of the losses {of_losses}, of the gradient {of_gradient:.2e}"


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def copied(inputs: Inputs) -> Inputs:
    """The same in tensors of their own, differentiable."""
    quality = None if inputs.quality is None else inputs.quality.clone()
    logits = inputs.logits.clone().requires_grad_()
    return replace(inputs, logits=logits, targets=inputs.targets.clone(), quality=quality, regression=inputs.regression.clone())


def check_capture(name: str, form: str, dtype: str, elements: int = 50_000, segments: int = 1) -> str:
    """Captures on one batch, replays on three others; raises `AssertionError` with the reason, else says what was done."""
    # Other numbers of positives in every batch, with the number of elements unchanged.
    batches = [
        make_inputs(Case(kind, positives, elements - positives, form, segments, dtype=dtype, device="cuda", seed=seed))
        for seed, (kind, positives) in enumerate([("trained", 300), ("init", 17), ("separated", 500), ("trained", 1)])
    ]
    static = copied(batches[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(name, static)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with no_synchronisation():
        run(name, static)
        with torch.cuda.graph(graph):
            outputs = run(name, static)

    for inputs in [*batches[1:], batches[0]]:
        with torch.no_grad():
            static.logits.copy_(inputs.logits)
        static.targets.copy_(inputs.targets)
        if form == "index":
            static.quality.copy_(inputs.quality)
            static.regression.copy_(inputs.regression)
        graph.replay()
        torch.cuda.synchronize()
        replayed = tuple(output.clone() for output in outputs)
        fresh = copied(inputs)
        with no_synchronisation():
            eager = run(name, fresh)
        for number, (one, other) in enumerate(zip(replayed, eager, strict=True)):
            assert torch.equal(one, other), f"{inputs.case.title}: output {number} of the replay differs from the eager run"
        error = describe_error(name, replayed, inputs, "cuda")
        assert error is None, f"{inputs.case.title}: {error}"
    return f"captured once, replayed on {len(batches)} batches, equal to eager bit by bit"


def check_small(name: str, device: str) -> str:
    """Small problems in every form against the truth; of losses that share their streams one is tried in every dtype."""
    count = 0
    for form in LOSSES[name].forms:
        for dtype in LOSSES[name].dtypes:
            for positives, negatives in SIZES:
                if form == "index":
                    negatives = max(negatives, 80 * positives)
                inputs = copied(make_inputs(Case("trained", positives, negatives, form, dtype=dtype, device=device, seed=positives)))
                # On the CPU: under compute-sanitizer the many small kernels of the brute force would take minutes.
                error = describe_error(name, run(name, inputs), inputs, "cpu")
                assert error is None, f"{inputs.case.title}: {error}"
                count += 1
    return f"{count} small problems"


def check_many(name: str, positives: int, capacity: int, device: str) -> str:
    """Very many positives against the truth."""
    inputs = copied(make_inputs(Case("separated", positives, 4 * positives, device=device)))
    error = describe_error(name, run(name, inputs, capacity), inputs, device)
    assert error is None, f"{inputs.case.title}: {error}"
    return inputs.case.title


def all_checks(arguments: argparse.Namespace) -> list[tuple[str, Callable[[], str]]]:
    """What is to be run on every backend, by name."""
    if arguments.sweep:
        return [(f"{name} sweep", lambda name=name: check_small(name, arguments.device)) for name in LOSSES]
    if arguments.many:
        return [
            (f"{name} capacity={sizes[1]}", lambda name=name, sizes=sizes: check_many(name, *sizes, arguments.device))
            for name, loss in LOSSES.items()
            if loss.ranks
            for sizes in MANY
        ]
    settings = [
        ("rank_sort", "dense", "float32"),
        ("rank_sort", "index", "float32"),
        ("rank_sort", "dense", "bfloat16"),
        ("rank_sort", "index", "float64"),
        ("average_precision", "dense", "float32"),
        # Regression losses by row: their shape does not depend on the number of positives.
        ("alrp", "index", "float32"),
        ("rank_sort", "index", "float32", 64_000, 16),
        ("average_precision", "dense", "float32", 64_000, 16),
        ("ghm_classification", "dense", "float32"),
        ("ghm_regression", "dense", "float32"),
        ("ghm_regression", "dense", "float64"),
        ("sigmoid_focal", "index", "float32"),
        ("sigmoid_focal", "dense", "float64"),
        ("quality_focal", "index", "float32"),
        ("quality_focal", "dense", "float32"),
        ("equalized_focal", "index", "float32"),
        ("group_softmax", "index", "float32"),
        ("group_softmax", "index", "float64"),
    ]
    # 16-bit logits of this many elements are counted and looked up by value.
    with_labels = [name for name, loss in LOSSES.items() if "index" in loss.forms]
    settings += [(name, "index", dtype, 1 << 21) for name in with_labels for dtype in ("bfloat16", "float16")]
    return [(" ".join(map(str, setting)), lambda setting=setting: check_capture(*setting)) for setting in settings]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="cuda,triton", help="comma list")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--sweep", action="store_true", help="small eager problems instead of captures")
    chosen.add_argument("--many", action="store_true", help="very many positives instead of captures")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; --sweep --device cpu runs without")
    if arguments.device == "cpu" and not (arguments.sweep or arguments.many):
        parser.error("a capture needs a CUDA device")
    failed = 0
    for backend in arguments.backends.split(","):
        for name, check in all_checks(arguments):
            try:
                with use_backend(backend):
                    print(f"pass  {backend} {name}: {check()}", flush=True)
            except Exception as error:  # whatever goes wrong with one check, the others still run
                failed += 1
                print(f"FAIL  {backend} {name}: {type(error).__name__}: {error}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
