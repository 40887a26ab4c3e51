"""The shared ranking operators as Triton kernels: CUDA tensors, and CPU tensors under TRITON_INTERPRET=1.

Collect: a pass over the targets writes the bit mask and the counts of every block; their prefix sum gives each block its
slots, and a second pass over the blocks that hold positives writes the records in flat order. Bin: ranks by comparing all
pairs of positives, slots of the breakpoints by binary search, then one pass over the logits with integer atomics into
copies of the bins. Backward: one pass over the logits, then one over the positives. Loops over positives end at their
number, which stays on the device: no launch depends on the data. Sums of floats have a fixed order. Layouts and derivation:
README.md beside this file.
"""
import struct
import threading
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsloss_kernels.losses.ranking import reference
from rsloss_kernels.losses.ranking.op import RECORD_ROWS, mask_bytes

# Elements of one program of a pass over the logits; (positives, partners at a time) of one program over pairs; entries of one
# program over a table. The interpreter pays per program, a GPU for idle processors; on it a pass over
# blocks of 2048 would spill registers.
STREAM_BLOCK = {"cuda": 1024, "cpu": 1 << 16}
PAIR_TILE = {"cuda": (8, 128), "cpu": (256, 256)}
TABLE_BLOCK = {"cuda": 256, "cpu": 1 << 12}
STREAM_WARPS, TABLE_WARPS = 4, 8

# Copies of the bins share this many entries of a count and a sum, where the positives are few and so the bins contended.
SHARED_BINS = 1 << 14
MAX_COPIES = 64

# Arguments that change from call to call without a gain from code of their own. Floats travel as the bits of a float64,
# because Triton passes a Python float as a float32.
PLAIN_INTEGERS = ("capacity", "top", "first_block", "offset", "entries", "delta_bits", "scale_bits", "most_bits")


def float_bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


# The interpreter swaps functions of triton.language while a kernel runs: one thread at a time.
_interpreter = threading.RLock()


