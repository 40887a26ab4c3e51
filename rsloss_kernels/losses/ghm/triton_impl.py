"""GHM-C and GHM-R as Triton kernels: CUDA tensors, and CPU tensors under TRITON_INTERPRET=1.

One kernel writes the edges of the bins. The histogram is a pass over the elements by a fixed number of programs, each of which
keeps the bins of its blocks; their partial histograms are added in order. Another program turns the histogram into the loss and
the weights of the bins, and the gradient is a second pass. What happens to one element is told in
triton_elements.py. Everything is float64 inside. Formulas and layouts: README.md beside this file.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsloss_kernels.losses.ghm.op_checks import index_shape
from rsloss_kernels.losses.ghm.triton_elements import PLAIN_INTEGERS, harmonize, read_elements, write_edges
from rsloss_kernels.losses.triton_common import configuration, float_bits, float_of, launching_on, rounded_to


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def histogram_kernel(
    preds_ptr,
    targets_ptr,
    weights_ptr,
    edges_ptr,
    partials_ptr,  # [2, bins + 1, entries], from the first entry of this level on
    size,
    classes,
    places,
    bins,
    mu_bits,
    entries,
    BACKGROUND_FIRST: tl.constexpr,
    WEIGHT_PER_ROW: tl.constexpr,
    IS_INDEX: tl.constexpr,
    IS_MAP: tl.constexpr,
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
            *(preds_ptr, targets_ptr, weights_ptr, start, lane, size, classes, places),
            *(BACKGROUND_FIRST, WEIGHT_PER_ROW, IS_INDEX, IS_MAP),
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
    places,
    bins,
    mu_bits,
    BACKGROUND_FIRST: tl.constexpr,
    WEIGHT_PER_ROW: tl.constexpr,
    IS_INDEX: tl.constexpr,
    IS_MAP: tl.constexpr,
    IS_REGRESSION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    pred, target, is_valid = read_elements(
        *(preds_ptr, targets_ptr, weights_ptr, start, lane, size, classes, places),
        *(BACKGROUND_FIRST, WEIGHT_PER_ROW, IS_INDEX, IS_MAP),
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
        per_row = weight is not None and weight.shape != pred.shape
        classes, places = index_shape(pred, target if is_index else weight) if is_index or per_row else (1, 1)
        if pred.numel():
            yield number, {
                "preds_ptr": pred,
                "targets_ptr": target,
                "weights_ptr": weight,
                "size": pred.numel(),
                "classes": classes,
                "places": places,
                "mu_bits": float_bits(mu or 0.0),
                "BACKGROUND_FIRST": is_index and background_first,
                "WEIGHT_PER_ROW": per_row,
                "IS_INDEX": is_index,
                "IS_MAP": places > 1,
                "IS_REGRESSION": mu is not None,
            }


def ghm_histogram(preds, targets, weights, bins, mu, background_first) -> Tensor:
    device = preds[0].device
    runs = [configuration("ghm histogram", pred.numel(), device) for pred in preds]
    grids = [min(triton.cdiv(pred.numel(), run.block), run.programs) for pred, run in zip(preds, runs, strict=True)]
    partials = torch.empty((2, bins + 1, sum(grids)), dtype=torch.float64, device=device)
    with launching_on(preds[0]):
        edges = write_edges(bins, mu, preds[0])
        for number, arguments in _levels(preds, targets, weights, mu, background_first):
            histogram_kernel[grids[number],](
                edges_ptr=edges,
                partials_ptr=partials.view(-1)[sum(grids[:number]) :],
                bins=bins,
                entries=sum(grids),
                COLUMNS=triton.next_power_of_2(bins + 2),
                **arguments,
                **runs[number].arguments,
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
            **configuration("ghm table", bins, histogram.device).options,
        )
    return loss, new_acc_sum, new_num_updates, bin_weights


def ghm_backward(preds, targets, weights, bin_weights, grad_loss, mu, background_first) -> list[Tensor]:
    gradients = [torch.empty_like(pred, memory_format=torch.contiguous_format) for pred in preds]
    with launching_on(preds[0]):
        edges = write_edges(bin_weights.numel(), mu, preds[0])
        for number, arguments in _levels(preds, targets, weights, mu, background_first):
            run = configuration("ghm gradient", arguments["size"], preds[0].device)
            gradient_kernel[triton.cdiv(arguments["size"], run.block),](
                edges_ptr=edges,
                bin_weights_ptr=bin_weights,
                grad_loss_ptr=grad_loss,
                results_ptr=gradients[number],
                bins=bin_weights.numel(),
                **arguments,
                **run.arguments,
            )
    return gradients
