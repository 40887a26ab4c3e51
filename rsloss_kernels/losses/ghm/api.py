"""GHM-C and GHM-R: the public functions."""
from collections.abc import Sequence
from typing import NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from rsloss_kernels import _checks, _library, distributed
from rsloss_kernels.losses.ghm import op_checks
from rsloss_kernels.losses.ghm.arguments import Request, read_arguments, read_state
from rsloss_kernels.losses.levels import Levelled

# Of a row that every process of a group sends: the tables of the most bins there can be.
_WIDEST_HISTOGRAM = 2 * (op_checks.MAX_BINS + 1)


class GHMLoss(NamedTuple):
    """The 0-d loss and the new state of the momentum."""

    loss: Tensor
    acc_sum: Tensor


class GHMCorrectedLoss(NamedTuple):
    """The 0-d loss and the new state of the momentum with bias correction."""

    loss: Tensor
    acc_sum: Tensor
    num_updates: Tensor


class GradientDensity(NamedTuple):
    """How a batch's gradient norms are distributed, and what GHM makes of it; detached."""

    edges: Tensor  # float64 [bins + 1], of the gradient norm, within [0, 1]
    counts: Tensor  # int64 [bins], valid elements
    weights: Tensor  # float64 [bins], the factor of the loss of an element


class Keywords(TypedDict, total=False):
    """Those that both losses share but their state, for the types of what they return."""

    bins: int
    momentum: float
    empty_bins: str
    process_group: object | None
    average_gradients: bool


class ClassificationKeywords(Keywords, total=False):
    background: str
    layout: str
    num_classes: int | None


class RegressionKeywords(Keywords, total=False):
    mu: float


@overload
def ghm_classification_loss(
    logits: Levelled, target: Levelled, weight: Levelled | None = None, *, acc_sum: None = None, num_updates: None = None,
    **keywords: Unpack[ClassificationKeywords],
) -> Tensor: ...


@overload
def ghm_classification_loss(
    logits: Levelled, target: Levelled, weight: Levelled | None = None, *, acc_sum: Tensor, num_updates: None = None,
    **keywords: Unpack[ClassificationKeywords],
) -> GHMLoss: ...


@overload
def ghm_classification_loss(
    logits: Levelled, target: Levelled, weight: Levelled | None = None, *, acc_sum: Tensor, num_updates: Tensor,
    **keywords: Unpack[ClassificationKeywords],
) -> GHMCorrectedLoss: ...


@overload
def ghm_classification_loss(
    logits: Levelled, target: Levelled, weight: Levelled | None = None, *, acc_sum: Tensor | None = None, num_updates: Tensor | None = None,
    **keywords: Unpack[ClassificationKeywords],
) -> Tensor | GHMLoss | GHMCorrectedLoss: ...


