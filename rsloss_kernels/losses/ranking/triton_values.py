"""Many 16-bit logits of one segment, by value: at most 65,536 of them, so that counting replaces the search for every element.

    value_histogram   counts the negatives of every value from the first breakpoint on, a quarter of the values per program
    value_bins        adds the count of a value to its bin, and as many times its offset: the same integers as one by one
    value_table       the gradient of a negative of every value
    value_gradient    looks the gradients of the elements up

A program keeps its counts in registers and `tl.histogram` those of one block in shared memory, which holds a quarter of the values.
The look-up reads the table through the cache: for `tl.gather` every block would store the whole table to shared memory first, which is
more than what it looks up, and more than an Ampere or a consumer GPU has.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from rsloss_kernels.losses.ranking.triton_common import (
    PLAIN_INTEGERS,
    count_not_above,
    read_negatives,
    segment_form,
)
from rsloss_kernels.losses.ranking.triton_lines import add_to_bins, line_gradient
from rsloss_kernels.losses.triton_common import configuration, rounded_to

VALUES = 1 << 16
QUARTER = VALUES // 4
# Below this the tables of values cost more than the searches. Counters have 32 bits. The same on both paths bit for bit, so that
# processes of a group need not agree on one.
FEWEST_BY_VALUE = 1 << 20


def is_by_value(logits: list[Tensor], segments: Tensor | None, num_segments: int) -> bool:
    elements = sum(level.numel() for level in logits)
    is_whole = segment_form(segments, num_segments) == "whole"
    return is_whole and logits[0].element_size() == 2 and FEWEST_BY_VALUE <= elements < 1 << 32


@triton.jit
def key_of(bits):
    """int32 within [0, 65536) that ascends with the value, from the 16 bits of it."""
    return tl.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000)


@triton.jit
def value_of(key, TYPE: tl.constexpr):
    """The value of a key, as float32."""
    bits = tl.where(key < 0x8000, 0xFFFF - key, key - 0x8000)
    return bits.to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def value_histogram_kernel(
    logits_ptr,
    negatives_ptr,
    edges_ptr,
    sizes_ptr,
    histogram_ptr,  # int32 [65536], the bits of uint32
    bins_ptr,  # int64 [1]: NaN negatives
    size,
    QUARTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first_key = tl.program_id(1) * QUARTER
    # Without positives nothing is at or above a breakpoint, not even +inf.
    lowest = tl.load(edges_ptr, mask=tl.load(sizes_ptr) > 0, other=float("nan"))
    # False for the last quarter, whose end is NaN.
    is_below = value_of(first_key + QUARTER - 1, logits_ptr.dtype.element_ty) < lowest
    byte = tl.arange(0, BLOCK // 8)
    lane = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    counts = tl.zeros([QUARTER], tl.int32)
    nans = tl.zeros([BLOCK // 8, 8], tl.int32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    # The first quarter counts the NaN too.
    start = tl.where(is_below & (first_key > 0), size, start)
    while start < size:
        is_negative = read_negatives(negatives_ptr, start, byte, size)
        logit = tl.load(logits_ptr + start + lane, mask=lane < size - start, other=0.0)
        value = logit.to(tl.float32)
        nans += (is_negative & (value != value)).to(tl.int32)
        place = key_of(logit.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) - first_key
        wanted = is_negative & (value >= lowest) & (place >= 0) & (place < QUARTER)
        place = tl.where(wanted, place, 0)
        counts += tl.histogram(tl.reshape(place, [BLOCK]), QUARTER, mask=tl.reshape(wanted, [BLOCK]))
        start += tl.num_programs(0).to(tl.int64) * BLOCK
    tl.atomic_add(histogram_ptr + first_key + tl.arange(0, QUARTER), counts, mask=counts != 0, sem="relaxed")
    total = tl.sum(nans)
    tl.atomic_add(bins_ptr, total.to(tl.int64), mask=(total > 0) & (first_key == 0), sem="relaxed")


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def value_bins_kernel(
    histogram_ptr,
    logits_ptr,  # none of them is read: their type
    edges_ptr,
    sizes_ptr,
    counts_ptr,
    copies_ptr,  # int64 [2, 2 valid + 1] and more
    exponent,
    IS_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(histogram_ptr + key).to(tl.uint32, bitcast=True).to(tl.int64)
    value = value_of(key, logits_ptr.dtype.element_ty)
    used = 2 * tl.load(sizes_ptr)
    none = tl.zeros([BLOCK], tl.int32)
    index = count_not_above(edges_ptr, 0, value, used, 2 * tl.load(sizes_ptr + 1), count > 0, none)
    wanted = (count > 0) & (index > 0)
    add_to_bins(copies_ptr, used, counts_ptr, edges_ptr, index, value, count, wanted, exponent, False, IS_STEP)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def value_table_kernel(
    edges_ptr,
    lines_ptr,
    counts_ptr,
    grad_first_ptr,
    table_ptr,  # [65536] in the type of the logits, by the 16 bits of a value
    capacity,
    top,
    BLOCK: tl.constexpr,
):
    bits = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = bits.to(tl.int16).to(table_ptr.dtype.element_ty, bitcast=True).to(tl.float32)
    none = tl.zeros([BLOCK], tl.int32)
    index = count_not_above(edges_ptr, 0, value, 2 * capacity, top, bits >= 0, none) - 1
    gradient = line_gradient(value, index, bits >= 0, edges_ptr, lines_ptr, counts_ptr, grad_first_ptr, capacity)
    tl.store(table_ptr + bits, rounded_to(gradient, table_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def value_gradient_kernel(
    logits_ptr,
    negatives_ptr,
    table_ptr,
    counts_ptr,
    results_ptr,
    size,
    capacity,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    byte = tl.arange(0, BLOCK // 8)
    lane = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = lane < size - start
    is_negative = read_negatives(negatives_ptr, start, byte, size)
    bits = tl.load(logits_ptr + start + lane, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    # Of no negative: 0, after an overflow NaN as everywhere.
    other = tl.where(tl.load(counts_ptr) > capacity, float("nan"), 0.0)
    gradient = tl.load(table_ptr + bits, mask=is_negative, other=0.0)
    gradient = tl.where(is_negative, gradient, rounded_to(other.to(tl.float64), results_ptr.dtype.element_ty))
    tl.store(results_ptr + start + lane, gradient, mask=inside)


def bin_by_value(logits, negatives, edges, sizes, counts, copies, exponent: int, is_step: bool) -> None:
    """Adds the negatives to the first of the copies of the bins, which are 0."""
    device = edges.device
    histogram = torch.zeros(VALUES, dtype=torch.int32, device=device)
    first_byte = 0
    for level in logits:
        size, run = level.numel(), configuration("ranking values", level.numel(), device)
        if size:
            programs = min(triton.cdiv(size, run.block), run.programs)
            value_histogram_kernel[programs, VALUES // QUARTER](
                *(level, negatives[first_byte:], edges, sizes, histogram, copies, size), QUARTER=QUARTER, **run.arguments
            )
        first_byte += (size + 63) // 64 * 8
    run = configuration("ranking table", VALUES, device)
    value_bins_kernel[VALUES // run.block,](
        *(histogram, logits[0], edges, sizes, counts, copies, exponent), IS_STEP=is_step, **run.arguments
    )


def look_up(logits, negatives, edges, lines, counts, grad_first, results, capacity: int, top: int) -> None:
    """Writes the gradient of every element but the positives."""
    device = lines.device
    table = torch.empty(VALUES, dtype=logits[0].dtype, device=device)
    run = configuration("ranking table", VALUES, device)
    value_table_kernel[VALUES // run.block,](edges, lines, counts, grad_first, table, capacity, top, **run.arguments)
    first_byte = 0
    for level, result in zip(logits, results, strict=True):
        size, run = level.numel(), configuration("ranking stream", level.numel(), device)
        if size:
            value_gradient_kernel[triton.cdiv(size, run.block),](
                *(level, negatives[first_byte:], table, counts, result, size, capacity), **run.arguments
            )
        first_byte += (size + 63) // 64 * 8
