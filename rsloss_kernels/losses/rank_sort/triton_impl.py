"""Rank & Sort's finalize as Triton kernels: every sum over positives and over bins by comparing pairs, float64 inside.

Six launches: breakpoints (two); the terms of every positive; gradients of the positives; lines of the negatives; the two
losses. A sum over pairs takes about P^2 steps, needs no float prefix sums (so it has a fixed order, no far origin and no
cancellation), and ends at the number of positives, which stays on the device. Formulas: README.md beside this file;
layouts: ../ranking/README.md.
"""
import torch
import triton
import triton.language as tl

from rsloss_kernels.losses.ranking import reference
from rsloss_kernels.losses.ranking.op import GRADIENT_ROWS, LINE_ROWS
from rsloss_kernels.losses.ranking.triton_impl import (
    TABLE_WARPS,
    count_not_above,
    float_bits,
    float_of,
    launching_on,
    pair_tile,
    write_breakpoints,
)

EPS = tl.constexpr(1e-10)
# Rows of the table between the kernels: ranking error, sorting error, and the shares of them per unit of H that a negative
# and a worse positive take. A share of 0 means that nothing is shared out.
TERM_ROWS = 4
PLAIN_INTEGERS = ("capacity", "delta_bits", "unit_bits", "scale_bits")


@triton.jit
def inverse_width(delta_bits, IS_STEP: tl.constexpr):
    """1 / (2 delta); 1 for a hard step, which has no use for it."""
    if IS_STEP:
        return float_of(delta_bits) + 1.0
    else:
        return 0.5 / float_of(delta_bits)


