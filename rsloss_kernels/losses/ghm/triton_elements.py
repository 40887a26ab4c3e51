"""One element of GHM-C or GHM-R in Triton: reading it, its loss, derivative and bin, and the edges of the bins. Float64 inside.

Formulas and the rules for bins: README.md beside this file.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from rsloss_kernels.losses.triton_common import (
    configuration,
    exp_of_minus,
    float_bits,
    float_of,
    log1p_of,
    log1p_of_fraction,
    reciprocal,
    row_and_class,
)

# Arguments that change from call to call without a gain from code of their own; floats travel as the bits of a float64.
PLAIN_INTEGERS = ("places", "bins", "entries", "mu_bits", "momentum_bits", "log_momentum_bits", "scale_bits")


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def edges_kernel(
    edges_ptr,  # [2, bins + 1]: edges of the position of an element, and of its gradient norm
    bins,
    mu_bits,
    IS_REGRESSION: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of bin k the position runs from edge k, inclusive, to edge k + 1. Nothing is below the first or above the last."""
    k = tl.arange(0, COLUMNS)
    is_inner = (k > 0) & (k < bins)
    # In float64 from here on; any number stands in for the outer edges.
    rank, last = tl.where(is_inner, k, 1).to(tl.float64), bins.to(tl.float64)
    last = tl.where(is_inner, last, 2.0)
    if IS_REGRESSION:
        edge = (float_of(mu_bits) * rank) / tl.sqrt((last - rank) * (last + rank))
    else:
        beyond = 2 * rank - last
        edge = log1p_of(tl.abs(beyond) / tl.where(beyond > 0, last - rank, rank))
        edge = tl.where(beyond > 0, edge, -edge)
    outer = tl.where(k == 0, float("-inf"), float("nan"))
    tl.store(edges_ptr + k, tl.where(is_inner, edge, outer), mask=k <= bins)
    tl.store(edges_ptr + bins + 1 + k, tl.where(is_inner, rank / last, outer), mask=k <= bins)


@triton.jit
def read_elements(
    preds_ptr,
    targets_ptr,
    weights_ptr,
    start,
    lane,
    size,
    classes,
    places,
    BACKGROUND_FIRST: tl.constexpr,
    WEIGHT_PER_ROW: tl.constexpr,
    IS_INDEX: tl.constexpr,
    IS_MAP: tl.constexpr,
):
    """Prediction and target of the elements start + lane in float64, and whether each is valid."""
    inside = lane < size - start
    pred = tl.load(preds_ptr + start + lane, mask=inside, other=0.0).to(tl.float64)
    row = start + lane
    column = lane
    if IS_INDEX or WEIGHT_PER_ROW:
        row, column = row_and_class(start, lane, size, classes, places, IS_MAP)
    if IS_INDEX:
        label = tl.load(targets_ptr + row, mask=inside, other=-1)
        target = (label == column + (1 if BACKGROUND_FIRST else 0)).to(tl.float64)
    else:
        target = tl.load(targets_ptr + start + lane, mask=inside, other=0.0).to(tl.float64)
    is_valid = inside
    if weights_ptr is not None:
        place = row if WEIGHT_PER_ROW else start + lane
        is_valid = inside & (tl.load(weights_ptr + place, mask=inside, other=0.0).to(tl.float64) > 0)
    return pred, target, is_valid


@triton.jit
def harmonize(pred, target, edges_ptr, bins, mu_bits, IS_REGRESSION: tl.constexpr, IS_INDEX: tl.constexpr):
    """Loss, its derivative by the prediction, and the bin of every element; the derivative and the loss of NaN are NaN."""
    edges = edges_ptr
    if IS_REGRESSION:
        difference = pred - target
        mu = float_of(mu_bits)
        position = tl.abs(difference)
        # d^2 can overflow; the root is |d| to the last bit well before.
        is_far = position > 1e9 * mu
        ratio = tl.where(is_far, 0.0, position) * (1.0 / mu)
        square = 1.0 + ratio * ratio
        # 1 / sqrt, by Newton's method from float32.
        inverse = tl.rsqrt(square.to(tl.float32)).to(tl.float64)
        inverse *= 1.5 - 0.5 * square * inverse * inverse
        inverse *= 1.5 - 0.5 * square * inverse * inverse
        loss = tl.where(is_far, position - mu, position * (ratio * reciprocal(1.0 + square * inverse)))
        slope = tl.where(is_far, 1.0, ratio * inverse)
        slope = tl.where(difference > 0, slope, -slope)
    else:
        small = exp_of_minus(tl.abs(pred))
        factor = tl.where(pred > 0, 1.0 - target, target) + 0.0 * target  # NaN of an infinite target
        slope = small * reciprocal(1.0 + small) - factor
        loss = tl.where(factor == 0, 0.0, factor * tl.abs(pred)) + log1p_of_fraction(small)
        position = tl.where(target == 1, -pred, pred)
        if not IS_INDEX:
            is_soft = (target != 0) & (target != 1)
            position = tl.where(is_soft, tl.abs(slope), position)
            edges += tl.where(is_soft, bins + 1, 0)
        slope = tl.where(pred > 0, -slope, slope)
    # The gradient norm, rounded, is at most one bin off.
    norm = tl.abs(slope)
    guess = tl.minimum((tl.where(norm < 1, norm, 1.0) * bins).to(tl.int32), bins - 1)
    is_below = position < tl.load(edges + guess)
    is_above = position >= tl.load(edges + guess + 1)
    return loss, slope, guess + is_above.to(tl.int32) - is_below.to(tl.int32)


def write_edges(bins: int, mu: float | None, like: Tensor) -> Tensor:
    edges = torch.empty((2, bins + 1), dtype=torch.float64, device=like.device)
    columns = triton.next_power_of_2(bins + 1)
    options = configuration("ghm table", columns, like.device).options
    edges_kernel[1,](edges, bins, float_bits(mu or 0.0), mu is not None, columns, **options)
    return edges
