"""GHM-C and GHM-R as Triton kernels: CUDA tensors, and CPU tensors under TRITON_INTERPRET=1.

One kernel writes the edges of the bins. The histogram is a pass over the elements by a fixed number of programs, each of which
keeps the bins of its blocks; their partial histograms are added in order. Another program turns the histogram into the loss and
the weights of the bins, and the gradient is a second pass. Everything is float64 inside. Formulas, the rules for bins, and
layouts: README.md beside this file.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsloss_kernels.losses.triton_common import fitting_block, float_bits, float_of, launching_on, power_of_two, rounded_to

# Elements at a time of one program of a pass.
BLOCK = {"cuda": 1024, "cpu": 1 << 16}
# Programs of the pass over one level, all at work at once on a large GPU. Not the number of its processors: it fixes the order
# of float sums.
HISTOGRAM_PROGRAMS = 512
BACKWARD_WARPS, TABLE_WARPS = 4, 4
# Without a limit of its own the assembler spills registers to fit one more block on a processor.
HISTOGRAM_OPTIONS = {"num_warps": 4, "maxnreg": 240}

# Arguments that change from call to call without a gain from code of their own; floats travel as the bits of a float64.
PLAIN_INTEGERS = ("bins", "entries", "mu_bits", "momentum_bits", "log_momentum_bits", "scale_bits")


# Coefficients of exp(x) and of atanh(x) / x in x^2. The functions of the library branch on special values, which costs registers.
EXP_TERMS = tl.constexpr(tuple(1 / math.factorial(k) for k in range(14)))
ATANH_TERMS = tl.constexpr(tuple(1 / (2 * k + 1) for k in range(11)))
LOG2_E = tl.constexpr(math.log2(math.e))
LOG_2 = tl.constexpr(math.log(2))


@triton.jit
def reciprocal(x):
    """1 / x to float64, for x that float32 has too."""
    result = (1.0 / x.to(tl.float32)).to(tl.float64)
    result *= 2.0 - x * result
    return result * (2.0 - x * result)


@triton.jit
def exp_of_minus(x):
    """exp(-x) for x >= 0, to float64."""
    power = -x * LOG2_E
    power = tl.where(power < -2000.0, -2000.0, power)
    whole = tl.floor(power + 0.5)
    rest = (power - whole) * LOG_2
    result = tl.full(x.shape, EXP_TERMS[13], tl.float64)
    for k in tl.static_range(12, -1, -1):
        result = result * rest + EXP_TERMS[k]
    # In two steps, as the result may be subnormal.
    half = tl.floor(0.5 * whole)
    return result * power_of_two(half) * power_of_two(whole - half)


@triton.jit
def log1p_of_fraction(x):
    """log(1 + x) for x within [0, 1], right to 4e-12 relative: 2 atanh(x / (2 + x))."""
    ratio = x * reciprocal(2.0 + x)
    square = ratio * ratio
    result = tl.full(x.shape, ATANH_TERMS[10], tl.float64)
    for k in tl.static_range(9, -1, -1):
        result = result * square + ATANH_TERMS[k]
    return 2.0 * ratio * result


@triton.jit
def log1p_of(x):
    """log(1 + x) for x >= 0, to float64: what rounding takes from 1 + x is added to first order."""
    whole = 1.0 + x
    return tl.log(whole) + (x - (whole - 1.0)) / whole


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
    BACKGROUND_FIRST: tl.constexpr,
    WEIGHT_PER_ROW: tl.constexpr,
    IS_INDEX: tl.constexpr,
):
    """Prediction and target of the elements start + lane in float64, and whether each is valid."""
    inside = lane < size - start
    pred = tl.load(preds_ptr + start + lane, mask=inside, other=0.0).to(tl.float64)
    row = start + lane
    column = lane
    if IS_INDEX or WEIGHT_PER_ROW:
        # Only the first row needs a 64-bit division.
        first_row = start // classes
        ahead = (start - first_row * classes).to(tl.int32) + lane
        row = first_row + ahead // classes
        column = ahead % classes
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
        factor = tl.where(pred > 0, 1.0 - target, target)
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


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def histogram_kernel(
    preds_ptr,
    targets_ptr,
    weights_ptr,
    edges_ptr,
    partials_ptr,  # [2, bins + 1, entries], from the first entry of this level on
    size,
    classes,
    bins,
    mu_bits,
    entries,
    BACKGROUND_FIRST: tl.constexpr,
    WEIGHT_PER_ROW: tl.constexpr,
    IS_INDEX: tl.constexpr,
    IS_REGRESSION: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)
    counts = tl.zeros([COLUMNS], tl.int32)
    sums = tl.zeros([COLUMNS], tl.float64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < size:
        pred, target, is_valid = read_elements(
            *(preds_ptr, targets_ptr, weights_ptr, start, lane, size, classes), BACKGROUND_FIRST, WEIGHT_PER_ROW, IS_INDEX
        )
        loss, slope, bin_index = harmonize(pred, target, edges_ptr, bins, mu_bits, IS_REGRESSION, IS_INDEX)
        is_nan = (loss != loss) | (slope != slope)
        # NaN stands behind the bins, what is not valid behind that.
        bin_index = tl.where(is_valid, tl.where(is_nan, bins, bin_index), bins + 1)
        counts += tl.histogram(bin_index, COLUMNS)
        index = bins * 0
        while index < bins:
            sums += tl.where(column == index, tl.sum(tl.where(bin_index == index, loss, 0.0)), 0.0)
            index += 1
        start += tl.num_programs(0).to(tl.int64) * BLOCK
    is_kept = column <= bins
    place = column.to(tl.int64) * entries + tl.program_id(0)
    tl.store(partials_ptr + place, counts.to(tl.float64), mask=is_kept)
    tl.store(partials_ptr + (bins + 1) * entries.to(tl.int64) + place, sums, mask=is_kept)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def finalize_kernel(
    histogram_ptr,
    acc_sum_ptr,
    num_updates_ptr,
    loss_ptr,
    new_acc_sum_ptr,
    new_num_updates_ptr,
    bin_weights_ptr,
    bins,
    momentum_bits,
    log_momentum_bits,
    scale_bits,
    HAS_MOMENTUM: tl.constexpr,
    COUNT_EMPTY_BINS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    is_bin = column < bins
    count = tl.load(histogram_ptr + column, mask=is_bin, other=0.0)
    sums = tl.load(histogram_ptr + bins + 1 + column, mask=is_bin, other=0.0)
    is_filled = count > 0
    before = count
    if acc_sum_ptr is not None:
        before = tl.load(acc_sum_ptr + column, mask=is_bin, other=0.0).to(tl.float64)
    accumulated = count
    density = count
    if num_updates_ptr is not None:
        updates_before = tl.load(num_updates_ptr + column, mask=is_bin, other=0)
        updates = updates_before
    if HAS_MOMENTUM:
        is_updated = is_bin if COUNT_EMPTY_BINS else is_filled
        momentum = float_of(momentum_bits)
        accumulated = tl.where(is_updated, momentum * before + (1.0 - momentum) * count, before)
        density = accumulated
        if num_updates_ptr is not None:
            updates += is_updated.to(tl.int64)
            # 1 - momentum^n as -expm1(exponent): exp rounds, and log takes back what it rounded.
            exponent = updates.to(tl.float64) * float_of(log_momentum_bits)
            power = tl.exp(exponent)
            is_small = (exponent > -1.0) & (power < 1)
            share = (1.0 - power) * tl.where(is_small, exponent / tl.log(tl.where(is_small, power, 0.5)), 1.0)
            density = accumulated / tl.where(power < 1, share, -exponent)
    num_bins = bins.to(tl.float64)
    if not COUNT_EMPTY_BINS:
        num_bins = tl.sum(is_filled.to(tl.float64))
    bin_weight = tl.where(is_filled, 1.0 / (tl.where(is_filled, density, 1.0) * tl.maximum(num_bins, 1.0)), 0.0)
    loss = tl.sum(tl.where(is_filled, bin_weight * sums, 0.0))
    # Any NaN among the valid elements.
    loss = tl.where(tl.load(histogram_ptr + bins) > 0, float("nan"), loss)
    is_kept = (tl.max(count) > 0) & (tl.abs(loss) < float("inf"))
    accumulated = tl.where(is_kept, accumulated, before)
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
    tl.store(bin_weights_ptr + column, bin_weight * float_of(scale_bits), mask=is_bin)
    tl.store(new_acc_sum_ptr + column, accumulated.to(new_acc_sum_ptr.dtype.element_ty), mask=is_bin)
    if num_updates_ptr is not None:
        tl.store(new_num_updates_ptr + column, tl.where(is_kept, updates, updates_before), mask=is_bin)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def gradient_kernel(
    preds_ptr,
    targets_ptr,
    weights_ptr,
    edges_ptr,
    bin_weights_ptr,
    grad_loss_ptr,
    results_ptr,
    size,
    classes,
    bins,
    mu_bits,
    BACKGROUND_FIRST: tl.constexpr,
    WEIGHT_PER_ROW: tl.constexpr,
    IS_INDEX: tl.constexpr,
    IS_REGRESSION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    pred, target, is_valid = read_elements(
        *(preds_ptr, targets_ptr, weights_ptr, start, lane, size, classes), BACKGROUND_FIRST, WEIGHT_PER_ROW, IS_INDEX
    )
    _, slope, bin_index = harmonize(pred, target, edges_ptr, bins, mu_bits, IS_REGRESSION, IS_INDEX)
    gradient = slope * (tl.load(bin_weights_ptr + bin_index) * tl.load(grad_loss_ptr).to(tl.float64))
    gradient = rounded_to(tl.where(is_valid, gradient, 0.0), results_ptr.dtype.element_ty)
    tl.store(results_ptr + start + lane, gradient, mask=lane < size - start)


def _levels(preds: list[Tensor], targets: list[Tensor], weights: list[Tensor], mu: float | None, background_first: bool):
    """Of every level that is not empty: its number, and what both passes take, as keyword arguments."""
    for number, (pred, target) in enumerate(zip(preds, targets, strict=True)):
        weight = weights[number] if weights else None
        is_index = not target.is_floating_point()
        per_row = weight is not None and weight.dim() < pred.dim()
        if pred.numel():
            yield number, {
                "preds_ptr": pred,
                "targets_ptr": target,
                "weights_ptr": weight,
                "size": pred.numel(),
                "classes": pred.shape[-1] if is_index or per_row else 1,
                "mu_bits": float_bits(mu or 0.0),
                "BACKGROUND_FIRST": is_index and background_first,
                "WEIGHT_PER_ROW": per_row,
                "IS_INDEX": is_index,
                "IS_REGRESSION": mu is not None,
            }


def _write_edges(bins: int, mu: float | None, like: Tensor) -> Tensor:
    edges = torch.empty((2, bins + 1), dtype=torch.float64, device=like.device)
    columns = triton.next_power_of_2(bins + 1)
    edges_kernel[1,](edges, bins, float_bits(mu or 0.0), mu is not None, columns, num_warps=TABLE_WARPS)
    return edges


def ghm_histogram(preds, targets, weights, bins, mu, background_first) -> Tensor:
    device = preds[0].device
    blocks = [fitting_block(BLOCK, pred.numel(), device) for pred in preds]
    grids = [min(triton.cdiv(pred.numel(), block), HISTOGRAM_PROGRAMS) for pred, block in zip(preds, blocks, strict=True)]
    partials = torch.empty((2, bins + 1, sum(grids)), dtype=torch.float64, device=device)
    with launching_on(preds[0]):
        edges = _write_edges(bins, mu, preds[0])
        for number, arguments in _levels(preds, targets, weights, mu, background_first):
            histogram_kernel[grids[number],](
                edges_ptr=edges,
                partials_ptr=partials.view(-1)[sum(grids[:number]) :],
                bins=bins,
                entries=sum(grids),
                COLUMNS=triton.next_power_of_2(bins + 2),
                BLOCK=blocks[number],
                **arguments,
                **HISTOGRAM_OPTIONS,
            )
    return partials.sum(-1)


def ghm_finalize(
    preds, targets, weights, histogram, acc_sum, num_updates, bins, mu, background_first, momentum, count_empty_bins, gradient_scale
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = preds[0].new_empty((), dtype=torch.float64 if preds[0].dtype == torch.float64 else torch.float32)
    new_acc_sum = histogram.new_empty((bins,), dtype=torch.float64 if acc_sum is None else acc_sum.dtype)
    new_num_updates = histogram.new_empty((0 if num_updates is None else bins,), dtype=torch.int64)
    bin_weights = histogram.new_empty((bins,))
    log_momentum = math.log(momentum) if momentum > 0 else 0.0
    with launching_on(histogram):
        finalize_kernel[1,](
            *(histogram, acc_sum, num_updates, loss, new_acc_sum, new_num_updates, bin_weights, bins),
            *map(float_bits, (momentum, log_momentum, gradient_scale)),
            HAS_MOMENTUM=momentum > 0,
            COUNT_EMPTY_BINS=count_empty_bins,
            COLUMNS=triton.next_power_of_2(bins),
            num_warps=TABLE_WARPS,
        )
    return loss, new_acc_sum, new_num_updates, bin_weights


def ghm_backward(preds, targets, weights, bin_weights, grad_loss, mu, background_first) -> list[Tensor]:
    gradients = [torch.empty_like(pred, memory_format=torch.contiguous_format) for pred in preds]
    with launching_on(preds[0]):
        edges = _write_edges(bin_weights.numel(), mu, preds[0])
        for number, arguments in _levels(preds, targets, weights, mu, background_first):
            block = fitting_block(BLOCK, arguments["size"], preds[0].device)
            gradient_kernel[triton.cdiv(arguments["size"], block),](
                edges_ptr=edges,
                bin_weights_ptr=bin_weights,
                grad_loss_ptr=grad_loss,
                results_ptr=gradients[number],
                bins=bin_weights.numel(),
                BLOCK=block,
                num_warps=BACKWARD_WARPS,
                **arguments,
            )
    return gradients
