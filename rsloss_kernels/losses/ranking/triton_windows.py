"""Windows of the ranked positives as Triton kernels: breakpoints, their slots, and the ranks of every segment.

Every slot comes from a binary search, so no launch depends on the data; the numbers found stay on the device.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsloss_kernels.losses.ranking.triton_common import (
    PLAIN_INTEGERS,
    count_not_above,
    power_up_to,
    segment_ranks,
)
from rsloss_kernels.losses.triton_common import configuration, float_bits, float_of


class Windows(NamedTuple):
    slots: Tensor  # int32 [2, cap] where the lo and the hi of every rank stand among the breakpoints
    sizes: Tensor  # int32 [3] valid positives, the largest power of two up to their number (at least 1), segments with any
    ranges: Tensor | None  # see write_ranges; None: one segment


@triton.jit
def round_up_sum(centre, shift, DOUBLE: tl.constexpr):
    """Smallest value of the arithmetic type that is >= centre + shift in exact arithmetic, as float64."""
    total = centre + shift
    part = total - centre
    error = (centre - (total - part)) + (shift - part)
    if DOUBLE:
        rounded = total
        too_small = error > 0
        bits = rounded.to(tl.int64, bitcast=True)
    else:
        rounded = total.to(tl.float32)
        back = rounded.to(tl.float64)
        too_small = (back < total) | ((back == total) & (error > 0))
        bits = rounded.to(tl.int32, bitcast=True)
    next_bits = tl.where(rounded > 0, bits + 1, tl.where(rounded == 0, bits * 0 + 1, bits - 1))
    above = next_bits.to(rounded.dtype, bitcast=True)
    return tl.where(too_small, above, rounded).to(tl.float64)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def windows_kernel(
    ranked_ptr,
    bounds_ptr,  # [2, capacity] lo and hi of every valid rank
    sizes_ptr,
    capacity,
    delta_bits,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # NaN logits stand last.
    valid = tl.program_id(0) * 0
    end = valid + capacity
    while valid < end:
        middle = (valid + end) // 2
        is_real = tl.abs(tl.load(ranked_ptr + middle)) < float("inf")
        valid = tl.where(is_real, middle + 1, valid)
        end = tl.where(is_real, end, middle)
    if tl.program_id(0) == 0:
        tl.store(sizes_ptr, valid)
        tl.store(sizes_ptr + 1, power_up_to(valid))
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    centre = tl.load(ranked_ptr + rank, mask=rank < valid, other=0.0)
    delta = float_of(delta_bits)
    tl.store(bounds_ptr + rank, round_up_sum(centre, -delta, DOUBLE), mask=rank < valid)
    tl.store(bounds_ptr + capacity + rank, round_up_sum(centre, delta, DOUBLE), mask=rank < valid)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def ranges_kernel(
    keys_ptr,  # [capacity] segment of every rank, ascending; those above num_segments - 1 do not count
    sizes_ptr,  # None: all of `keys`
    ranges_ptr,
    capacity,
    num_segments,
    BLOCK: tl.constexpr,
):
    size = tl.program_id(0) * 0 + capacity
    if sizes_ptr is not None:
        size = tl.load(sizes_ptr)
    top = power_up_to(size)
    segment = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wanted = segment <= num_segments
    none = tl.zeros([BLOCK], tl.int32)
    begin = count_not_above(keys_ptr, 0, segment.to(tl.float64) - 1, size, top, wanted, none)
    if tl.program_id(0) == 0:
        tl.store(ranges_ptr, num_segments.to(tl.int32))
    tl.store(ranges_ptr + segment + 1, begin, mask=wanted)
    if sizes_ptr is not None:
        end = count_not_above(keys_ptr, 0, segment.to(tl.float64), size, top, wanted & (segment < num_segments), none)
        tl.atomic_add(sizes_ptr + 2, tl.sum((end > begin).to(tl.int32)), sem="relaxed")


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def breakpoints_kernel(
    ranked_ptr,
    bounds_ptr,
    sizes_ptr,
    ranges_ptr,
    edges_ptr,  # [2 capacity] all breakpoints ascending inside their segment, padded with +inf
    slots_ptr,
    capacity,
    SEGMENTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    valid = tl.load(sizes_ptr)
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_valid = rank < valid
    segment = rank * 0
    top = tl.load(sizes_ptr + 1)
    if SEGMENTED:
        segment = tl.load(ranked_ptr + 2 * capacity + rank, mask=is_valid, other=0.0).to(tl.int32)
    begin, end = segment_ranks(ranges_ptr, segment, valid, is_valid, SEGMENTED)
    if SEGMENTED:
        top = power_up_to(tl.max(end - begin))
    lo = tl.load(bounds_ptr + rank, mask=is_valid, other=float("inf"))
    hi = tl.load(bounds_ptr + capacity + rank, mask=is_valid, other=float("inf"))
    lo_ptr, hi_ptr, size = bounds_ptr + begin, bounds_ptr + capacity + begin, end - begin
    before_lo = tl.zeros([BLOCK], tl.int32)
    before_hi = tl.zeros([BLOCK], tl.int32)
    step = top
    while step > 0:
        probe = before_lo + step
        inside = is_valid & (probe <= size)
        other_hi = tl.load(hi_ptr + probe - 1, mask=inside, other=0.0)
        before_lo = tl.where(inside & (other_hi < lo), probe, before_lo)
        probe = before_hi + step
        inside = is_valid & (probe <= size)
        other_lo = tl.load(lo_ptr + probe - 1, mask=inside, other=0.0)
        before_hi = tl.where(inside & (other_lo <= hi), probe, before_hi)
        step = step // 2
    lo_slot = rank + tl.where(is_valid, begin + before_lo, rank)
    hi_slot = rank + tl.where(is_valid, begin + before_hi, rank + 1)
    fits = rank < capacity
    tl.store(slots_ptr + rank, lo_slot, mask=fits)
    tl.store(slots_ptr + capacity + rank, hi_slot, mask=fits)
    tl.store(edges_ptr + lo_slot, lo, mask=fits)
    tl.store(edges_ptr + hi_slot, hi, mask=fits)


def write_ranges(keys: Tensor, sizes: Tensor | None, num_segments: int) -> Tensor:
    """int32 [num_segments + 2]: `num_segments`; the first rank of every segment, and the end, from the ascending segments of the ranks."""
    ranges = torch.empty(num_segments + 2, dtype=torch.int32, device=keys.device)
    run = configuration("ranking table", num_segments + 1, keys.device)
    ranges_kernel[triton.cdiv(num_segments + 1, run.block),](keys, sizes, ranges, keys.numel(), num_segments, **run.arguments)
    return ranges


def write_breakpoints(ranked: Tensor, edges: Tensor, num_segments: int, segmented: bool, delta: float, double: bool) -> Windows:
    """Fills `edges` [2 cap] with the breakpoints."""
    capacity, device = ranked.shape[1], ranked.device
    bounds = ranked.new_empty((2, capacity))
    slots = torch.empty((2, capacity), dtype=torch.int32, device=device)
    sizes = torch.zeros(3, dtype=torch.int32, device=device)
    run = configuration("ranking table", capacity, device)
    # One program at least, for the sizes.
    grid = (max(1, triton.cdiv(capacity, run.block)),)
    options = run.arguments
    windows_kernel[grid](ranked, bounds, sizes, capacity, float_bits(delta), **options, DOUBLE=double)
    ranges = write_ranges(ranked[2], sizes, num_segments) if segmented else None
    breakpoints_kernel[grid](ranked, bounds, sizes, ranges, edges, slots, capacity, **options, SEGMENTED=segmented)
    return Windows(slots, sizes, ranges)
