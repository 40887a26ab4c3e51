"""Equalized focal loss, its quality form and equalization loss v2: the public functions.

All three are element-wise sigmoid losses (losses/focal) whose class table follows from the state; README.md has the formulas.
"""
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsloss_kernels import _checks
from rsloss_kernels.losses.focal import api as focal
from rsloss_kernels.losses.focal import arguments
from rsloss_kernels.losses.focal.op import Modulator
from rsloss_kernels.losses.levels import read_levels


class EqualizedLoss(NamedTuple):
    """The 0-d loss, and per class how strongly its positives and its negatives pulled; these are detached."""

    loss: Tensor
    pos_grad: Tensor  # float64 [C]
    neg_grad: Tensor  # float64 [C]


def equalized_focal_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    pos_neg: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float = 0.25,
    scale_factor: float = 8.0,
    weighting_factor: bool = True,
    weight: Tensor | Sequence[Tensor] | None = None,
    avg_factor: float | Tensor | None = None,
    background: str = "last",
    ignore_index: int | None = None,
    layout: str = "rows",
) -> EqualizedLoss:
    """Equalized focal loss: focal loss whose focus grows, class by class, where negatives outweigh positives.

    Li et al., "Equalized Focal Loss for Dense Long-Tailed Object Detection", CVPR 2022, eq. 4-7: with `r` a class's `pos_neg`, the
    exponent is `gamma + scale_factor (1 - r)` and the loss is weighted by that over `gamma`. With `r = 1` it is the focal loss, bit
    by bit.

    Args:
        logits: one tensor, or a list of levels with one dtype (float16, bfloat16, float32 or float64): [..., C] in the layout "rows",
            else maps [B, A * C, *spatial] of A anchors as from a head. C counts foreground classes alone.
        labels: class indices, an integral dtype: per level the shape of the logits less C, or for maps [B, S * A], [B, *spatial, A] (one
            anchor: [B, *spatial]) in the order (h, w, anchor). A negative label drops its row. A list with one per level, or one
            tensor [B, K] in which the levels follow one another.
        pos_neg: [C], the ratio of the gradients of positives and negatives so far, within [0, 1] (others are taken to the nearest); C
            of the logits follows from it.
        gamma: the focus of balanced classes, at least 0, above 0 with the weighting factor.
        alpha: weight of positives, 1 - alpha that of negatives; below 0: both weigh 1.
        scale_factor: how much the focus grows at most, at least 0.
        weighting_factor: False leaves the weight out, the ablation of the paper.
        weight: floating, integral or bool; per row, with the shape of labels, or per element [..., C]. Where it is 0 anything may stand.
        avg_factor: a number or a Tensor of one number that divides; None: 1. 0 divides as in floating point.
        background: "last" (classes 0..C-1, background C) or "first" (background 0, classes 1..C).
        ignore_index: one more label that drops its row.
        layout: "rows", or of maps "anchor_major" (channel = anchor * C + class) or "class_major" (class * A + anchor).

    Returns:
        `(loss, pos_grad, neg_grad)`: the loss is 0-d, float64 for float64 logits, else float32, an exact zero connected to the graph
        where nothing counts. The sums over the elements of each class of the size of the loss's gradient, apart over positives and
        negatives, are of the returned loss: all that scales it is in them, what its gradient is multiplied with later is not.

    Everything but `logits` is detached. NaN in an element that counts makes the loss, its class's sum and its gradient NaN.

    Raises:
        TypeError, ValueError: wrong types, shapes, devices, ranges; with RSLOSS_DEBUG_CHECKS=1 also labels above C.
        RuntimeError: a forced backend that cannot run.
    """
    function = "equalized_focal_loss"
    request = read_equalized_focal(
        function, logits, labels, None, pos_neg, gamma, alpha, scale_factor, weighting_factor, Modulator.FOCAL, weight, "sum",
        avg_factor, background, ignore_index, layout,
    )  # fmt: skip
    return _named(*loss_and_sums(request))