def ghm_classification_loss(
    logits: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor] | None = None,
    *,
    bins: int = 10,
    momentum: float = 0.0,
    acc_sum: Tensor | None = None,
    num_updates: Tensor | None = None,
    empty_bins: str = "skip",
    background: str = "last",
    process_group: object | None = None,
    average_gradients: bool = True,
    layout: str = "rows",
    num_classes: int | None = None,
) -> Tensor | GHMLoss | GHMCorrectedLoss:
    """GHM-C: cross entropy in which every element counts by the inverse density of its gradient norm.

    Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019, eq. 4-10. Elements of one bin of the gradient norm
    `|sigmoid(z) - t|` share one weight, a constant for the gradient: `1 / (elements of the bin * bins that are not empty)`.

    Args:
        logits: any shape, class logits; float16, bfloat16, float32 or float64. For class indices the last dimension is the C classes.
            Or levels of a head, see `layout`.
        target: dense, with the shape of `logits`, any real dtype (integral one-hot too, for which a float32 copy is made), values within
            [0, 1]; or class indices, an integral dtype with the shape of `logits` less its last dimension. No label is ignored: one that
            is no foreground class, negative ones included, is a row of zeros, as in MMDetection; give what is to be ignored the weight 0.
        weight: floating, integral or bool (both as a float16 copy), with the shape of `logits` or that less its last dimension; of weights
            that `expand` has repeated over the classes one per row is read. Elements whose weight is above 0 count, all alike; others
            may hold anything.
        bins: of the gradient norm, 1..256.
        momentum: of the elements in each bin, within [0, 1); above 0 it needs `acc_sum`.
        acc_sum: float32 or float64 [bins], the running number of elements in each bin before this call, at first zeros.
        num_updates: int64 [bins], how often each bin's `acc_sum` has changed, at first zeros: turns on bias correction. Without it
            the first steps weigh too much, the very first by 1 / (1 - momentum), as published.
        empty_bins: "skip": as the authors' code, empty bins do not count and keep their `acc_sum`. "count": as the paper, all bins
            count and decay.
        background: "last" (classes 0..C-1, background C) or "first" (background 0, classes 1..C).
        process_group: None: no communication. A torch.distributed group, or "default" (all processes if torch.distributed is
            initialised, else no communication): the density, state and loss are those of all processes' elements together, the
            gradient that of the own elements. One all-gather of a fixed size. Every process must call, with elements or without, with
            the same options, else all raise (in graphs and on a GPU, where nothing is read on the host: NaN, state unchanged).
        average_gradients: with a process group, multiply gradients by the group's size, for DistributedDataParallel, which averages
            gradients; False for a reducer that sums them.
        layout, num_classes: for a head's output as it is, as in `sigmoid_focal_loss`: a list of levels [..., C] or of maps, with `target`
            and `weight` in the shapes of its `targets` and `weight`.

    Returns:
        The 0-d loss, float64 for float64 logits, else float32. With `acc_sum` the named tuple `(loss, acc_sum)`, with `num_updates`
        too `(loss, acc_sum, num_updates)`: new tensors, the arguments stay as they are. Without a valid element an exact zero,
        connected to the graph. Without a valid element, or where the loss is not finite, the returned state equals the given one.

    NaN and infinity: an infinite logit takes its limit. NaN in a valid element, or an infinite target, makes the loss and that
    element's gradient NaN; other gradients are as if it were not valid. `target` and `weight` are detached. Do not edit `logits`,
    `target` or `weight` in place before backward.

    Raises:
        TypeError, ValueError: wrong types, shapes, devices or ranges, processes that differ in their options; with
        RSLOSS_DEBUG_CHECKS=1 also labels above C and targets outside [0, 1].
        RuntimeError: a forced backend that cannot run.
    """
    average_gradients = _checks.read_flag("ghm_classification_loss", "average_gradients", average_gradients)
    request = read_arguments(
        *("ghm_classification_loss", "logits", logits, target, weight, bins, None, momentum, empty_bins, background, process_group),
        *(layout, num_classes),
    )
    return _with_state(evaluate(request, *read_state(request, acc_sum, num_updates), average_gradients), acc_sum, num_updates)


@overload
def ghm_regression_loss(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, *, acc_sum: None = None, num_updates: None = None,
    **keywords: Unpack[RegressionKeywords],
) -> Tensor: ...


@overload
def ghm_regression_loss(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, *, acc_sum: Tensor, num_updates: None = None,
    **keywords: Unpack[RegressionKeywords],
) -> GHMLoss: ...


@overload
def ghm_regression_loss(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, *, acc_sum: Tensor, num_updates: Tensor,
    **keywords: Unpack[RegressionKeywords],
) -> GHMCorrectedLoss: ...


@overload
def ghm_regression_loss(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, *, acc_sum: Tensor | None = None, num_updates: Tensor | None = None,
    **keywords: Unpack[RegressionKeywords],
) -> Tensor | GHMLoss | GHMCorrectedLoss: ...


def ghm_regression_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    mu: float = 0.02,
    bins: int = 10,
    momentum: float = 0.0,
    acc_sum: Tensor | None = None,
    num_updates: Tensor | None = None,
    empty_bins: str = "skip",
    process_group: object | None = None,
    average_gradients: bool = True,
) -> Tensor | GHMLoss | GHMCorrectedLoss:
    """GHM-R: the authentic smooth L1 loss in which every element counts by the inverse density of its gradient norm.

    Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019, eq. 11-13: `sqrt(d^2 + mu^2) - mu` with `d = pred - target`;
    the gradient norm is `|d| / sqrt(d^2 + mu^2)`.

    Args:
        pred: any shape, box offsets; float16, bfloat16, float32 or float64.
        target: the shape of `pred`, any real dtype (of an integral one a float64 copy is made).
        weight: floating, integral or bool (both as a float16 copy), the shape of `pred`. Elements whose weight is above 0 count, all
            alike.
        mu: where the loss turns from square to linear, in the units of `pred`, within [1e-30, 1e30].
        bins, momentum, acc_sum, num_updates, empty_bins, process_group, average_gradients: as in `ghm_classification_loss`.

    Returns, NaN and infinity, Raises: as `ghm_classification_loss`, of `pred` and `pred - target`, which may be infinite.
    """
    average_gradients = _checks.read_flag("ghm_regression_loss", "average_gradients", average_gradients)
    op_checks.check_mu("ghm_regression_loss", mu)  # None would ask for GHM-C
    request = read_arguments(
        "ghm_regression_loss", "pred", pred, target, weight, bins, mu, momentum, empty_bins, "last", process_group
    )
    return _with_state(evaluate(request, *read_state(request, acc_sum, num_updates), average_gradients), acc_sum, num_updates)


