"""What the Triton kernels of every ranking loss share: arithmetic, searches, segments of elements."""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsloss_kernels.losses.triton_common import configuration

# Of the passes that neither search nor walk pairs.
STREAM_WARPS = 4

# Arguments that change from call to call without a gain from code of their own. Floats travel as the bits of a float64.
PLAIN_INTEGERS = (
    *("capacity", "top", "first_block", "offset", "entries", "period", "shift", "num_segments"),
    *("delta_bits", "scale_bits", "exponent"),
)


def width_exponent(delta: float) -> int:
    """Of the smallest power of two that is >= 2 delta; 0 for delta = 0."""
    mantissa, exponent = math.frexp(2 * delta)
    return exponent - (mantissa == 0.5)


def stream_block(elements: int, device: torch.device) -> int:
    return configuration("ranking stream", elements, device).block


def largest_power_of_two(size: int) -> int:
    return 1 << (max(size, 1).bit_length() - 1)


def segment_form(segments: Tensor | None, num_segments: int) -> str:
    """How an element finds its segment: there is one ("whole"), by equal "chunks" of its tensor, by its "rows" or "columns"."""
    if segments is None:
        return "whole" if num_segments == 1 else "chunks"
    return "rows" if segments.shape[1] == 1 else "columns"


def segment_arguments(logits: list[Tensor], segments: Tensor | None, num_segments: int) -> list[dict]:
    """For every tensor of `logits` what `segment_of` takes, as keyword arguments of a kernel."""
    form = segment_form(segments, num_segments)
    ids = None if segments is None else segments.contiguous().view(-1)
    elements = sum(level.numel() for level in logits)
    arguments, offset = [], 0
    for level in logits:
        period, shift, here = 1, 0, ids
        if form == "chunks":
            period = level.numel() // num_segments
        elif form == "columns":
            period = ids.numel()
        elif form == "rows" and elements:
            period = elements // ids.numel()
            shift, here = offset % period, ids[offset // period :]
        arguments.append(
            {"segments_ptr": here, "period": max(period, 1), "shift": shift, "num_segments": num_segments, "FORM": form}
        )
        offset += level.numel()
    return arguments


@triton.jit
def segment_of(segments_ptr, start, lane, inside, period, shift, num_segments, FORM: tl.constexpr):
    """Segments of the elements start + lane, -1 where there is none. FORM: "chunks", "rows" or "columns".

    period: elements of a chunk or of a row. shift: elements before this tensor of the row that it begins in. Only scalars are
    divided in 64 bits.
    """
    start += shift
    first = start // period
    rest = tl.minimum((first + 1) * period - start, 1 << 30).to(tl.int32)
    short = tl.minimum(period, 1 << 30).to(tl.int32)
    beyond = lane - rest
    passed = tl.where(beyond < 0, 0, 1 + tl.maximum(beyond, 0) // short)
    if FORM == "chunks":
        segment = first.to(tl.int32) + passed
    elif FORM == "rows":
        segment = tl.load(segments_ptr + first + passed, mask=inside, other=-1)
    else:
        column = beyond + short * (1 - passed)
        segment = tl.load(segments_ptr + column, mask=inside, other=-1)
    return tl.where(inside & (segment >= 0) & (segment < num_segments), segment, -1)


@triton.jit
def segment_ranks(ranges_ptr, segment, valid, wanted, SEGMENTED: tl.constexpr):
    """The ranks [begin, end) of the valid positives of `segment`: all of them without segments, none where there is no such segment.

    ranges_ptr: see `triton_windows.write_ranges`.
    """
    if SEGMENTED:
        wanted = wanted & (segment >= 0) & (segment < tl.load(ranges_ptr))
        begin = tl.load(ranges_ptr + segment + 1, mask=wanted, other=0)
        end = tl.load(ranges_ptr + segment + 2, mask=wanted, other=0)
    else:
        begin = segment * 0
        end = begin + valid
    return begin, end


@triton.jit
def offset_bits(counts_ptr, DOUBLE: tl.constexpr):
    """Bits of one fixed-point offset: the sum over all elements, of the whole group, fits 62 bits."""
    most = tl.maximum(tl.load(counts_ptr + 2) - 1, 0).to(tl.float64)
    bit_length = tl.maximum((most.to(tl.int64, bitcast=True) >> 52) - 1022, 0)
    return tl.minimum(62 - bit_length, 52 if DOUBLE else 44)


@triton.jit
def arithmetic(value, DOUBLE: tl.constexpr):
    if DOUBLE:
        return value.to(tl.float64)
    else:
        return value.to(tl.float32)


@triton.jit
def power_up_to(size):
    """The largest power of two that is <= size, at least 1."""
    top = size * 0 + 1
    while 2 * top <= size:
        top = 2 * top
    return top


@triton.jit
def count_not_above(table_ptr, base, value, size, top, wanted, count):
    """Number of entries of the ascending table[base : base + size] that are <= value, where `wanted`.

    base, size: one, or one for every value. top: a power of two with size < 2 top. count: zeros of the shape of value.
    """
    step = top
    while step > 0:
        probe = count + step
        inside = wanted & (probe <= size)
        entry = tl.load(table_ptr + (base + probe - 1), mask=inside, other=0)
        count = tl.where(inside & (entry <= value), probe, count)
        step = step // 2
    return count


@triton.jit
def read_negatives(negatives_ptr, start, byte, size):
    """The bits of the mask bytes start / 8 + byte, one row of 8 elements per byte; none beyond the last element."""
    packed = tl.load(negatives_ptr + start // 8 + byte, mask=byte * 8 < size - start, other=0).to(tl.int32)
    bit = tl.arange(0, 8)[None, :]
    return (((packed[:, None] >> bit) & 1) != 0) & (byte[:, None] * 8 + bit < size - start)