def equalized_quality_focal_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    quality: Tensor | Sequence[Tensor],
    pos_neg: Tensor,
    *,
    gamma: float = 2.0,
    scale_factor: float = 8.0,
    weighting_factor: bool = True,
    weight: Tensor | Sequence[Tensor] | None = None,
    avg_factor: float | Tensor | None = None,
    background: str = "last",
    ignore_index: int | None = None,
    layout: str = "rows",
) -> EqualizedLoss:
    """Equalized quality focal loss: as `equalized_focal_loss`, of the quality focal loss.

    Args:
        quality: floating, within [0, 1], with the shape of `labels`: the target of the labelled class, which is a positive whatever it is.

    Everything else as in `equalized_focal_loss`; there is no alpha.
    """
    function = "equalized_quality_focal_loss"
    if quality is None:
        raise TypeError(f"{function}: quality must be a Tensor or a list of them, got None")
    request = read_equalized_focal(
        function, logits, labels, quality, pos_neg, gamma, -1.0, scale_factor, weighting_factor, Modulator.QUALITY, weight, "sum",
        avg_factor, background, ignore_index, layout,
    )  # fmt: skip
    return _named(*loss_and_sums(request))


def eqlv2_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    pos_neg: Tensor,
    *,
    gamma: float = 12.0,
    mu: float = 0.8,
    alpha: float = 4.0,
    focal_gamma: float = 0.0,
) -> EqualizedLoss:
    """Equalization loss v2: cross entropy whose positives weigh more and negatives less in classes that negatives outweigh.

    Tan et al., "Equalization Loss v2: A New Gradient Balance Approach for Long-tailed Object Detection", CVPR 2021, eq. 5-8: with `r` a
    class's `pos_neg` and `n = sigmoid(gamma (r - mu))`, negatives weigh `n` and positives `1 + alpha (1 - n)`; in the last column, which
    is the background (or objectness), both weigh 1.

    Args:
        logits: [N, C + 1], or any other shape [..., C + 1], or a list of such: C foreground classes, then the background; float16,
            bfloat16, float32 or float64.
        labels: class indices 0..C, C the background, an integral dtype, with the shape of the logits less their last dimension. A
            negative label drops its row.
        pos_neg: [C], the ratio of the gradients of positives and negatives so far.
        gamma, mu: how steep the map from the ratio to the weights is, and where its middle is.
        alpha: how much more positives weigh at most, at least 0.
        focal_gamma: exponent of a focal modulator on top, at least 0; published: 0.

    Returns:
        `(loss, pos_grad, neg_grad)` as `equalized_focal_loss`, with two differences, both as published: the loss is divided by the number
        of rows, the sums are not; and the sums [C] leave the last column out.

    Raises: as `equalized_focal_loss`.
    """
    function = "eqlv2_loss"
    return _named(*eqlv2_loss_and_sums(read_eqlv2(function, logits, labels, pos_neg, gamma, mu, alpha, focal_gamma, 1.0)))


def read_equalized_focal(
    function: str,
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    quality: Tensor | Sequence[Tensor] | None,
    pos_neg: Tensor,
    gamma: float,
    alpha: float,
    scale_factor: float,
    weighting_factor: bool,
    modulator: int,
    weight: Tensor | Sequence[Tensor] | None,
    reduction: str,
    avg_factor: float | Tensor | None,
    background: str,
    ignore_index: int | None,
    layout: str,
    loss_weight: float = 1.0,
) -> focal.Request:
    weighting_factor = check_focus(function, gamma, alpha, scale_factor, weighting_factor)
    check_pos_neg(function, pos_neg)
    levels = read_levels(function, logits, layout, len(pos_neg))
    _check_labels(function, labels)
    ratio = arguments.read_class_vector(function, "pos_neg", pos_neg, levels).clamp(0, 1)
    # The exponent and both weights are linear in the ratio: from where it is 0 to where it is 1, which is the focal loss.
    positive, negative = focal.read_alpha(function, alpha)
    most = gamma + scale_factor
    factor = most / gamma if weighting_factor else 1.0
    at_zero = arguments.table_of_numbers(1, (most, positive * factor, negative * factor), ratio)
    table = torch.lerp(at_zero, arguments.table_of_numbers(1, (gamma, positive, negative), ratio), ratio)
    # "mean" without `avg_factor` divides by 1, as published.
    common = (weight, "sum" if reduction == "mean" else reduction, avg_factor, background, ignore_index, "labels")
    return focal.make_request(levels, labels, quality, table, modulator, *common, loss_weight=loss_weight)


