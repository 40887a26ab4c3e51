"""What the last operators of all ranking losses share, as Triton kernels: float64 inside, every sum over positives and over
bins by comparing pairs.

Launches: breakpoints (two, three with segments); the false positives of every positive; the loss's own terms; gradients of the
positives; lines of the negatives; the losses. A sum over pairs takes about P^2 steps, needs no float prefix sums (so it has a
fixed order, no far origin and no cancellation), and ends at the number of positives, which stays on the device. Layouts:
README.md beside this file.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsloss_kernels.losses.ranking import reference
from rsloss_kernels.losses.ranking.op import GRADIENT_ROWS, LINE_ROWS
from rsloss_kernels.losses.ranking.triton_common import (
    PLAIN_INTEGERS,
    count_not_above,
    offset_bits,
    segment_form,
    segment_ranks,
    width_exponent,
)
from rsloss_kernels.losses.ranking.triton_windows import write_breakpoints
from rsloss_kernels.losses.triton_common import configuration, float_bits, float_of, launching_on, power_of_two

# Rows of the table between the kernels, by rank. A loss reads the first and writes the others: its terms of the mean, the share
# of the error that a negative takes per unit of H, the gradients of the positive before scaling, and one row for its own use.
TERM_ROWS = 7
FALSE_POSITIVES = tl.constexpr(0)
FIRST_VALUE = tl.constexpr(1)
SECOND_VALUE = tl.constexpr(2)
COEFFICIENT = tl.constexpr(3)
FIRST_GRADIENT = tl.constexpr(4)
SECOND_GRADIENT = tl.constexpr(5)
OWN = tl.constexpr(6)


class Tables(NamedTuple):
    """The first arguments of every kernel over pairs of positives."""

    ranked: Tensor  # [4, cap]
    slots: Tensor  # int32 [2, cap]
    sizes: Tensor  # int32 [3]
    ranges: Tensor | None  # see write_ranges
    terms: Tensor  # [TERM_ROWS, cap]
    capacity: int
    delta_bits: int


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


@triton.jit
def ranks_of_segment(ranked_ptr, ranges_ptr, rank, valid, capacity, SEGMENTED: tl.constexpr):
    """The ranks [begin, end) of the segment of every rank, 0 for ranks without one."""
    segment = rank * 0
    is_valid = (rank >= 0) & (rank < valid)
    if SEGMENTED:
        segment = tl.load(ranked_ptr + 2 * capacity + rank, mask=is_valid, other=0.0).to(tl.int32)
    return segment_ranks(ranges_ptr, segment, valid, is_valid, SEGMENTED)


@triton.jit
def share_of_positive(begin, end, sizes_ptr, SEGMENTED: tl.constexpr):
    """What the loss is divided by for a positive: positives of its segment times segments that hold any."""
    positives = tl.maximum(end - begin, 1).to(tl.float64)
    if SEGMENTED:
        positives *= tl.maximum(tl.load(sizes_ptr + 2), 1).to(tl.float64)
    return positives


@triton.jit
def load_tile(ranked_ptr, slots_ptr, ranges_ptr, first, valid, capacity, TILE: tl.constexpr, SEGMENTED: tl.constexpr):
    """Of the ranks from `first` on, which is below `valid`: the rank, whether it is valid, its logit, its segment's ranks; and
    the range of ranks that can lie above any of their windows' left ends."""
    rank = first + tl.arange(0, TILE)
    is_valid = rank < valid
    centre = tl.load(ranked_ptr + rank, mask=is_valid, other=0.0)
    begin, end = ranks_of_segment(ranked_ptr, ranges_ptr, rank, valid, capacity, SEGMENTED)
    # Positives of the first one's segment whose window ends below its window lie below it too.
    start = tl.load(slots_ptr + first) - first
    return rank, is_valid, centre, begin, end, start, tl.max(end)


