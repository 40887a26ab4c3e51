"""`python -m rsloss_kernels.selfcheck` runs every operator on every usable backend and dtype against the float64 reference.

Small random cases, a few seconds in all, one line per check; the exit code is 0 if all hold. `--backends cpp,cuda` fails
where one of these cannot run at all. The bounds are those of the test suite.
"""
import argparse
import copy
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rsloss_kernels
from rsloss_kernels import _backends, _checks, _library, collect_env
from rsloss_kernels.losses.ranking import api as ranking
from rsloss_kernels.losses.ranking.arguments import read_arguments


class Case(NamedTuple):
    """One call of a loss: `run(logits)` returns its 0-d losses, of which each has a gradient of its own."""

    name: str
    operator: str
    logits: Tensor  # float64, on the CPU
    run: Callable[[Tensor], tuple[Tensor, ...]]


class Outcome(NamedTuple):
    losses: list[float]
    gradient: Tensor  # float64, on the CPU


def cases(seed: int) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(loss: Callable[..., Any], operator: str, name: str, logits: Tensor, *tensors: Tensor, **options: Any) -> Case:
        def run(x: Tensor) -> tuple[Tensor, ...]:
            moved = {key: value.to(x.device) if isinstance(value, Tensor) else value for key, value in options.items()}
            losses = loss(x, *[tensor.to(x.device) for tensor in tensors], **moved)
            if isinstance(losses, rsloss_kernels.ALRPLosses):
                # The ranks count too: the second loss is made from them, and adds nothing to the gradient of the logits.
                regression_loss = rsloss_kernels.alrp_regression_loss(tensors[1].to(x.device).double(), losses.rank, losses.order)
                return losses.classification, regression_loss
            if isinstance(losses, rsloss_kernels.GHMCorrectedLoss):
                # So does the state.
                return losses.loss, losses.acc_sum.sum(), losses.num_updates.sum().double()
            if isinstance(losses, rsloss_kernels.EqualizedLoss):
                return losses.loss, losses.pos_grad.sum(), losses.neg_grad.sum()
            return losses if isinstance(losses, tuple) else (losses,)

        return Case(f"{loss.__name__}, {name}", operator, logits, run)

    def step_by_step(loss: str, *options: float) -> Callable[..., Any]:
        """The loss as it is with a process group, which communicates between the steps."""

        def evaluate(x: Tensor, targets: Tensor, quality: Tensor | None = None) -> tuple[Tensor, ...]:
            settings: dict[str, Any] = {"delta": 0.5, "background": "last", "max_positives": None}
            settings |= {"process_group": None, "average_gradients": True}
            request = read_arguments(loss, f"{loss}_finalize", x, targets, quality, **settings)
            outputs = ranking.finish(loss, ranking.rank_positives(request), *options)
            return tuple(value for value in outputs if value.dim() == 0)

        evaluate.__name__ = f"{loss}_finalize"
        return evaluate

    def ghm_finalize(x: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """The loss as it is with a process group, which adds up the histograms of its processes."""
        backend = _backends.resolve("ghm_finalize", x.device.type)
        elements, options = ([targets], [weight]), (10, None, False)
        histogram = _library.operator("ghm_histogram", backend)([x.detach()], *elements, *options)
        arguments = *elements, histogram, None, None, *options, 0.0, False, 1.0
        return _library.differentiable("ghm_finalize", backend, [x], *arguments)[0]

    def group_softmax(name: str, groups: rsloss_kernels.ClassGroups, logits: Tensor, labels: Tensor, keys: Tensor) -> Case:
        """The losses with a sample of the others, and the scores."""

        def run(x: Tensor) -> tuple[Tensor, ...]:
            own, targets = copy.deepcopy(groups).to(x.device), labels.to(x.device)
            sample = _library.operator("group_softmax_sample", _backends.resolve("group_softmax_sample", x.device.type))
            layout = own.starts, own.others, own.background_group
            weights = sample(targets, own.class_columns, keys.to(x.device), *layout, False, 1.5)
            losses = rsloss_kernels.group_softmax_loss(x, targets, own, sample_weights=weights, background="last")
            scores = rsloss_kernels.group_softmax_scores(x.double(), own, background="last")
            return *losses.unbind(), scores.square().sum()

        return Case(f"group_softmax_loss, {name}", "group_softmax_forward", logits, run)

    def elements(x: Tensor, targets: Tensor) -> Tensor:
        """Summed in float64: their own dtype would round the sum."""
        return rsloss_kernels.sigmoid_focal_loss(x, targets).double().sum()

    def smooth_l1_elements(x: Tensor, targets: Tensor) -> Tensor:
        return rsloss_kernels.smooth_l1_loss(x, targets, 0.0, reduction="none").double().sum()

    rank_sort = functools.partial(case, rsloss_kernels.rank_sort_loss, "rank_sort_forward")
    average_precision = functools.partial(case, rsloss_kernels.average_precision_loss, "average_precision_forward")
    alrp = functools.partial(case, rsloss_kernels.alrp_loss, "alrp_finalize")
    ghm_classification = functools.partial(case, rsloss_kernels.ghm_classification_loss, "ghm_forward")
    ghm_regression = functools.partial(case, rsloss_kernels.ghm_regression_loss, "ghm_forward")
    focal = functools.partial(case, rsloss_kernels.sigmoid_focal_loss, "focal_forward")
    quality_focal = functools.partial(case, rsloss_kernels.quality_focal_loss, "focal_forward")
    varifocal = functools.partial(case, rsloss_kernels.varifocal_loss, "focal_forward")
    equalized_focal = functools.partial(case, rsloss_kernels.equalized_focal_loss, "focal_forward")
    eqlv2 = functools.partial(case, rsloss_kernels.eqlv2_loss, "focal_forward")

    anchors, classes = 96, 5
    logits = torch.randn(anchors, classes, generator=generator, dtype=torch.float64)
    is_positive = torch.rand(anchors, classes, generator=generator) < 0.1
    dense = torch.where(is_positive, torch.rand(anchors, classes, generator=generator) * 0.9 + 0.1, 0.0)
    dense[:8] = -1
    labels = torch.randint(-1, 2 * classes, (anchors,), generator=generator).clamp(max=classes)
    quality = torch.rand(anchors, generator=generator)
    ids = torch.randint(-1, 7, (anchors,), generator=generator)
    yield rank_sort("dense targets", logits, dense)
    yield rank_sort("dense targets, delta 0", logits, dense, delta=0.0)
    yield rank_sort("class indices", logits * 3, labels, quality)
    yield rank_sort("no positives", logits, torch.zeros_like(dense))
    yield rank_sort("segment ids", logits, labels, quality, segments=ids, num_segments=7)
    yield rank_sort("segments in equal chunks", logits, dense, segments=6)
    of_maps = [value.view(4, anchors // 4) for value in (labels, quality)]
    yield rank_sort("maps of a head", logits.view(4, 2 * classes, -1), *of_maps, layout="anchor_major", num_classes=classes)
    yield average_precision("interpolated", logits, dense)
    yield average_precision("not interpolated", logits, labels, interpolated=False)
    yield average_precision("segments by class", logits, dense, segments="class")
    for loss, *options in (("rank_sort", False), ("average_precision", True), ("alrp",)):
        yield case(step_by_step(loss, *options), f"{loss}_finalize", "step by step", logits, dense)
    yield alrp("a value per positive", logits, dense, torch.rand(int((dense > 0).sum()), generator=generator))
    yield alrp("a value per row", logits * 3, labels, quality, delta=0.0)
    state = {"acc_sum": torch.rand(30, generator=generator) * 9, "num_updates": torch.arange(30)}
    yield ghm_classification("soft targets, weights", logits, dense.clamp(min=0), dense.clamp(max=0) + 1)
    yield ghm_classification("class indices, momentum", logits * 3, labels, quality - 0.3, bins=30, momentum=0.75, **state)
    yield ghm_regression("weights", logits * 0.05, torch.zeros_like(dense), dense.clamp(max=0) + 1, bins=256)
    yield ghm_regression("momentum", logits, dense, mu=0.5, bins=30, momentum=0.9, empty_bins="count", **state)
    yield case(ghm_finalize, "ghm_finalize", "step by step", logits, dense.clamp(min=0), dense.clamp(max=0) + 1)
    exponents, ratio = torch.rand(classes, generator=generator) * 4, torch.rand(classes, generator=generator)
    yield focal("dense targets", logits * 3, dense, weight=torch.rand(anchors, generator=generator), reduction="mean")
    yield focal("class indices, exponents of classes", logits * 3, labels, gamma=exponents, reduction="sum")
    yield case(elements, "focal_elements", "dense targets", logits, dense)
    yield quality_focal("class indices", logits * 3, labels, quality, reduction="sum", avg_factor=torch.tensor(3.0))
    yield varifocal("dense targets", logits * 3, dense, gamma=1.5, reduction="sum")
    yield equalized_focal("class indices", logits * 3, labels, ratio, avg_factor=7.0)
    yield eqlv2("class indices", logits * 3, labels.clamp(min=0, max=classes - 1), ratio[1:] + 0.3)
    for form in ("softmax", "sigmoid"):
        groups = rsloss_kernels.ClassGroups([[0, 3], [], [1, 2, 4]], background_form=form)
        wide = torch.randn(anchors, groups.num_logits, generator=generator, dtype=torch.float64) * 3
        yield group_softmax(f"background {form}", groups, wide, labels, torch.rand(4, anchors, generator=generator))
    counts = torch.rand(classes - 1, generator=generator) * 1000
    # float32 has other normal numbers on every kind of processor.
    offsets = torch.randn(anchors, classes, generator=generator, dtype=torch.float64).float()
    beta = torch.tensor(0.7, dtype=torch.float64)
    yield case(rsloss_kernels.smooth_l1_loss, "smooth_l1_forward", "weights of rows", logits, offsets, beta, quality)
    yield case(smooth_l1_elements, "smooth_l1_elements", "beta 0", logits, offsets)
    yield case(rsloss_kernels.seesaw_loss, "seesaw_forward", "weights", logits * 3, labels.clamp(max=classes - 2), counts, quality)


def evaluate(case: Case, backend: str, device: str, dtype: torch.dtype) -> Outcome:
    leaf = case.logits.to(device, dtype).requires_grad_()
    with rsloss_kernels.use_backend(backend):
        losses = case.run(leaf)
    (gradient,) = torch.autograd.grad(sum(losses[1:], losses[0]), leaf)
    return Outcome([float(loss.detach()) for loss in losses], gradient.double().cpu())


def errors(got: Outcome, truth: Outcome) -> tuple[float, float]:
    """Largest error of a loss, relative to its value, and of a gradient entry, relative to the largest; inf if not finite."""
    finite = all(map(_is_finite, got.losses)) and bool(got.gradient.isfinite().all())
    if not finite:
        return float("inf"), float("inf")
    loss = max(abs(a - b) / max(abs(b), 1e-300) if a != b else 0.0 for a, b in zip(got.losses, truth.losses, strict=True))
    largest = float(truth.gradient.abs().max())
    difference = float((got.gradient - truth.gradient).abs().max())
    return loss, difference / largest if largest else (0.0 if difference == 0 else float("inf"))


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def bounds(case: Case, backend: str, dtype: torch.dtype) -> tuple[float, float]:
    """Of the loss and of the gradient, which is also rounded to a 16-bit dtype, as losses of single elements are."""
    if dtype == torch.float64:
        bound = 1e-9 if backend in ("cuda", "triton") else 1e-10
        return bound, bound
    rounding = torch.finfo(dtype).eps / 2 if dtype in (torch.float16, torch.bfloat16) else 0.0
    is_ranking = not case.operator.startswith(("focal", "ghm", "group_softmax", "seesaw", "smooth_l1"))
    return 1e-7 + (rounding if case.operator.endswith("_elements") else 0.0), (1e-6 if is_ranking else 2e-6) + rounding


def check_all(seed: int, required: list[str]) -> Iterator[tuple[bool, str]]:
    """Yields (holds, line), one per check."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    everything = list(cases(seed))
    for name in required:
        reasons = [_backends.why_not(case.operator, name, device) for case in everything for device in devices]
        if all(reasons):
            yield False, f"backend {name} is required but cannot run: {reasons[0]}"
    yield _covers_every_operator(everything)
    for case, device, dtype in itertools.product(everything, devices, _checks.LOGIT_TYPES):
        truth = evaluate(case._replace(logits=case.logits.to(dtype).double()), "reference", "cpu", torch.float64)
        for backend in _backends.usable(case.operator, device):
            yield _check(case, backend, device, dtype, truth)


def _check(case: Case, backend: str, device: str, dtype: torch.dtype, truth: Outcome) -> tuple[bool, str]:
    label = f"{case.name:<50} {backend:<9} {device:<4} {str(dtype).removeprefix('torch.'):<8}"
    try:
        loss, gradient = errors(evaluate(case, backend, device, dtype), truth)
    except Exception as error:
        return False, f"{label} {type(error).__name__}: {error}"
    loss_bound, gradient_bound = bounds(case, backend, dtype)
    line = f"{label} loss {loss:.1e} of {loss_bound:.0e}, gradient {gradient:.1e} of {gradient_bound:.0e}"
    return loss <= loss_bound and gradient <= gradient_bound, line


def _covers_every_operator(everything: list[Case]) -> tuple[bool, str]:
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(str(function).removeprefix(f"{_library.NAMESPACE}."))
            return function(*args, **(kwargs or {}))

    called: set[str] = set()
    with Recorder():
        for case in everything:
            evaluate(case, "reference", "cpu", torch.float64)
    # What only another backend implements runs where that one is checked.
    names = {f"{name}.reference" for name in _library.defined if "reference" in _library.implemented_by(name)}
    missing = names - called
    words = f"not run by any: {', '.join(sorted(missing))}" if missing else f"run all {len(names)} operators"
    return not missing, f"the {len(everything)} cases {words}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rsloss_kernels.selfcheck", description=__doc__.splitlines()[0])
    parser.add_argument("--backends", default="", help="comma list of backends that must be able to run")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    required = [name for name in arguments.backends.split(",") if name]
    unknown = set(required) - set(_library.BACKENDS)
    if unknown:
        parser.error(f"--backends: wanted some of {', '.join(_library.BACKENDS)}, got {', '.join(sorted(unknown))}")
    print(f"     {collect_env.package()}")
    results = []
    for holds, line in check_all(arguments.seed, required):
        print(f"{'ok  ' if holds else 'FAIL'} {line}", flush=True)
        results.append(holds)
    print(f"{sum(results)} of {len(results)} checks hold")
    return 0 if all(results) else 1


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has seen enough (`| head`). Python flushes once more when it exits, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