def launching_on(tensor: Tensor) -> AbstractContextManager:
    """The context that kernels must be launched in: the device of `tensor`; on a CPU, the interpreter to oneself."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _interpreter


def stream_block(elements: int, device: torch.device) -> int:
    return _fitting(STREAM_BLOCK, elements, device)


def table_block(capacity: int, device: torch.device) -> int:
    return _fitting(TABLE_BLOCK, capacity, device)


def _fitting(table: dict[str, int], size: int, device: torch.device) -> int:
    """The block of the device; on a CPU no larger than the work."""
    block = table[device.type]
    return block if device.type == "cuda" else min(block, max(64, triton.next_power_of_2(size)))


def pair_tile(capacity: int, device: torch.device) -> tuple[int, int]:
    tile, run = PAIR_TILE[device.type]
    if device.type == "cuda":
        return tile, run
    fitting = max(16, triton.next_power_of_2(capacity))
    return min(tile, fitting), min(run, fitting)


def largest_power_of_two(size: int) -> int:
    return 1 << (max(size, 1).bit_length() - 1)


@triton.jit
def float_of(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def arithmetic(value, DOUBLE: tl.constexpr):
    if DOUBLE:
        return value.to(tl.float64)
    else:
        return value.to(tl.float32)


@triton.jit
def rounded_to(value, TYPE: tl.constexpr):
    """float64 values in a floating type, to the nearest. bfloat16 by hand: the interpreter would cut bits off."""
    if TYPE == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(value == value, nearest, 0x7FC0)
        return nearest.to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif TYPE == tl.float16:
        return value.to(tl.float32).to(tl.float16)
    else:
        return value.to(TYPE)


@triton.jit
def count_not_above(table_ptr, value, size, top, wanted, count):
    """Number of entries of the ascending table[:size] that are <= value, where `wanted`.

    top: a power of two with size < 2 top. count: zeros of the shape of value.
    """
    step = top
    while step > 0:
        probe = count + step
        inside = wanted & (probe <= size)
        entry = tl.load(table_ptr + probe - 1, mask=inside, other=0)
        count = tl.where(inside & (entry <= value), probe, count)
        step = step // 2
    return count


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


@triton.jit
def read_targets(
    targets_ptr, start, lane, size, classes, IS_DENSE: tl.constexpr, BACKGROUND_FIRST: tl.constexpr, DOUBLE: tl.constexpr
):
    """Of the elements start + lane: whether each is a positive and a negative, and its row."""
    inside = lane < size - start
    if IS_DENSE:
        target = arithmetic(tl.load(targets_ptr + start + lane, mask=inside, other=-1.0), DOUBLE)
        row = start + lane
        is_positive = (target > 0) | (target != target)
        is_negative = target == 0
    else:
        # Only the first row needs a 64-bit division.
        first_row = start // classes
        ahead = (start - first_row * classes).to(tl.int32) + lane
        row = first_row + ahead // classes
        label = tl.load(targets_ptr + row, mask=inside, other=-1)
        column = ahead % classes
        is_positive = label == column + (1 if BACKGROUND_FIRST else 0)
        is_negative = (label >= 0) & (is_positive == 0)
    return is_positive & inside, is_negative & inside, row


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def mask_kernel(
    targets_ptr,
    negatives_ptr,
    block_counts_ptr,  # [2, entries]: positives, negatives of every block
    size,
    classes,
    first_block,
    entries,
    IS_DENSE: tl.constexpr,
    BACKGROUND_FIRST: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    byte = tl.arange(0, BLOCK // 8)
    bit = tl.arange(0, 8)
    lane = byte[:, None] * 8 + bit[None, :]
    is_positive, is_negative, _ = read_targets(
        targets_ptr, start, lane, size, classes, IS_DENSE, BACKGROUND_FIRST, DOUBLE
    )
    packed = tl.sum(tl.where(is_negative, 1 << bit[None, :], 0), 1)
    # The mask of a tensor is padded to 64 bits.
    tl.store(negatives_ptr + start // 8 + byte, packed.to(tl.uint8), mask=byte < (size + 63) // 64 * 8 - start // 8)
    block = first_block + tl.program_id(0)
    tl.store(block_counts_ptr + block, tl.sum(is_positive.to(tl.int32)))
    tl.store(block_counts_ptr + entries + block, tl.sum(is_negative.to(tl.int32)))


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def record_kernel(
    logits_ptr,
    targets_ptr,
    quality_ptr,
    found_ptr,  # [entries]: positives up to and including every block
    positives_ptr,  # [4, capacity]
    size,
    classes,
    first_block,
    offset,
    capacity,
    IS_DENSE: tl.constexpr,
    BACKGROUND_FIRST: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = first_block + tl.program_id(0)
    before = tl.load(found_ptr + block - 1, mask=block > 0, other=0)
    if tl.load(found_ptr + block) > before:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        lane = tl.arange(0, BLOCK)
        is_positive, _, row = read_targets(
            targets_ptr, start, lane, size, classes, IS_DENSE, BACKGROUND_FIRST, DOUBLE
        )
        slot = before + tl.cumsum(is_positive.to(tl.int32), 0) - 1
        fits = is_positive & (slot < capacity)
        logit = arithmetic(tl.load(logits_ptr + start + lane, mask=fits, other=0.0), DOUBLE).to(tl.float64)
        if IS_DENSE:
            value = arithmetic(tl.load(targets_ptr + start + lane, mask=fits, other=0.0), DOUBLE).to(tl.float64)
        elif quality_ptr is not None:
            value = arithmetic(tl.load(quality_ptr + row, mask=fits, other=0.0), DOUBLE).to(tl.float64)
        else:
            value = logit * 0.0 + 1.0
        is_valid = (tl.abs(logit) < float("inf")) & (tl.abs(value) < float("inf"))
        tl.store(positives_ptr + slot, tl.where(is_valid, logit, float("nan")), mask=fits)
        tl.store(positives_ptr + capacity + slot, value, mask=fits)
        tl.store(positives_ptr + 3 * capacity + slot, (start + lane + offset).to(tl.float64), mask=fits)


def ranking_collect(logits, targets, quality, segments, num_segments, max_positives, background_first):
    device = logits[0].device
    logits, targets, quality = ([part.contiguous() for part in parts] for parts in (logits, targets, quality))
    blocks = [stream_block(level.numel(), device) for level in logits]
    grids = [triton.cdiv(level.numel(), block) for level, block in zip(logits, blocks, strict=True)]
    block_counts = torch.empty((2, sum(grids)), dtype=torch.int32, device=device)
    negatives = torch.empty(mask_bytes(logits), dtype=torch.uint8, device=device)

    def launches():
        first_block = first_byte = offset = 0
        for level, (level_logits, level_targets) in enumerate(zip(logits, targets, strict=True)):
            size = level_logits.numel()
            is_dense = level_targets.is_floating_point()
            sources = [level_logits, level_targets, *quality[level : level + 1]]
            options = {
                "IS_DENSE": is_dense,
                "BACKGROUND_FIRST": background_first,
                "DOUBLE": any(source.dtype == torch.float64 for source in sources),
                "BLOCK": blocks[level],
                "num_warps": STREAM_WARPS,
            }
            classes = 1 if is_dense else level_logits.shape[-1]
            if size > 0:
                yield (grids[level],), level, size, classes, first_block, first_byte, offset, options
            first_block += grids[level]
            first_byte += (size + 63) // 64 * 8
            offset += size

    with launching_on(logits[0]):
        for grid, level, size, classes, first_block, first_byte, _, options in launches():
            mask_kernel[grid](
                targets[level], negatives[first_byte:], block_counts, size, classes, first_block, sum(grids), **options
            )
        running = block_counts.cumsum(1, dtype=torch.int64)
        counts = running[:, -1].clone() if sum(grids) else running.new_zeros(2)
        capacity = int(counts[0]) if max_positives is None else max_positives
        positives = torch.zeros((RECORD_ROWS, capacity), dtype=torch.float64, device=device)
        positives[0].fill_(torch.nan)
        positives[3].fill_(-1)
        for grid, level, size, classes, first_block, _, offset, options in launches():
            level_quality = quality[level] if quality else None
            record_kernel[grid](
                *(logits[level], targets[level], level_quality, running, positives),
                *(size, classes, first_block, offset, capacity),
                **options,
            )
    return positives, negatives, counts


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def rank_kernel(positives_ptr, counts_ptr, ranked_ptr, capacity, TILE: tl.constexpr, RUN: tl.constexpr):
    """Moves the records in the order of (logit, quality, flat index); NaN logits last."""
    found = tl.minimum(tl.load(counts_ptr), capacity).to(tl.int32)
    first = tl.program_id(0) * TILE
    slot = first + tl.arange(0, TILE)
    exists = slot < found
    logit = tl.load(positives_ptr + slot, mask=exists, other=float("nan"))
    quality = tl.load(positives_ptr + capacity + slot, mask=exists, other=0.0)
    segment = tl.load(positives_ptr + 2 * capacity + slot, mask=exists, other=0.0)
    index = tl.load(positives_ptr + 3 * capacity + slot, mask=exists, other=-1.0)
    logit_key = tl.where(logit == logit, logit, float("inf"))[:, None]
    quality_key = tl.where(quality == quality, quality, float("inf"))[:, None]
    before = tl.zeros([TILE, RUN], tl.int32)
    start = tl.where(first < found, 0, found)
    while start < found:
        other = start + tl.arange(0, RUN)
        is_other = other < found
        other_logit = tl.load(positives_ptr + other, mask=is_other, other=0.0)
        other_quality = tl.load(positives_ptr + capacity + other, mask=is_other, other=0.0)
        other_index = tl.load(positives_ptr + 3 * capacity + other, mask=is_other, other=0.0)[None, :]
        other_logit = tl.where(other_logit == other_logit, other_logit, float("inf"))[None, :]
        other_quality = tl.where(other_quality == other_quality, other_quality, float("inf"))[None, :]
        is_tied = (other_quality == quality_key) & (other_index < index[:, None])
        is_first = (other_logit < logit_key) | ((other_logit == logit_key) & ((other_quality < quality_key) | is_tied))
        before += (is_first & is_other[None, :]).to(tl.int32)
        start += RUN
    rank = tl.where(exists, tl.sum(before, 1), slot)
    fits = slot < capacity
    tl.store(ranked_ptr + rank, logit, mask=fits)
    tl.store(ranked_ptr + capacity + rank, quality, mask=fits)
    tl.store(ranked_ptr + 2 * capacity + rank, segment, mask=fits)
    tl.store(ranked_ptr + 3 * capacity + rank, index, mask=fits)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def windows_kernel(
    ranked_ptr,
    bounds_ptr,  # [2, capacity] lo and hi of every valid rank
    sizes_ptr,  # int32 [2] valid positives, and the largest power of two up to their number (at least 1)
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
    top = tl.program_id(0) * 0 + 1
    while 2 * top <= valid:
        top = 2 * top
    if tl.program_id(0) == 0:
        tl.store(sizes_ptr, valid)
        tl.store(sizes_ptr + 1, top)
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    centre = tl.load(ranked_ptr + rank, mask=rank < valid, other=0.0)
    delta = float_of(delta_bits)
    tl.store(bounds_ptr + rank, round_up_sum(centre, -delta, DOUBLE), mask=rank < valid)
    tl.store(bounds_ptr + capacity + rank, round_up_sum(centre, delta, DOUBLE), mask=rank < valid)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def breakpoints_kernel(
    bounds_ptr,
    sizes_ptr,
    edges_ptr,  # [2 capacity] all breakpoints ascending, padded with +inf
    slots_ptr,  # int32 [2, capacity] where the lo and the hi of every rank stand in `edges`
    capacity,
    BLOCK: tl.constexpr,
):
    valid = tl.load(sizes_ptr)
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_valid = rank < valid
    lo = tl.load(bounds_ptr + rank, mask=is_valid, other=float("inf"))
    hi = tl.load(bounds_ptr + capacity + rank, mask=is_valid, other=float("inf"))
    before_lo = tl.zeros([BLOCK], tl.int32)
    before_hi = tl.zeros([BLOCK], tl.int32)
    step = tl.load(sizes_ptr + 1)
    while step > 0:
        probe = before_lo + step
        inside = is_valid & (probe <= valid)
        other_hi = tl.load(bounds_ptr + capacity + probe - 1, mask=inside, other=0.0)
        before_lo = tl.where(inside & (other_hi < lo), probe, before_lo)
        probe = before_hi + step
        inside = is_valid & (probe <= valid)
        other_lo = tl.load(bounds_ptr + probe - 1, mask=inside, other=0.0)
        before_hi = tl.where(inside & (other_lo <= hi), probe, before_hi)
        step = step // 2
    lo_slot = rank + tl.where(is_valid, before_lo, rank)
    hi_slot = rank + tl.where(is_valid, before_hi, rank + 1)
    fits = rank < capacity
    tl.store(slots_ptr + rank, lo_slot, mask=fits)
    tl.store(slots_ptr + capacity + rank, hi_slot, mask=fits)
    tl.store(edges_ptr + lo_slot, lo, mask=fits)
    tl.store(edges_ptr + hi_slot, hi, mask=fits)


def write_breakpoints(ranked: Tensor, edges: Tensor, delta: float, double: bool) -> tuple[Tensor, Tensor]:
    """Fills `edges` [2 cap]; returns the slots of the breakpoints, int32 [2, cap], and the sizes that the kernels load."""
    capacity = ranked.shape[1]
    bounds = ranked.new_empty((2, capacity))
    slots = torch.empty((2, capacity), dtype=torch.int32, device=ranked.device)
    sizes = torch.empty(2, dtype=torch.int32, device=ranked.device)
    block = table_block(capacity, ranked.device)
    # One program at least, for the sizes.
    grid = (max(1, triton.cdiv(capacity, block)),)
    options = {"BLOCK": block, "num_warps": TABLE_WARPS}
    windows_kernel[grid](ranked, bounds, sizes, capacity, float_bits(delta), **options, DOUBLE=double)
    breakpoints_kernel[grid](bounds, sizes, edges, slots, capacity, **options)
    return slots, sizes


@triton.jit
def read_negatives(negatives_ptr, start, byte, size):
    """The bits of the mask bytes start / 8 + byte, one row of 8 elements per byte."""
    packed = tl.load(negatives_ptr + start // 8 + byte, mask=byte * 8 < size - start, other=0).to(tl.int32)
    return ((packed[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def bin_kernel(
    logits_ptr,
    negatives_ptr,
    edges_ptr,
    sizes_ptr,
    copies_ptr,  # int64 [entries]: copies of [2, 2 valid + 1], counts and fixed-point sums
    size,
    entries,
    scale_bits,
    most_bits,
    DOUBLE: tl.constexpr,
    IS_STEP: tl.constexpr,
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
    counts_ptr = copies_ptr + tl.program_id(0) % copies * (2 * (used + 1))

    nans = tl.sum((is_negative & (value != value)).to(tl.int32))
    tl.atomic_add(counts_ptr, nans.to(tl.int64), mask=nans > 0, sem="relaxed")
    # Without positives nothing is at or above a breakpoint, not even +inf.
    lowest = tl.load(edges_ptr, mask=used > 0, other=float("nan"))
    wanted = is_negative & (value >= lowest)
    index = count_not_above(
        edges_ptr, value, used, 2 * tl.load(sizes_ptr + 1), wanted, tl.zeros([BLOCK // 8, 8], tl.int32)
    )
    tl.atomic_add(counts_ptr + index, tl.full([BLOCK // 8, 8], 1, tl.int64), mask=wanted, sem="relaxed")
    if not IS_STEP:
        left = tl.load(edges_ptr + index - 1, mask=wanted, other=0.0)
        offset = (value.to(tl.float64) - left.to(tl.float64)) * float_of(scale_bits)
        most = float_of(most_bits)
        offset = tl.where(offset > 0, tl.where(offset < most, offset, most), 0.0)
        tl.atomic_add(counts_ptr + used + 1 + index, offset.to(tl.int64), mask=wanted, sem="relaxed")


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
    logits, positives = [level.contiguous() for level in logits], positives.contiguous()
    ranked = torch.empty_like(positives)
    bins = torch.empty((2, 2 * capacity + 1), dtype=torch.int64, device=device)
    edges = torch.empty(2 * capacity, dtype=arithmetic_type, device=device)
    entries = 2 * max(2 * capacity + 1, SHARED_BINS if device.type == "cuda" else 0)
    copies = torch.zeros(entries, dtype=torch.int64, device=device)
    unit, bits = reference.fixed_point_unit(delta, reference.count_elements(logits))
    scale_bits, most_bits = float_bits(1 / unit if unit else 0.0), float_bits(2.0**bits - 1)
    with launching_on(positives):
        if capacity:
            tile, run = pair_tile(capacity, device)
            rank_kernel[triton.cdiv(capacity, tile),](
                positives, counts, ranked, capacity, TILE=tile, RUN=run, num_warps=TABLE_WARPS
            )
        _, sizes = write_breakpoints(ranked, edges, delta, double)
        first_byte = 0
        for level in logits:
            size, block = level.numel(), stream_block(level.numel(), device)
            if size:
                bin_kernel[triton.cdiv(size, block),](
                    *(level, negatives[first_byte:], edges, sizes, copies, size, entries, scale_bits, most_bits),
                    **{"DOUBLE": double, "IS_STEP": delta == 0, "MAX_COPIES": MAX_COPIES, "BLOCK": block},
                    num_warps=STREAM_WARPS,
                )
            first_byte += (size + 63) // 64 * 8
        block = table_block(2 * capacity + 1, device)
        sum_copies_kernel[triton.cdiv(2 * capacity + 1, block), 2](
            copies, sizes, bins, capacity, entries, MAX_COPIES=MAX_COPIES, BLOCK=block, num_warps=TABLE_WARPS
        )
    return ranked, bins


@triton.jit
def upstream_of(grad_ptr):
    return tl.load(grad_ptr).to(tl.float64)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def negative_gradient_kernel(
    logits_ptr,
    negatives_ptr,
    edges_ptr,  # [2 capacity] in the arithmetic type
    lines_ptr,  # float64 [3, 2 capacity]
    counts_ptr,
    grad_first_ptr,
    results_ptr,
    size,
    capacity,
    top,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    byte = tl.arange(0, BLOCK // 8)
    lane = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = lane < size - start
    is_negative = read_negatives(negatives_ptr, start, byte, size)
    value = arithmetic(tl.load(logits_ptr + start + lane, mask=inside, other=0.0), DOUBLE)
    used = 2 * capacity
    index = count_not_above(edges_ptr, value, used, top, is_negative, tl.zeros([BLOCK // 8, 8], tl.int32))
    on_line = is_negative & (index > 0)
    edge = tl.load(edges_ptr + index - 1, mask=on_line, other=0.0)
    at_edge = tl.load(lines_ptr + used + index - 1, mask=on_line, other=0.0)
    slope = tl.load(lines_ptr + 2 * used + index - 1, mask=on_line, other=0.0)
    distance = tl.where(tl.abs(value) < float("inf"), value.to(tl.float64) - edge.to(tl.float64), 0.0)
    gradient = at_edge + slope * distance
    if grad_first_ptr is None:
        gradient = gradient * 0.0
    else:
        gradient = gradient * upstream_of(grad_first_ptr)
    gradient = tl.where(value == value, gradient, float("nan"))
    gradient = tl.where(is_negative, gradient, 0.0)
    gradient = tl.where(tl.load(counts_ptr) > capacity, float("nan"), gradient)
    tl.store(results_ptr + start + lane, rounded_to(gradient, results_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def positive_gradient_kernel(
    gradients_ptr,  # [3, capacity]
    counts_ptr,
    grad_first_ptr,
    grad_second_ptr,
    results_ptr,
    size,
    capacity,
    offset,
    BLOCK: tl.constexpr,
):
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Nothing to write after an overflow.
    used = tl.where(tl.load(counts_ptr) <= capacity, capacity, 0)
    index = tl.load(gradients_ptr + rank, mask=rank < used, other=-1.0).to(tl.int64) - offset
    here = (rank < used) & (index >= 0) & (index < size)
    gradient = tl.zeros([BLOCK], tl.float64)
    if grad_first_ptr is not None:
        gradient += tl.load(gradients_ptr + capacity + rank, mask=here, other=0.0) * upstream_of(grad_first_ptr)
    else:
        gradient += tl.load(gradients_ptr + capacity + rank, mask=here, other=0.0) * 0.0
    if grad_second_ptr is not None:
        gradient += tl.load(gradients_ptr + 2 * capacity + rank, mask=here, other=0.0) * upstream_of(grad_second_ptr)
    tl.store(results_ptr + index, rounded_to(gradient, results_ptr.dtype.element_ty), mask=here)


def ranking_backward(
    logits, negatives, gradients, lines, counts, segments, num_segments, grad_first, grad_second
) -> list[Tensor]:
    logits, lines, gradients = [level.contiguous() for level in logits], lines.contiguous(), gradients.contiguous()
    capacity, device = gradients.shape[1], gradients.device
    results = [torch.empty_like(level) for level in logits]
    edges = lines[0].to(reference.arithmetic_type(logits[0].dtype))
    first_byte = offset = 0
    with launching_on(gradients):
        for level, result in zip(logits, results, strict=True):
            size, block = level.numel(), stream_block(level.numel(), device)
            double = level.dtype == torch.float64
            if size:
                negative_gradient_kernel[triton.cdiv(size, block),](
                    *(level, negatives[first_byte:], edges, lines, counts, grad_first, result),
                    *(size, capacity, largest_power_of_two(2 * capacity)),
                    **{"DOUBLE": double, "BLOCK": block},
                    num_warps=STREAM_WARPS,
                )
            if size and capacity:
                block = table_block(capacity, device)
                positive_gradient_kernel[triton.cdiv(capacity, block),](
                    *(gradients, counts, grad_first, grad_second, result, size, capacity, offset),
                    BLOCK=block,
                    num_warps=TABLE_WARPS,
                )
            first_byte += (size + 63) // 64 * 8
            offset += size
    return results