@triton.jit
def steps_of_run(ranked_ptr, other, stop, centre, begin, end, per_width, IS_STEP: tl.constexpr, SEGMENTED: tl.constexpr):
    """H(s_j - s_i) of the positives j = `other` [RUN] seen from i [TILE]; 0 outside i's segment and from `stop` on."""
    is_other = other < stop
    other_centre = tl.load(ranked_ptr + other, mask=is_other, other=0.0)[None, :]
    is_above = is_other[None, :]
    if SEGMENTED:
        is_above = is_above & (other[None, :] >= begin[:, None]) & (other[None, :] < end[:, None])
    return tl.where(is_above, window_step(other_centre - centre[:, None], per_width, IS_STEP), 0.0)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def false_positives_kernel(
    ranked_ptr,
    slots_ptr,
    sizes_ptr,
    ranges_ptr,
    terms_ptr,
    capacity,
    delta_bits,
    exponent,
    bins_ptr,  # [2, 2 capacity + 1]
    edges_ptr,  # [2 capacity]
    counts_ptr,
    DOUBLE: tl.constexpr,
    IS_STEP: tl.constexpr,
    SEGMENTED: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
):
    """FP_i as a sum of its own over the bins of its window: nothing far away or large is added that would have to cancel."""
    valid = tl.load(sizes_ptr)
    first = tl.program_id(0) * TILE
    if first < valid:
        per_width = inverse_width(delta_bits, IS_STEP)
        bits = offset_bits(counts_ptr, DOUBLE)
        unit = power_of_two(exponent - bits)
        rank = first + tl.arange(0, TILE)
        is_valid = rank < valid
        centre = tl.load(ranked_ptr + rank, mask=is_valid, other=0.0)[:, None]
        _, end = ranks_of_segment(ranked_ptr, ranges_ptr, rank, valid, capacity, SEGMENTED)
        stop = 2 * tl.max(end)
        end_slot = 2 * end[:, None]
        lo_slot = tl.load(slots_ptr + rank, mask=is_valid, other=0)[:, None]
        hi_slot = tl.load(slots_ptr + capacity + rank, mask=is_valid, other=0)[:, None]
        last_slot = tl.load(slots_ptr + capacity + tl.minimum(first + TILE, valid) - 1)

        # Bins from the first window on: in a window by its line, right of it in full.
        above = tl.zeros([TILE, RUN], tl.float64)
        slot_start = tl.load(slots_ptr + first)
        while slot_start < last_slot:
            slot = slot_start + tl.arange(0, RUN)
            is_bin = slot < stop
            count = tl.load(bins_ptr + 1 + slot, mask=is_bin, other=0).to(tl.float64)
            edge = tl.load(edges_ptr + slot, mask=is_bin & (count > 0), other=0.0)[None, :]
            fixed = tl.load(bins_ptr + 2 * capacity + 2 + slot, mask=is_bin, other=0).to(tl.float64)
            slot = slot[None, :]
            if not IS_STEP:
                moment = count[None, :] * (edge - centre) + (fixed * unit)[None, :]
                partial = tl.maximum(0.5 * count[None, :] + moment * per_width, 0.0)
                is_open = (slot >= lo_slot) & (slot < hi_slot) & (count > 0)[None, :]
                above += tl.where(is_open, partial, 0.0)
            is_beyond = slot >= hi_slot
            if SEGMENTED:
                is_beyond = is_beyond & (slot < end_slot)
            above += tl.where(is_beyond, count[None, :], 0.0)
            slot_start += RUN
        # The rest belongs to the last segment alone.
        beyond = tl.zeros([RUN], tl.float64)
        while slot_start < stop:
            slot = slot_start + tl.arange(0, RUN)
            beyond += tl.load(bins_ptr + 1 + slot, mask=slot < stop, other=0).to(tl.float64)
            slot_start += RUN
        total = tl.sum(above, 1) + tl.where(2 * end == stop, tl.sum(beyond, 0), 0.0)
        tl.store(terms_ptr + FALSE_POSITIVES * capacity + rank, total, mask=is_valid)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def gradients_kernel(
    ranked_ptr,
    sizes_ptr,
    ranges_ptr,
    terms_ptr,
    counts_ptr,
    gradients_ptr,  # [4, capacity]
    statistic_ptr,  # [capacity], from the row OWN; None: the loss has none
    capacity,
    num_segments,
    scale_bits,
    HAS_SECOND: tl.constexpr,
    SEGMENTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    valid = tl.load(sizes_ptr)
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_valid = rank < valid
    fits = rank < capacity
    begin, end = ranks_of_segment(ranked_ptr, ranges_ptr, rank, valid, capacity, SEGMENTED)
    scale = float_of(scale_bits) / share_of_positive(begin, end, sizes_ptr, SEGMENTED)
    if_invalid = tl.where(rank < tl.load(counts_ptr), float("nan"), 0.0)
    first = tl.load(terms_ptr + FIRST_GRADIENT * capacity + rank, mask=is_valid, other=0.0) * scale
    second = tl.zeros([BLOCK], tl.float64)
    if HAS_SECOND:
        second = tl.load(terms_ptr + SECOND_GRADIENT * capacity + rank, mask=is_valid, other=0.0) * scale
        second = tl.where(is_valid, second, if_invalid)
    index = tl.load(ranked_ptr + 3 * capacity + rank, mask=fits, other=-1.0)
    segment = tl.load(ranked_ptr + 2 * capacity + rank, mask=is_valid, other=0.0)
    tl.store(gradients_ptr + rank, index, mask=fits)
    tl.store(gradients_ptr + capacity + rank, tl.where(is_valid, first, if_invalid), mask=fits)
    tl.store(gradients_ptr + 2 * capacity + rank, second, mask=fits)
    tl.store(gradients_ptr + 3 * capacity + rank, tl.where(is_valid, segment, num_segments.to(tl.float64)), mask=fits)
    if statistic_ptr is not None:
        statistic = tl.load(terms_ptr + OWN * capacity + rank, mask=is_valid, other=0.0)
        tl.store(statistic_ptr + rank, tl.where(is_valid, statistic, if_invalid), mask=fits)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def lines_kernel(
    ranked_ptr,
    slots_ptr,
    sizes_ptr,
    ranges_ptr,
    terms_ptr,
    capacity,
    delta_bits,
    scale_bits,
    lines_ptr,  # [3, 2 capacity]; the breakpoints of row 0 are read, rows 1 and 2 written
    IS_STEP: tl.constexpr,
    SEGMENTED: tl.constexpr,
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
    # The padding takes the last line.
    begin, end = ranks_of_segment(ranked_ptr, ranges_ptr, tl.minimum(slot // 2, valid - 1), valid, capacity, SEGMENTED)
    # Windows of the ranks below `closed` end at or left of all these slots, those from `opened` on start right of them.
    closed = count_not_above(slots_ptr, capacity, first, valid, top, first >= 0, first * 0)
    opened = count_not_above(slots_ptr, 0, first + TILE - 1, valid, top, first >= 0, first * 0)
    below = tl.zeros([RUN], tl.float64)
    start = tl.min(begin)
    first_begin = start
    while start < closed:
        rank = start + tl.arange(0, RUN)
        below += tl.load(terms_ptr + COEFFICIENT * capacity + rank, mask=rank < closed, other=0.0)
        start += RUN
    value = tl.zeros([TILE, RUN], tl.float64)
    slope = tl.zeros([TILE, RUN], tl.float64)
    start = closed
    while start < opened:
        rank = start + tl.arange(0, RUN)
        is_rank = rank < opened
        centre = tl.load(ranked_ptr + rank, mask=is_rank, other=0.0)[None, :]
        coefficient = tl.load(terms_ptr + COEFFICIENT * capacity + rank, mask=is_rank, other=0.0)[None, :]
        lo_slot = tl.load(slots_ptr + rank, mask=is_rank, other=0)[None, :]
        hi_slot = tl.load(slots_ptr + capacity + rank, mask=is_rank, other=0)[None, :]
        is_closed = slot[:, None] >= hi_slot
        is_open = (slot[:, None] >= lo_slot) & (is_closed == 0)
        if SEGMENTED:
            is_closed = is_closed & (rank[None, :] >= begin[:, None])
        value += tl.where(is_closed, coefficient, 0.0)
        if not IS_STEP:
            value += tl.where(is_open, coefficient * window_step(edge - centre, per_width, IS_STEP), 0.0)
            slope += tl.where(is_open, coefficient * per_width, 0.0)
        start += RUN
    scale = float_of(scale_bits) / share_of_positive(begin, end, sizes_ptr, SEGMENTED)
    # Of the closed ranks only the first slot's segment has any.
    total = tl.sum(value, 1) + tl.where(begin == first_begin, tl.sum(below, 0), 0.0)
    tl.store(lines_ptr + 2 * capacity + slot, total * scale, mask=fits)
    tl.store(lines_ptr + 4 * capacity + slot, tl.sum(slope, 1) * scale, mask=fits)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def losses_kernel(
    ranked_ptr,
    sizes_ptr,
    ranges_ptr,
    terms_ptr,
    counts_ptr,
    bins_ptr,
    first_ptr,
    second_ptr,  # None: there is one loss
    capacity,
    SEGMENTED: tl.constexpr,
    RUN: tl.constexpr,
):
    valid = tl.load(sizes_ptr)
    first = tl.zeros([RUN], tl.float64)
    second = tl.zeros([RUN], tl.float64)
    start = valid * 0
    while start < valid:
        rank = start + tl.arange(0, RUN)
        share = tl.full([RUN], 1.0, tl.float64)
        if SEGMENTED:
            begin, end = ranks_of_segment(ranked_ptr, ranges_ptr, rank, valid, capacity, SEGMENTED)
            share = tl.maximum(end - begin, 1).to(tl.float64)
        first += tl.load(terms_ptr + FIRST_VALUE * capacity + rank, mask=rank < valid, other=0.0) / share
        if second_ptr is not None:
            second += tl.load(terms_ptr + SECOND_VALUE * capacity + rank, mask=rank < valid, other=0.0) / share
        start += RUN
    number = tl.load(sizes_ptr + 2) if SEGMENTED else valid
    number = tl.maximum(number, 1).to(tl.float64)
    # More positives than slots, an invalid positive, or a NaN negative.
    found = tl.load(counts_ptr)
    is_broken = (found > capacity) | (found > valid) | (tl.load(bins_ptr) > 0)
    loss = tl.where(is_broken, float("nan"), tl.sum(first, 0) / number)
    tl.store(first_ptr, loss.to(first_ptr.dtype.element_ty))
    if second_ptr is not None:
        loss = tl.where(is_broken, float("nan"), tl.sum(second, 0) / number)
        tl.store(second_ptr, loss.to(second_ptr.dtype.element_ty))


def finalize(
    logits: list[Tensor],
    ranked: Tensor,
    counts: Tensor,
    bins: Tensor,
    segments: Tensor | None,
    num_segments: int,
    delta: float,
    gradient_scale: float,
    write_terms: Callable[[tuple[int], Tables, dict], None],
    num_losses: int = 1,
    has_statistic: bool = False,
) -> tuple[Tensor, ...]:
    """Everything but a loss's own mathematics. Returns its losses, its statistic if it has one, `gradients` and `lines`.

    write_terms: launches the loss's own kernels on a grid over tiles of positives, with the tables as first arguments and the
        constants. They read the row FALSE_POSITIVES of the terms and write FIRST_VALUE, COEFFICIENT, FIRST_GRADIENT, with two
        losses SECOND_VALUE and SECOND_GRADIENT, with a statistic OWN.
    """
    dtype = reference.arithmetic_type(logits[0].dtype)
    double = dtype == torch.float64
    ranked, bins = ranked.contiguous(), bins.contiguous()
    capacity, device = ranked.shape[1], ranked.device
    segmented = segment_form(segments, num_segments) != "whole"
    losses = [torch.empty((), dtype=dtype, device=device) for _ in range(num_losses)]
    statistic = [ranked.new_empty((capacity,)) for _ in range(has_statistic)]
    gradients = ranked.new_empty((GRADIENT_ROWS, capacity))
    lines = ranked.new_empty((LINE_ROWS, 2 * capacity))
    terms = ranked.new_empty((TERM_ROWS, capacity))
    pairs = configuration("ranking pairs", capacity, device)
    scale_bits = float_bits(gradient_scale)
    options = {"IS_STEP": delta == 0, "TILE": pairs.rows, "RUN": pairs.block, "SEGMENTED": segmented, **pairs.options}
    with launching_on(ranked):
        windows = write_breakpoints(ranked, lines, num_segments, segmented, delta, double)
        tables = Tables(ranked, *windows, terms, capacity, float_bits(delta))
        if capacity:
            grid = (triton.cdiv(capacity, pairs.rows),)
            false_positives_kernel[grid](*tables, width_exponent(delta), bins, lines, counts, DOUBLE=double, **options)
            write_terms(grid, tables, options)
            run = configuration("ranking table", capacity, device)
            gradients_kernel[triton.cdiv(capacity, run.block),](
                *(ranked, windows.sizes, windows.ranges, terms, counts, gradients, statistic[0] if statistic else None),
                *(capacity, num_segments, scale_bits),
                **{"HAS_SECOND": num_losses == 2, "SEGMENTED": segmented, **run.arguments},
            )
            lines_kernel[triton.cdiv(2 * capacity, pairs.rows),](*tables, scale_bits, lines, **options)
        of_losses = configuration("ranking losses", capacity, device)
        losses_kernel[1,](
            *(ranked, windows.sizes, windows.ranges, terms, counts, bins, losses[0], losses[1] if num_losses == 2 else None),
            *(capacity,),
            **{"RUN": of_losses.block, "SEGMENTED": segmented, **of_losses.options},
        )
    return *losses, *statistic, gradients, lines