def check_focus(function: str, gamma: float, alpha: float, scale_factor: float, weighting_factor: bool) -> bool:
    """Returns `weighting_factor` as a bool."""
    arguments.read_number(function, "gamma", gamma)
    arguments.read_number(function, "alpha", alpha, least=None)
    arguments.read_number(function, "scale_factor", scale_factor)
    weighting_factor = _checks.read_flag(function, "weighting_factor", weighting_factor)
    if weighting_factor and gamma == 0:
        raise ValueError(f"{function}: gamma must be above 0 with the weighting factor, which divides by it, got {gamma}")
    return weighting_factor


def check_pos_neg(function: str, pos_neg: Tensor) -> None:
    _checks.check_tensor(function, "pos_neg", pos_neg)
    if pos_neg.dim() != 1 or len(pos_neg) < 1:
        raise ValueError(f"{function}: pos_neg must have shape [C], one number per foreground class, got {list(pos_neg.shape)}")
    if pos_neg.is_complex():
        raise TypeError(f"{function}: pos_neg must be real, got {pos_neg.dtype}")


def _check_labels(function: str, labels: Any) -> None:
    for entry in [labels] if isinstance(labels, Tensor) else labels if isinstance(labels, (list, tuple)) else [labels]:
        _checks.check_tensor(function, "labels", entry)
        if entry.dtype.is_floating_point or entry.dtype.is_complex or entry.dtype == torch.bool:
            raise TypeError(f"{function}: labels must be class indices, an integral dtype, got {entry.dtype}")


def read_eqlv2(
    function: str,
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    pos_neg: Tensor,
    gamma: float,
    mu: float,
    alpha: float,
    focal_gamma: float,
    loss_weight: float,
) -> focal.Request:
    check_equalization(function, gamma, mu, alpha, focal_gamma)
    check_pos_neg(function, pos_neg)
    check_background_column(function, logits, len(pos_neg))
    levels = read_levels(function, logits, "rows", len(pos_neg) + 1)
    _check_labels(function, labels)
    _checks.check_device(function, "pos_neg", pos_neg, levels.first)
    negative = torch.sigmoid(gamma * (arguments.as_double(pos_neg) - mu))
    negative = torch.cat([negative, arguments.table_of_numbers(1, (1.0,), negative).view(1)])
    # Rows: the exponent, 1 + alpha (1 - negative), negative.
    constant = arguments.table_of_numbers(1, (focal_gamma, 1.0 + alpha, 0.0), negative)
    table = torch.addcmul(constant, arguments.table_of_numbers(1, (0.0, -alpha, 1.0), negative), negative)
    return focal.make_request(
        levels, labels, None, table, Modulator.FOCAL, None, "mean", None, "last", None, "labels",
        loss_weight=loss_weight, mean_over=levels.num_rows,
    )  # fmt: skip


def check_equalization(function: str, gamma: float, mu: float, alpha: float, focal_gamma: float) -> None:
    arguments.read_number(function, "gamma", gamma, least=None)
    arguments.read_number(function, "mu", mu, least=None)
    arguments.read_number(function, "alpha", alpha)
    arguments.read_number(function, "focal_gamma", focal_gamma)


def check_background_column(function: str, logits: Tensor | Sequence[Tensor], num_classes: int) -> None:
    for level in [logits] if isinstance(logits, Tensor) else logits if isinstance(logits, (list, tuple)) else []:
        if isinstance(level, Tensor) and level.dim() and level.shape[-1] != num_classes + 1:
            raise ValueError(
                f"{function}: logits must have {num_classes + 1} channels, the {num_classes} foreground classes and then the background, "
                f"got {level.shape[-1]}. The number of classes (the length of pos_neg) counts the foreground classes alone"
            )


def loss_and_sums(request: focal.Request) -> tuple[Tensor, Tensor]:
    """The loss, and its sums by class of positives and of negatives, [2, C]."""
    loss, sums = request.call("focal_forward", True)
    factor = abs(request.scale)
    if request.normalizer is not None:
        sums = sums * (factor / request.normalizer.double().abs())
    elif factor != 1:
        sums = sums * factor
    return loss, sums


def eqlv2_loss_and_sums(request: focal.Request) -> tuple[Tensor, Tensor]:
    """As `loss_and_sums`, without what scales the loss and without the background."""
    loss, sums = request.call("focal_forward", True)
    return loss, sums[:, :-1]


def _named(loss: Tensor, sums: Tensor) -> EqualizedLoss:
    return EqualizedLoss(loss, *sums.unbind())