def gradient_density(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    bins: int = 10,
    mu: float | None = None,
    empty_bins: str = "skip",
    background: str = "last",
    process_group: object | None = None,
) -> GradientDensity:
    """The distribution of the gradient norm over a batch, as GHM sees it (AAAI 2019, fig. 2-4), and the weight of each bin.

    Args:
        pred: any shape; logits for GHM-C, box offsets for GHM-R; float16, bfloat16, float32 or float64.
        target: with the shape of `pred`, any real dtype (of an integral one a copy is made: float32 for GHM-C, float64 for GHM-R); for
            GHM-C within [0, 1], or class indices with that shape less the last dimension.
        weight: floating, integral or bool (both as a float16 copy), with the shape of `pred`, for GHM-C or that less its last dimension.
            Elements whose weight is above 0 count; None: all.
        bins: 1..256.
        mu: None: of GHM-C. A number, as in `ghm_regression_loss`: of GHM-R.
        empty_bins: "skip": the weights share among the bins that are not empty; "count": among all.
        background: of class indices: "last" (classes 0..C-1, background C) or "first" (background 0, classes 1..C).
        process_group: None: of this process; a group or "default" (all processes): of all their elements, every process must call.

    Returns:
        `(edges, counts, weights)`: `counts[b]` valid elements have a gradient norm within [edges[b], edges[b + 1]), the last bin holding
        1 too. `weights[b]` is the factor by which GHM without momentum scales the loss of each of them against the mean over all valid
        elements; 0 for an empty bin. NaN is in no bin. Detached, on the device of `pred`; with a process group over all processes.

    Raises: as the losses.
    """
    for name, value in (("pred", pred), ("target", target)):
        _checks.check_tensor("gradient_density", name, value)
    request = read_arguments(
        "gradient_density", "pred", pred, target, weight, bins, mu, 0.0, empty_bins, background, process_group, operator="ghm_histogram"
    )
    _library.refuse_transformed("gradient_density", *request.preds, *request.targets, *request.weights)
    histogram, is_agreed = read_histogram(request, True, False)
    _, _, _, weights = finalize(request, histogram, None, None)
    counts = histogram[0, :bins]
    if is_agreed is not None:
        weights = torch.where(is_agreed, weights, torch.nan)
    edges = torch.arange(bins + 1, dtype=torch.float64, device=pred.device) / bins
    return GradientDensity(edges, counts.long(), weights * counts.sum())


def read_histogram(request: Request, average_gradients: bool, is_corrected: bool) -> tuple[Tensor, Tensor | None]:
    """Of the whole group; and, where nothing may be read on the host, whether its processes fit together (0-d, bool)."""
    histogram = _library.operator("ghm_histogram", request.backend)(
        *request.elements, request.bins, request.mu, request.is_background_first
    )
    if request.group is None:
        return histogram, None
    settings = {
        "mu": 0.0 if request.mu is None else request.mu,
        "bins": request.bins,
        "momentum": request.momentum,
        "empty_bins": request.count_empty_bins,
        "bias correction": is_corrected,
        "average_gradients": average_gradients,
    }
    return distributed.sum_histograms(request.function, histogram, _WIDEST_HISTOGRAM, request.group, settings)


def finalize(
    request: Request, histogram: Tensor, acc_sum: Tensor | None, num_updates: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, new state and the weights of the bins, without a gradient."""
    options = (request.bins, request.mu, request.is_background_first, request.momentum, request.count_empty_bins, 1.0)
    return _library.operator("ghm_finalize", request.backend)(*request.elements, histogram, acc_sum, num_updates, *options)


def evaluate(
    request: Request, acc_sum: Tensor | None, num_updates: Tensor | None, average_gradients: bool
) -> tuple[Tensor, ...]:
    """The loss, with its gradient, and the new state."""
    elements = request.preds, request.targets, request.weights
    options = request.bins, request.mu, request.is_background_first, request.momentum, request.count_empty_bins
    if request.group is None:
        return _library.differentiable("ghm_forward", request.backend, *elements, acc_sum, num_updates, *options)
    histogram, is_agreed = read_histogram(request, average_gradients, num_updates is not None)
    scale = float(distributed.world_size(request.group)) if average_gradients else 1.0
    loss, *new_state = _library.differentiable(
        "ghm_finalize", request.backend, *elements, histogram, acc_sum, num_updates, *options, scale
    )
    if is_agreed is not None:
        loss = loss * torch.where(is_agreed, 1.0, torch.nan).to(loss.dtype)
    return loss, *new_state


def _with_state(
    results: tuple[Tensor, ...], acc_sum: Tensor | None, num_updates: Tensor | None
) -> Tensor | GHMLoss | GHMCorrectedLoss:
    """What the caller asked for by giving a state."""
    loss, new_acc_sum, new_num_updates = results
    if acc_sum is None:
        return loss
    return GHMLoss(loss, new_acc_sum) if num_updates is None else GHMCorrectedLoss(loss, new_acc_sum, new_num_updates)
