"""`ranking_backward` as Triton kernels: one pass over the logits for the negatives, then one over the positives. Many 16-bit logits:
triton_values.py."""
import torch
import triton
import triton.language as tl
from torch import Tensor

from rsloss_kernels.losses.ranking import reference
from rsloss_kernels.losses.ranking.triton_common import (
    PLAIN_INTEGERS,
    arithmetic,
    count_not_above,
    largest_power_of_two,
    power_up_to,
    read_negatives,
    segment_arguments,
    segment_form,
    segment_of,
    segment_ranks,
)
from rsloss_kernels.losses.ranking.triton_lines import line_gradient, upstream_of
from rsloss_kernels.losses.ranking.triton_values import is_by_value, look_up
from rsloss_kernels.losses.ranking.triton_windows import write_ranges
from rsloss_kernels.losses.triton_common import configuration, launching_on, rounded_to


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def negative_gradient_kernel(
    logits_ptr,
    negatives_ptr,
    segments_ptr,
    edges_ptr,  # [2 capacity] in the arithmetic type
    lines_ptr,  # float64 [3, 2 capacity]
    ranges_ptr,
    counts_ptr,
    grad_first_ptr,
    results_ptr,
    size,
    capacity,
    top,
    period,
    shift,
    num_segments,
    FORM: tl.constexpr,
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
    first_slot, slots = 0, used
    if FORM != "whole":
        segment = segment_of(segments_ptr, start, lane, is_negative, period, shift, num_segments, FORM)
        begin, end = segment_ranks(ranges_ptr, segment, used, segment >= 0, True)
        first_slot, slots, top = 2 * begin, 2 * (end - begin), 2 * power_up_to(tl.max(end - begin))
    none = tl.zeros([BLOCK // 8, 8], tl.int32)
    index = count_not_above(edges_ptr, first_slot, value, slots, top, is_negative, none)
    # The last breakpoint at or below the element; -1 where there is none.
    index = tl.where(is_negative & (index > 0), first_slot + index - 1, -1)
    gradient = line_gradient(value, index, is_negative, edges_ptr, lines_ptr, counts_ptr, grad_first_ptr, capacity)
    tl.store(results_ptr + start + lane, rounded_to(gradient, results_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def positive_gradient_kernel(
    gradients_ptr,  # [4, capacity]
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
    # Nothing to write after an overflow, nor for the padding or another process's positives.
    found = tl.load(counts_ptr)
    used = tl.where(found <= capacity, found, 0)
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
    segmented = segment_form(segments, num_segments) != "whole"
    top = largest_power_of_two(2 * capacity)
    by_value = is_by_value(logits, segments, num_segments)
    first_byte = offset = 0
    with launching_on(gradients):
        if by_value:
            look_up(logits, negatives, edges, lines, counts, grad_first, results, capacity, top)
        # Invalid positives and padding have the segment `num_segments`, behind all.
        ranges = write_ranges(gradients[3], None, num_segments) if segmented else None
        levels = zip(logits, results, segment_arguments(logits, segments, num_segments), strict=True)
        for level, result, in_segments in levels:
            size, run = level.numel(), configuration("ranking search", level.numel(), device)
            if size and not by_value:
                negative_gradient_kernel[triton.cdiv(size, run.block),](
                    logits_ptr=level,
                    negatives_ptr=negatives[first_byte:],
                    edges_ptr=edges,
                    lines_ptr=lines,
                    ranges_ptr=ranges,
                    counts_ptr=counts,
                    grad_first_ptr=grad_first,
                    results_ptr=result,
                    size=size,
                    capacity=capacity,
                    top=top,
                    DOUBLE=level.dtype == torch.float64,
                    **in_segments,
                    **run.arguments,
                )
            if size and capacity:
                run = configuration("ranking table", capacity, device)
                positive_gradient_kernel[triton.cdiv(capacity, run.block),](
                    *(gradients, counts, grad_first, grad_second, result, size, capacity, offset), **run.arguments
                )
            first_byte += (size + 63) // 64 * 8
            offset += size
    return results
