"""`ranking_bin` as Triton kernels: ranks by comparing all pairs of positives, slots of the breakpoints by binary search, then
one pass over the logits with integer atomics into copies of the bins. Many 16-bit logits: triton_values.py.
"""
import torch
import triton
import triton.language as tl

from rsloss_kernels.losses.ranking import reference
from rsloss_kernels.losses.ranking.triton_common import (
    PLAIN_INTEGERS,
    arithmetic,
    count_not_above,
    power_up_to,
    read_negatives,
    segment_arguments,
    segment_form,
    segment_of,
    segment_ranks,
    width_exponent,
)
from rsloss_kernels.losses.ranking.triton_lines import add_to_bins
from rsloss_kernels.losses.ranking.triton_values import bin_by_value, is_by_value
from rsloss_kernels.losses.ranking.triton_windows import write_breakpoints
from rsloss_kernels.losses.triton_common import configuration, launching_on

# Copies of the bins share this many entries of a count and a sum, where the positives are few and so the bins contended.
SHARED_BINS = 1 << 14
MAX_COPIES = 64
# Added to the segment of an invalid positive, which is ranked behind all valid ones.
BEHIND = tl.constexpr(4294967296.0)


@triton.jit
def load_keys(positives_ptr, slot, exists, capacity, SEGMENTED: tl.constexpr):
    """The keys of the order: (segment, validity), logit, quality, flat index."""
    logit = tl.load(positives_ptr + slot, mask=exists, other=float("nan"))
    quality = tl.load(positives_ptr + capacity + slot, mask=exists, other=0.0)
    index = tl.load(positives_ptr + 3 * capacity + slot, mask=exists, other=-1.0)
    group = tl.where(logit == logit, 0.0, BEHIND)
    if SEGMENTED:
        group += tl.load(positives_ptr + 2 * capacity + slot, mask=exists, other=0.0)
    logit = tl.where(logit == logit, logit, float("inf"))
    return group, logit, tl.where(quality == quality, quality, float("inf")), index


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def rank_kernel(
    positives_ptr, counts_ptr, ranked_ptr, capacity, SEGMENTED: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr
):
    """Moves the records in the order of (segment, logit, quality, flat index); NaN logits last."""
    found = tl.minimum(tl.load(counts_ptr), capacity).to(tl.int32)
    first = tl.program_id(0) * TILE
    slot = first + tl.arange(0, TILE)
    exists = slot < found
    group, logit, quality, index = load_keys(positives_ptr, slot, exists, capacity, SEGMENTED)
    group, logit, quality, index = group[:, None], logit[:, None], quality[:, None], index[:, None]
    before = tl.zeros([TILE, RUN], tl.int32)
    start = tl.where(first < found, 0, found)
    while start < found:
        other = start + tl.arange(0, RUN)
        is_other = other < found
        other_group, other_logit, other_quality, other_index = load_keys(positives_ptr, other, is_other, capacity, SEGMENTED)
        other_group, other_logit = other_group[None, :], other_logit[None, :]
        other_quality, other_index = other_quality[None, :], other_index[None, :]
        is_first = (other_quality < quality) | ((other_quality == quality) & (other_index < index))
        is_first = (other_logit < logit) | ((other_logit == logit) & is_first)
        is_first = (other_group < group) | ((other_group == group) & is_first)
        before += (is_first & is_other[None, :]).to(tl.int32)
        start += RUN
    rank = tl.where(exists, tl.sum(before, 1), slot)
    fits = slot < capacity
    for row in tl.static_range(4):
        value = tl.load(positives_ptr + row * capacity + slot, mask=fits)
        tl.store(ranked_ptr + row * capacity + rank, value, mask=fits)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def bin_kernel(
    logits_ptr,
    negatives_ptr,
    segments_ptr,
    edges_ptr,
    sizes_ptr,
    ranges_ptr,
    counts_ptr,
    copies_ptr,  # int64 [entries]: copies of [2, 2 valid + 1], counts and fixed-point sums
    size,
    entries,
    period,
    shift,
    num_segments,
    exponent,  # of the smallest power of two that is >= 2 delta
    DOUBLE: tl.constexpr,
    IS_STEP: tl.constexpr,
    FORM: tl.constexpr,
    MAX_COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    byte = tl.arange(0, BLOCK // 8)
    lane = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    is_negative = read_negatives(negatives_ptr, start, byte, size)
    value = arithmetic(tl.load(logits_ptr + start + lane, mask=lane < size - start, other=0.0), DOUBLE)
    used = 2 * tl.load(sizes_ptr)
    copies = tl.minimum(entries // (2 * (used + 1)), MAX_COPIES)
    bins_ptr = copies_ptr + tl.program_id(0) % copies * (2 * (used + 1))

    nans = tl.sum((is_negative & (value != value)).to(tl.int32))
    tl.atomic_add(bins_ptr, nans.to(tl.int64), mask=nans > 0, sem="relaxed")
    # Without positives nothing is at or above a breakpoint, not even +inf.
    if FORM == "whole":
        first_slot, slots, top = 0, used, 2 * tl.load(sizes_ptr + 1)
        lowest = tl.load(edges_ptr, mask=used > 0, other=float("nan"))
    else:
        segment = segment_of(segments_ptr, start, lane, is_negative, period, shift, num_segments, FORM)
        begin, end = segment_ranks(ranges_ptr, segment, used, segment >= 0, True)
        first_slot, slots, top = 2 * begin, 2 * (end - begin), 2 * power_up_to(tl.max(end - begin))
        lowest = tl.load(edges_ptr + first_slot, mask=slots > 0, other=float("nan"))
    wanted = is_negative & (value >= lowest)
    none = tl.zeros([BLOCK // 8, 8], tl.int32)
    index = first_slot + count_not_above(edges_ptr, first_slot, value, slots, top, wanted, none)
    one = tl.full([BLOCK // 8, 8], 1, tl.int64)
    add_to_bins(bins_ptr, used, counts_ptr, edges_ptr, index, value, one, wanted, exponent, DOUBLE, IS_STEP)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def sum_copies_kernel(
    copies_ptr,
    sizes_ptr,
    bins_ptr,  # [2, 2 capacity + 1]
    capacity,
    entries,
    MAX_COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    width = 2 * tl.load(sizes_ptr) + 1
    copies = tl.minimum(entries // (2 * width), MAX_COPIES)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1)
    total = tl.zeros([BLOCK], tl.int64)
    copy = tl.program_id(0) * 0
    while copy < copies:
        total += tl.load(copies_ptr + (2 * copy + row) * width + index, mask=index < width, other=0)
        copy += 1
    tl.store(bins_ptr + row * (2 * capacity + 1) + index, total, mask=index < 2 * capacity + 1)


def ranking_bin(logits, negatives, positives, counts, segments, num_segments, delta):
    device = positives.device
    capacity = positives.shape[1]
    arithmetic_type = reference.arithmetic_type(logits[0].dtype)
    double = arithmetic_type == torch.float64
    segmented = segment_form(segments, num_segments) != "whole"
    logits, positives = [level.contiguous() for level in logits], positives.contiguous()
    ranked = torch.empty_like(positives)
    bins = torch.empty((2, 2 * capacity + 1), dtype=torch.int64, device=device)
    edges = torch.empty(2 * capacity, dtype=arithmetic_type, device=device)
    entries = 2 * max(2 * capacity + 1, SHARED_BINS if device.type == "cuda" else 0)
    copies = torch.zeros(entries, dtype=torch.int64, device=device)
    with launching_on(positives):
        if capacity:
            pairs = configuration("ranking pairs", capacity, device)
            rank_kernel[triton.cdiv(capacity, pairs.rows),](
                *(positives, counts, ranked, capacity), SEGMENTED=segmented, TILE=pairs.rows, RUN=pairs.block, **pairs.options
            )
        _, sizes, ranges = write_breakpoints(ranked, edges, num_segments, segmented, delta, double)
        by_value = is_by_value(logits, segments, num_segments)
        if by_value:
            bin_by_value(logits, negatives, edges, sizes, counts, copies, width_exponent(delta), delta == 0)
        first_byte = 0
        for level, in_segments in zip(logits, segment_arguments(logits, segments, num_segments), strict=True):
            size, run = level.numel(), configuration("ranking search", level.numel(), device)
            if size and not by_value:
                bin_kernel[triton.cdiv(size, run.block),](
                    logits_ptr=level,
                    negatives_ptr=negatives[first_byte:],
                    edges_ptr=edges,
                    sizes_ptr=sizes,
                    ranges_ptr=ranges,
                    counts_ptr=counts,
                    copies_ptr=copies,
                    size=size,
                    entries=entries,
                    exponent=width_exponent(delta),
                    **{"DOUBLE": double, "IS_STEP": delta == 0, "MAX_COPIES": MAX_COPIES},
                    **in_segments,
                    **run.arguments,
                )
            first_byte += (size + 63) // 64 * 8
        run = configuration("ranking table", 2 * capacity + 1, device)
        sum_copies_kernel[triton.cdiv(2 * capacity + 1, run.block), 2](
            copies, sizes, bins, capacity, entries, MAX_COPIES=MAX_COPIES, **run.arguments
        )
    return ranked, bins