@triton.jit
def window_step(x, per_width, IS_STEP: tl.constexpr):
    """H(x) = clamp(x / (2 delta) + 1/2, 0, 1), `per_width` = 1 / (2 delta); delta = 0: 1 where x >= 0."""
    if IS_STEP:
        return (x >= 0).to(tl.float64)
    else:
        return tl.minimum(tl.maximum(x * per_width + 0.5, 0.0), 1.0)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def terms_kernel(
    ranked_ptr,  # [4, capacity]
    bins_ptr,  # [2, 2 capacity + 1]
    edges_ptr,  # [2 capacity]
    slots_ptr,  # [2, capacity]
    sizes_ptr,
    terms_ptr,  # [TERM_ROWS, capacity]
    capacity,
    delta_bits,
    unit_bits,
    IS_STEP: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
):
    valid = tl.load(sizes_ptr)
    first = tl.program_id(0) * TILE
    if first < valid:
        per_width = inverse_width(delta_bits, IS_STEP)
        rank = first + tl.arange(0, TILE)
        is_valid = rank < valid
        centre = tl.load(ranked_ptr + rank, mask=is_valid, other=0.0)[:, None]
        quality = tl.load(ranked_ptr + capacity + rank, mask=is_valid, other=0.0)[:, None]
        lo_slot = tl.load(slots_ptr + rank, mask=is_valid, other=0)[:, None]
        hi_slot = tl.load(slots_ptr + capacity + rank, mask=is_valid, other=0)[:, None]
        first_slot = tl.load(slots_ptr + first)
        last_slot = tl.load(slots_ptr + capacity + tl.minimum(first + TILE, valid) - 1)

        # Positives whose window ends below the first one's window lie below it too.
        worse = tl.zeros([TILE, RUN], tl.float64)
        better = tl.zeros([TILE, RUN], tl.float64)
        worse_deficit = tl.zeros([TILE, RUN], tl.float64)
        better_excess = tl.zeros([TILE, RUN], tl.float64)
        start = first_slot - first
        while start < valid:
            other = start + tl.arange(0, RUN)
            is_other = other < valid
            other_centre = tl.load(ranked_ptr + other, mask=is_other, other=0.0)[None, :]
            gap = tl.load(ranked_ptr + capacity + other, mask=is_other, other=0.0)[None, :] - quality
            h = tl.where(is_other[None, :], window_step(other_centre - centre, per_width, IS_STEP), 0.0)
            is_worse = gap < 0
            worse += tl.where(is_worse, h, 0.0)
            better += tl.where(is_worse, 0.0, h)
            worse_deficit -= tl.where(is_worse, h * gap, 0.0)
            better_excess += tl.where(is_worse, 0.0, h * gap)
            start += RUN

        # Bins from the first window on: in a window by its line, right of it in full.
        false_positive = tl.zeros([TILE, RUN], tl.float64)
        slot_start = first_slot
        while slot_start < last_slot:
            slot = slot_start + tl.arange(0, RUN)
            is_bin = slot < 2 * valid
            count = tl.load(bins_ptr + 1 + slot, mask=is_bin, other=0).to(tl.float64)
            edge = tl.load(edges_ptr + slot, mask=is_bin & (count > 0), other=0.0)[None, :]
            fixed = tl.load(bins_ptr + 2 * capacity + 2 + slot, mask=is_bin, other=0).to(tl.float64)
            slot = slot[None, :]
            if not IS_STEP:
                moment = count[None, :] * (edge - centre) + (fixed * float_of(unit_bits))[None, :]
                partial = tl.maximum(0.5 * count[None, :] + moment * per_width, 0.0)
                is_open = (slot >= lo_slot) & (slot < hi_slot) & (count > 0)[None, :]
                false_positive += tl.where(is_open, partial, 0.0)
            false_positive += tl.where(slot >= hi_slot, count[None, :], 0.0)
            slot_start += RUN
        beyond = tl.zeros([RUN], tl.float64)
        while slot_start < 2 * valid:
            slot = slot_start + tl.arange(0, RUN)
            beyond += tl.load(bins_ptr + 1 + slot, mask=slot < 2 * valid, other=0).to(tl.float64)
            slot_start += RUN

        worse_sum = tl.sum(worse, 1)
        better_sum = tl.maximum(tl.sum(better, 1), 0.5)
        among_positives = worse_sum + better_sum
        above = tl.sum(false_positive, 1) + tl.sum(beyond, 0)
        ranking_error = above / (among_positives + above)
        spread = tl.sum(worse_deficit, 1) * better_sum + tl.sum(better_excess, 1) * worse_sum
        sorting_error = spread / (better_sum * among_positives)
        tl.store(terms_ptr + rank, ranking_error, mask=is_valid)
        tl.store(terms_ptr + capacity + rank, sorting_error, mask=is_valid)
        coefficient = tl.where(above > EPS, 1.0 / (among_positives + above), 0.0)
        tl.store(terms_ptr + 2 * capacity + rank, coefficient, mask=is_valid)
        is_sorted_below = worse_sum > EPS
        weight = tl.where(is_sorted_below, sorting_error / tl.where(is_sorted_below, worse_sum, 1.0), 0.0)
        tl.store(terms_ptr + 3 * capacity + rank, weight, mask=is_valid)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def gradients_kernel(
    ranked_ptr,
    slots_ptr,
    sizes_ptr,
    terms_ptr,
    gradients_ptr,  # [3, capacity]
    capacity,
    delta_bits,
    scale_bits,
    IS_STEP: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
):
    valid = tl.load(sizes_ptr)
    per_width = inverse_width(delta_bits, IS_STEP)
    first = tl.program_id(0) * TILE
    rank = first + tl.arange(0, TILE)
    is_valid = rank < valid
    centre = tl.load(ranked_ptr + rank, mask=is_valid, other=0.0)[:, None]
    quality = tl.load(ranked_ptr + capacity + rank, mask=is_valid, other=0.0)[:, None]
    # Positives whose window starts above the last one's window lie above it too.
    last = tl.minimum(first + TILE, valid) - 1
    end = tl.load(slots_ptr + capacity + last, mask=first < valid, other=0) - last
    end = tl.where(first < valid, end, 0)
    pull = tl.zeros([TILE, RUN], tl.float64)
    start = tl.program_id(0) * 0
    while start < end:
        other = start + tl.arange(0, RUN)
        is_other = other < end
        other_centre = tl.load(ranked_ptr + other, mask=is_other, other=0.0)[None, :]
        other_quality = tl.load(ranked_ptr + capacity + other, mask=is_other, other=0.0)[None, :]
        weight = tl.load(terms_ptr + 3 * capacity + other, mask=is_other, other=0.0)[None, :]
        h = window_step(centre - other_centre, per_width, IS_STEP)
        pull += tl.where(other_quality > quality, weight * h, 0.0)
        start += RUN

    ranking_error = tl.load(terms_ptr + rank, mask=is_valid, other=0.0)
    sorting_error = tl.load(terms_ptr + capacity + rank, mask=is_valid, other=0.0)
    is_ranked_below = tl.load(terms_ptr + 2 * capacity + rank, mask=is_valid, other=0.0) > 0
    is_sorted_below = tl.load(terms_ptr + 3 * capacity + rank, mask=is_valid, other=0.0) > 0
    scale = float_of(scale_bits) / tl.maximum(valid, 1).to(tl.float64)
    of_ranking = tl.where(is_ranked_below, -ranking_error, 0.0) * scale
    of_sorting = (tl.where(is_sorted_below, -sorting_error, 0.0) + tl.sum(pull, 1)) * scale
    fits = rank < capacity
    index = tl.load(ranked_ptr + 3 * capacity + rank, mask=fits, other=-1.0)
    if_invalid = tl.where(index >= 0, float("nan"), 0.0)
    tl.store(gradients_ptr + rank, index, mask=fits)
    tl.store(gradients_ptr + capacity + rank, tl.where(is_valid, of_ranking, if_invalid), mask=fits)
    tl.store(gradients_ptr + 2 * capacity + rank, tl.where(is_valid, of_sorting, if_invalid), mask=fits)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def losses_kernel(
    sizes_ptr, terms_ptr, counts_ptr, bins_ptr, ranking_ptr, sorting_ptr, capacity, RUN: tl.constexpr
):
    valid = tl.load(sizes_ptr)
    ranking_error = tl.zeros([RUN], tl.float64)
    sorting_error = tl.zeros([RUN], tl.float64)
    start = valid * 0
    while start < valid:
        rank = start + tl.arange(0, RUN)
        ranking_error += tl.load(terms_ptr + rank, mask=rank < valid, other=0.0)
        sorting_error += tl.load(terms_ptr + capacity + rank, mask=rank < valid, other=0.0)
        start += RUN
    # More positives than slots, an invalid positive, or a NaN negative.
    found = tl.load(counts_ptr)
    is_broken = (found > capacity) | (found > valid) | (tl.load(bins_ptr) > 0)
    positives = tl.maximum(valid, 1).to(tl.float64)
    ranking = tl.where(is_broken, float("nan"), tl.sum(ranking_error, 0) / positives)
    sorting = tl.where(is_broken, float("nan"), tl.sum(sorting_error, 0) / positives)
    tl.store(ranking_ptr, ranking.to(ranking_ptr.dtype.element_ty))
    tl.store(sorting_ptr, sorting.to(sorting_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def lines_kernel(
    ranked_ptr,
    slots_ptr,
    sizes_ptr,
    terms_ptr,
    lines_ptr,  # [3, 2 capacity]; the breakpoints of row 0 are read, rows 1 and 2 written
    capacity,
    delta_bits,
    scale_bits,
    IS_STEP: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
):
    valid = tl.load(sizes_ptr)
    top = tl.load(sizes_ptr + 1)
    per_width = inverse_width(delta_bits, IS_STEP)
    first = tl.program_id(0) * TILE
    slot = first + tl.arange(0, TILE)
    fits = slot < 2 * capacity
    edge = tl.load(lines_ptr + slot, mask=fits, other=0.0)[:, None]
    # Windows of the ranks below `closed` end at or left of all these slots, those from `opened` on start right of them.
    closed = count_not_above(slots_ptr + capacity, first, valid, top, first >= 0, first * 0)
    opened = count_not_above(slots_ptr, first + TILE - 1, valid, top, first >= 0, first * 0)
    below = tl.zeros([RUN], tl.float64)
    start = first * 0
    while start < closed:
        rank = start + tl.arange(0, RUN)
        below += tl.load(terms_ptr + 2 * capacity + rank, mask=rank < closed, other=0.0)
        start += RUN
    value = tl.zeros([TILE, RUN], tl.float64)
    slope = tl.zeros([TILE, RUN], tl.float64)
    start = closed
    while start < opened:
        rank = start + tl.arange(0, RUN)
        is_rank = rank < opened
        centre = tl.load(ranked_ptr + rank, mask=is_rank, other=0.0)[None, :]
        coefficient = tl.load(terms_ptr + 2 * capacity + rank, mask=is_rank, other=0.0)[None, :]
        lo_slot = tl.load(slots_ptr + rank, mask=is_rank, other=0)[None, :]
        hi_slot = tl.load(slots_ptr + capacity + rank, mask=is_rank, other=0)[None, :]
        is_closed = slot[:, None] >= hi_slot
        value += tl.where(is_closed, coefficient, 0.0)
        if not IS_STEP:
            is_open = (slot[:, None] >= lo_slot) & (is_closed == 0)
            value += tl.where(is_open, coefficient * window_step(edge - centre, per_width, IS_STEP), 0.0)
            slope += tl.where(is_open, coefficient * per_width, 0.0)
        start += RUN
    scale = float_of(scale_bits) / tl.maximum(valid, 1).to(tl.float64)
    tl.store(lines_ptr + 2 * capacity + slot, (tl.sum(value, 1) + tl.sum(below, 0)) * scale, mask=fits)
    tl.store(lines_ptr + 4 * capacity + slot, tl.sum(slope, 1) * scale, mask=fits)


def rank_sort_finalize(
    logits, negatives, ranked, counts, bins, segments, num_segments, delta, gradient_scale, upstream_parity
):
    dtype = reference.arithmetic_type(logits[0].dtype)
    double = dtype == torch.float64
    ranked, bins = ranked.contiguous(), bins.contiguous()
    capacity, device = ranked.shape[1], ranked.device
    ranking, sorting = (torch.empty((), dtype=dtype, device=device) for _ in range(2))
    gradients = ranked.new_empty((GRADIENT_ROWS, capacity))
    lines = ranked.new_empty((LINE_ROWS, 2 * capacity))
    terms = ranked.new_empty((TERM_ROWS, capacity))
    tile, run = pair_tile(capacity, device)
    unit, _ = reference.fixed_point_unit(delta, reference.count_elements(logits))
    delta_bits, scale_bits = float_bits(delta), float_bits(gradient_scale)
    options = {"IS_STEP": delta == 0, "TILE": tile, "RUN": run, "num_warps": TABLE_WARPS}
    with launching_on(ranked):
        slots, sizes = write_breakpoints(ranked, lines, delta, double)
        if capacity:
            grid = (triton.cdiv(capacity, tile),)
            terms_kernel[grid](
                ranked, bins, lines, slots, sizes, terms, capacity, delta_bits, float_bits(unit), **options
            )
            gradients_kernel[grid](ranked, slots, sizes, terms, gradients, capacity, delta_bits, scale_bits, **options)
            lines_kernel[triton.cdiv(2 * capacity, tile),](
                ranked, slots, sizes, terms, lines, capacity, delta_bits, scale_bits, **options
            )
        losses_kernel[1,](sizes, terms, counts, bins, ranking, sorting, capacity, RUN=run, num_warps=TABLE_WARPS)
    return ranking, sorting, gradients, lines
