"""`ranking_collect` as Triton kernels: a pass over the targets writes the bit mask and the counts of every block; their prefix
sum gives each block its slots, and a second pass over the blocks that hold positives writes the records in flat order.
"""
import torch
import triton
import triton.language as tl

from rsloss_kernels.losses.ranking.op import COUNT_ENTRIES, RECORD_ROWS, index_shape, mask_bytes
from rsloss_kernels.losses.ranking.triton_common import (
    PLAIN_INTEGERS,
    STREAM_WARPS,
    arithmetic,
    segment_arguments,
    segment_of,
    stream_block,
)
from rsloss_kernels.losses.triton_common import launching_on, row_and_class


@triton.jit
def read_targets(
    targets_ptr,
    segments_ptr,
    start,
    lane,
    size,
    classes,
    places,
    period,
    shift,
    num_segments,
    IS_DENSE: tl.constexpr,
    IS_MAP: tl.constexpr,
    BACKGROUND_FIRST: tl.constexpr,
    FORM: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """Of the elements start + lane: whether each is a positive and a negative, its row, and its segment."""
    inside = lane < size - start
    if IS_DENSE:
        target = arithmetic(tl.load(targets_ptr + start + lane, mask=inside, other=-1.0), DOUBLE)
        row = start + lane
        is_positive = (target > 0) | (target != target)
        is_negative = target == 0
    else:
        row, column = row_and_class(start, lane, size, classes, places, IS_MAP)
        label = tl.load(targets_ptr + row, mask=inside, other=-1)
        is_positive = label == column + (1 if BACKGROUND_FIRST else 0)
        is_negative = (label >= 0) & (is_positive == 0)
    segment = lane * 0
    if FORM != "whole":
        segment = segment_of(segments_ptr, start, lane, inside, period, shift, num_segments, FORM)
        inside = inside & (segment >= 0)
    return is_positive & inside, is_negative & inside, row, segment


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def mask_kernel(
    targets_ptr,
    segments_ptr,
    negatives_ptr,
    block_counts_ptr,  # [2, entries]: positives, negatives of every block
    size,
    classes,
    places,
    period,
    shift,
    num_segments,
    first_block,
    entries,
    IS_DENSE: tl.constexpr,
    IS_MAP: tl.constexpr,
    BACKGROUND_FIRST: tl.constexpr,
    FORM: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    byte = tl.arange(0, BLOCK // 8)
    bit = tl.arange(0, 8)
    lane = byte[:, None] * 8 + bit[None, :]
    is_positive, is_negative, _, _ = read_targets(
        *(targets_ptr, segments_ptr, start, lane, size, classes, places, period, shift, num_segments),
        *(IS_DENSE, IS_MAP, BACKGROUND_FIRST, FORM, DOUBLE),
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
    segments_ptr,
    found_ptr,  # [entries]: positives up to and including every block
    positives_ptr,  # [4, capacity]
    size,
    classes,
    places,
    period,
    shift,
    num_segments,
    first_block,
    offset,
    capacity,
    IS_DENSE: tl.constexpr,
    IS_MAP: tl.constexpr,
    BACKGROUND_FIRST: tl.constexpr,
    FORM: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = first_block + tl.program_id(0)
    before = tl.load(found_ptr + block - 1, mask=block > 0, other=0)
    if tl.load(found_ptr + block) > before:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        lane = tl.arange(0, BLOCK)
        is_positive, _, row, segment = read_targets(
            *(targets_ptr, segments_ptr, start, lane, size, classes, places, period, shift, num_segments),
            *(IS_DENSE, IS_MAP, BACKGROUND_FIRST, FORM, DOUBLE),
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
        if FORM != "whole":
            tl.store(positives_ptr + 2 * capacity + slot, segment.to(tl.float64), mask=fits)
        tl.store(positives_ptr + 3 * capacity + slot, (start + lane + offset).to(tl.float64), mask=fits)


def ranking_collect(logits, targets, quality, segments, num_segments, max_positives, maps, background_first):
    device = logits[0].device
    logits, targets, quality = ([part.contiguous() for part in parts] for parts in (logits, targets, quality))
    blocks = [stream_block(level.numel(), device) for level in logits]
    grids = [triton.cdiv(level.numel(), block) for level, block in zip(logits, blocks, strict=True)]
    block_counts = torch.empty((2, sum(grids)), dtype=torch.int32, device=device)
    negatives = torch.empty(mask_bytes(logits), dtype=torch.uint8, device=device)
    in_segments = segment_arguments(logits, segments, num_segments)

    def launches():
        first_block = first_byte = offset = 0
        for level, (level_logits, level_targets) in enumerate(zip(logits, targets, strict=True)):
            size = level_logits.numel()
            is_dense = level_targets.is_floating_point()
            classes, places = (1, 1) if is_dense else index_shape(level_logits, level_targets, maps)
            sources = [level_logits, level_targets, *quality[level : level + 1]]
            options = {
                "size": size,
                "classes": classes,
                "places": places,
                "first_block": first_block,
                "IS_DENSE": is_dense,
                "IS_MAP": places > 1,
                "BACKGROUND_FIRST": background_first,
                "DOUBLE": any(source.dtype == torch.float64 for source in sources),
                "BLOCK": blocks[level],
                "num_warps": STREAM_WARPS,
                **in_segments[level],
            }
            if size > 0:
                yield (grids[level],), level, first_byte, offset, options
            first_block += grids[level]
            first_byte += (size + 63) // 64 * 8
            offset += size

    with launching_on(logits[0]):
        elements = 0
        for grid, level, first_byte, _, options in launches():
            mask_kernel[grid](
                targets_ptr=targets[level],
                negatives_ptr=negatives[first_byte:],
                block_counts_ptr=block_counts,
                entries=sum(grids),
                **options,
            )
            elements += options["size"]
        running = block_counts.cumsum(1, dtype=torch.int64)
        counts = torch.full((COUNT_ENTRIES,), elements, dtype=torch.int64, device=device)
        counts[:2] = running[:, -1] if sum(grids) else 0
        capacity = int(counts[0]) if max_positives is None else max_positives
        positives = torch.zeros((RECORD_ROWS, capacity), dtype=torch.float64, device=device)
        positives[0].fill_(torch.nan)
        positives[3].fill_(-1)
        for grid, level, _, offset, options in launches():
            record_kernel[grid](
                logits_ptr=logits[level],
                targets_ptr=targets[level],
                quality_ptr=quality[level] if quality else None,
                found_ptr=running,
                positives_ptr=positives,
                offset=offset,
                capacity=capacity,
                **options,
            )
    return positives, negatives, counts
