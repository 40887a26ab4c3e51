"""Balanced group softmax as Triton kernels: CUDA tensors, and CPU tensors under TRITON_INTERPRET=1.

The sampling is one program per group, which finds the k-th smallest key bit by bit (eight at a time) from histograms. Forward and
backward are one launch each for all groups, over blocks of rows; forward's partial sums are added in order by one more program per
group. Everything is float64 inside. Formulas and layouts: README.md beside this file.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from rsloss_kernels.losses.group_softmax.triton_rows import column_of_label, order_of_key, pick, sum_row
from rsloss_kernels.losses.triton_common import (
    configuration,
    exp_of_minus,
    float_bits,
    float_of,
    launching_on,
    log1p_of,
    rounded_to,
)

PLAIN_INTEGERS = ("rows", "entries", "num_classes", "ratio_bits")


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def group_softmax_sample_kernel(
    labels_ptr,
    class_columns_ptr,
    keys_ptr,
    weights_ptr,  # [G, rows]
    rows,
    num_classes,
    ratio_bits,
    STARTS: tl.constexpr,
    BACKGROUND_GROUP: tl.constexpr,
    BACKGROUND_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0)
    start, end = pick(STARTS, group), pick(STARTS, group + 1)
    lane = tl.arange(0, BLOCK)
    weights_ptr += group.to(tl.int64) * rows
    if keys_ptr is not None:
        keys_ptr += group.to(tl.int64) * rows

    foreground = tl.zeros([BLOCK], tl.int32)
    others = tl.zeros([BLOCK], tl.int32)
    first = rows * 0
    while first < rows:
        row = first + lane
        column, is_used = column_of_label(labels_ptr, class_columns_ptr, row, row < rows, num_classes, BACKGROUND_FIRST)
        is_held = (column >= start) & (column < end)
        foreground += (is_used & is_held).to(tl.int32)
        others += (is_used & ~is_held).to(tl.int32)
        first += BLOCK
    num_foreground, num_others = tl.sum(foreground), tl.sum(others)
    wanted = num_foreground.to(tl.float64) * tl.where(num_foreground > 0, float_of(ratio_bits), 0.0)
    takes_all = (num_foreground > 0) & (wanted >= num_others) | (group == BACKGROUND_GROUP)
    kept = tl.where(takes_all, num_others, tl.floor(tl.where(takes_all, 0.0, wanted)).to(tl.int32))

    # The kept-th smallest order of a key, from its highest bits on, and how many keys of this order are kept.
    limit = tl.zeros([], tl.int64)
    kept_of_limit = kept
    if keys_ptr is not None:
        digits = tl.arange(0, 512)
        for shift in tl.static_range(24, -8, -8):
            counts = tl.zeros([512], tl.int32)
            first = rows * 0
            while first < rows:
                row = first + lane
                column, is_used = column_of_label(labels_ptr, class_columns_ptr, row, row < rows, num_classes, BACKGROUND_FIRST)
                order = order_of_key(tl.load(keys_ptr + row, mask=row < rows, other=0.0))
                is_candidate = is_used & ((column < start) | (column >= end)) & ((order >> shift >> 8) == limit)
                # What is no candidate stands behind the digits.
                counts += tl.histogram(tl.where(is_candidate, (order >> shift) & 255, 256).to(tl.int32), 512)
                first += BLOCK
            counts = tl.where(digits < 256, counts, 0)
            is_below = (digits < 256) & (tl.cumsum(counts) < kept_of_limit)
            kept_of_limit -= tl.sum(tl.where(is_below, counts, 0))
            limit = limit * 256 + tl.sum(is_below.to(tl.int32))

    at_limit = kept * 0
    first = rows * 0
    while first < rows:
        row = first + lane
        column, is_used = column_of_label(labels_ptr, class_columns_ptr, row, row < rows, num_classes, BACKGROUND_FIRST)
        is_held = (column >= start) & (column < end)
        is_kept = takes_all
        if keys_ptr is not None:
            order = order_of_key(tl.load(keys_ptr + row, mask=row < rows, other=0.0))
            is_at_limit = (is_used & ~is_held & (order == limit)).to(tl.int32)
            # The first of equal keys are kept.
            is_kept |= (kept > 0) & ((order < limit) | (is_at_limit > 0) & (at_limit + tl.cumsum(is_at_limit) <= kept_of_limit))
            at_limit += tl.sum(is_at_limit)
        tl.store(weights_ptr + row, (is_used & (is_held | is_kept)).to(tl.float32), mask=row < rows)
        first += BLOCK


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def group_softmax_forward_kernel(
    logits_ptr,
    labels_ptr,
    class_columns_ptr,
    weights_ptr,
    tables_ptr,  # [3, G, rows]
    partials_ptr,  # [2, G, blocks of rows]: sums of weights and of losses
    rows,
    num_classes,
    STARTS: tl.constexpr,
    OTHERS: tl.constexpr,
    BACKGROUND_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group = tl.program_id(1)
    start, end, others = pick(STARTS, group), pick(STARTS, group + 1), pick(OTHERS, group)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    column, is_used = column_of_label(labels_ptr, class_columns_ptr, row, is_row, num_classes, BACKGROUND_FIRST)
    place = group.to(tl.int64) * rows + row
    weight = tl.load(weights_ptr + place, mask=is_row, other=0.0).to(tl.float64)
    is_used = is_used & (weight != 0)
    largest, rest, is_broken = sum_row(logits_ptr, row, is_used, start, end, others >= 0, STARTS[len(OTHERS)], COLUMNS)

    target = tl.where((column >= start) & (column < end), column, others)
    at_target_ptr = logits_ptr + row.to(tl.int64) * STARTS[len(OTHERS)] + target
    at_target = tl.load(at_target_ptr, mask=is_used & (target >= 0), other=0.0).to(tl.float64)
    is_broken = is_broken | (at_target == float("-inf"))
    at_target = tl.where(is_broken, 0.0, at_target)
    gap = largest - at_target
    scale = 1.0 / (1.0 + rest)
    complement = tl.where(gap == 0, rest, (1.0 + rest) - exp_of_minus(tl.where(is_used, gap, 0.0))) * scale
    loss = weight * tl.where(is_broken, float("nan"), gap + log1p_of(tl.where(is_used, rest, 0.0)))

    table = tl.num_programs(1).to(tl.int64) * rows
    element: tl.constexpr = tables_ptr.dtype.element_ty
    for k in tl.static_range(3):
        value = largest if k == 0 else (scale if k == 1 else complement)
        value = tl.where(is_used, tl.where(is_broken, float("nan"), value), 0.0)
        tl.store(tables_ptr + k * table + place, value.to(element), mask=is_row)
    partial = group * tl.num_programs(0) + tl.program_id(0)
    tl.store(partials_ptr + partial, tl.sum(tl.where(is_used, weight, 0.0)))
    tl.store(partials_ptr + tl.num_programs(1) * tl.num_programs(0) + partial, tl.sum(tl.where(is_used, loss, 0.0)))


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def group_softmax_losses_kernel(
    partials_ptr,  # [2, G, entries]
    losses_ptr,  # [G]
    averages_ptr,  # [G]
    entries,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    weights = tl.zeros([BLOCK], tl.float64)
    losses = tl.zeros([BLOCK], tl.float64)
    start = entries * 0
    while start < entries:
        place = group * entries + start + lane
        inside = start + lane < entries
        weights += tl.load(partials_ptr + place, mask=inside, other=0.0)
        losses += tl.load(partials_ptr + tl.num_programs(0) * entries + place, mask=inside, other=0.0)
        start += BLOCK
    average = tl.sum(weights)
    average = tl.where(average <= 1, 1.0, average)
    tl.store(averages_ptr + group, average)
    tl.store(losses_ptr + group, (tl.sum(losses) / average).to(losses_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def group_softmax_backward_kernel(
    logits_ptr,
    labels_ptr,
    class_columns_ptr,
    weights_ptr,
    averages_ptr,
    tables_ptr,  # [3, G, rows]
    grad_losses_ptr,
    gradient_ptr,
    rows,
    num_classes,
    STARTS: tl.constexpr,
    OTHERS: tl.constexpr,
    BACKGROUND_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group = tl.program_id(1)
    start, end, others = pick(STARTS, group), pick(STARTS, group + 1), pick(OTHERS, group)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    column, is_used = column_of_label(labels_ptr, class_columns_ptr, row, is_row, num_classes, BACKGROUND_FIRST)
    target = tl.where((column >= start) & (column < end), column, others)[:, None]
    place = group.to(tl.int64) * rows + row
    weight = tl.load(weights_ptr + place, mask=is_row, other=0.0).to(tl.float64)
    is_used = is_used & (weight != 0)
    table = tl.num_programs(1).to(tl.int64) * rows
    largest = tl.load(tables_ptr + place, mask=is_row, other=0.0).to(tl.float64)[:, None]
    factor = weight / tl.load(averages_ptr + group) * tl.load(grad_losses_ptr + group).to(tl.float64)
    scale = (factor * tl.load(tables_ptr + table + place, mask=is_row, other=0.0).to(tl.float64))[:, None]
    at_target = (-factor * tl.load(tables_ptr + 2 * table + place, mask=is_row, other=0.0).to(tl.float64))[:, None]

    lane = tl.arange(0, COLUMNS)[None, :]
    row_place = (row.to(tl.int64) * STARTS[len(OTHERS)])[:, None]
    first = start
    while first < end:
        inside = is_row[:, None] & (lane < end - first)
        value = tl.load(logits_ptr + row_place + first + lane, mask=inside & is_used[:, None], other=0.0).to(tl.float64)
        slope = exp_of_minus(largest - value) * scale
        slope = tl.where(is_used[:, None], tl.where(first + lane == target, at_target, slope), 0.0)
        tl.store(gradient_ptr + row_place + first + lane, rounded_to(slope, gradient_ptr.dtype.element_ty), mask=inside)
        first += COLUMNS


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def group_softmax_statistics_kernel(
    logits_ptr,
    statistics_ptr,  # [2, G, rows]: the largest logit, 1 / (1 + r)
    rows,
    STARTS: tl.constexpr,
    OTHERS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group = tl.program_id(1)
    start, end, others = pick(STARTS, group), pick(STARTS, group + 1), pick(OTHERS, group)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    largest, rest, is_broken = sum_row(logits_ptr, row, is_row, start, end, others >= 0, STARTS[len(OTHERS)], COLUMNS)
    place = group.to(tl.int64) * rows + row
    tl.store(statistics_ptr + place, largest, mask=is_row)
    scale = tl.where(is_broken, float("nan"), 1.0 / (1.0 + rest))
    tl.store(statistics_ptr + tl.num_programs(1).to(tl.int64) * rows + place, scale, mask=is_row)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def group_softmax_scores_kernel(
    logits_ptr,
    class_columns_ptr,
    statistics_ptr,  # [2, G, rows]
    scores_ptr,  # [rows, num_classes + 1]
    rows,
    num_classes,
    STARTS: tl.constexpr,
    OTHERS: tl.constexpr,
    BACKGROUND_GROUP: tl.constexpr,
    BACKGROUND_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    GROUPS: tl.constexpr = len(OTHERS)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    score = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_row, is_score = row < rows, score <= num_classes
    number = score
    if BACKGROUND_FIRST:
        number = tl.where(score == 0, num_classes, score - 1)
    column = tl.load(class_columns_ptr + number, mask=is_score, other=-1)
    is_column = (column >= 0) & (column < STARTS[GROUPS])
    group = column * 0
    for k in tl.static_range(1, GROUPS):
        group += (column >= STARTS[k]).to(tl.int32)

    scales_ptr = statistics_ptr + GROUPS * rows.to(tl.int64)
    inside = is_row & is_column
    value = tl.load(logits_ptr + row * STARTS[GROUPS] + column, mask=inside, other=0.0).to(tl.float64)
    place = group.to(tl.int64) * rows + row
    largest = tl.load(statistics_ptr + place, mask=inside, other=0.0)
    result = exp_of_minus(largest - value) * tl.load(scales_ptr + place, mask=inside, other=0.0)
    result = tl.where(is_column, result, 0.0)

    place = BACKGROUND_GROUP * rows.to(tl.int64) + row
    value = row.to(tl.float64) * 0.0
    if OTHERS[BACKGROUND_GROUP] >= 0:
        value = tl.load(logits_ptr + row * STARTS[GROUPS] + OTHERS[BACKGROUND_GROUP], mask=is_row, other=0.0).to(tl.float64)
    foreground = exp_of_minus(tl.load(statistics_ptr + place, mask=is_row, other=0.0) - value)
    foreground *= tl.load(scales_ptr + place, mask=is_row, other=0.0)
    result *= tl.where(number == num_classes, 1.0, foreground)
    result = rounded_to(result, scores_ptr.dtype.element_ty)
    tl.store(scores_ptr + row * (num_classes + 1) + score, result, mask=is_row & is_score)


def _tile(logits: Tensor, starts: list[int]) -> dict[str, int]:
    """Of the widest group, with the options of a launch."""
    widest = max(end - start for start, end in zip(starts, starts[1:], strict=False))
    return _tile_of(logits, widest)


def _tile_of(logits: Tensor, columns: int) -> dict[str, int]:
    run = configuration("group softmax", logits.numel(), logits.device)
    return {**run.tile(max(logits.shape[0], 1), columns), **run.options}


def group_softmax_sample(labels, class_columns, keys, starts, others, background_group, background_first, others_ratio) -> Tensor:
    rows = labels.shape[0]
    weights = labels.new_empty((len(others), rows), dtype=torch.float32)
    with launching_on(labels):
        if rows:
            group_softmax_sample_kernel[len(others),](
                *(labels, class_columns, keys, weights, rows, class_columns.numel() - 1, float_bits(others_ratio)),
                STARTS=tuple(starts),
                BACKGROUND_GROUP=background_group,
                BACKGROUND_FIRST=background_first,
                **configuration("group softmax sample", rows, labels.device).arguments,
            )
    return weights


def group_softmax_forward(
    logits, labels, class_columns, weights, starts, others, background_first
) -> tuple[Tensor, Tensor, Tensor]:
    rows, groups = logits.shape[0], len(others)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tile = _tile(logits, starts)
    blocks = triton.cdiv(rows, tile["ROWS"])
    losses, averages = logits.new_empty((groups,), dtype=wide), logits.new_empty((groups,), dtype=torch.float64)
    row_tables = logits.new_empty((3, groups, rows), dtype=wide)
    partials = averages.new_empty((2, groups, blocks))
    with launching_on(logits):
        if rows:
            group_softmax_forward_kernel[blocks, groups](
                *(logits, labels, class_columns, weights, row_tables, partials, rows, class_columns.numel() - 1),
                *(tuple(starts), tuple(others), background_first),
                **tile,
            )
        run = configuration("group softmax losses", blocks, logits.device)
        group_softmax_losses_kernel[groups,](partials, losses, averages, blocks, **run.arguments)
    return losses, averages, row_tables


def group_softmax_backward(
    logits, labels, class_columns, weights, averages, row_tables, grad_losses, starts, others, background_first
) -> Tensor:
    rows, tile = logits.shape[0], _tile(logits, starts)
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    with launching_on(logits):
        if rows:
            group_softmax_backward_kernel[triton.cdiv(rows, tile["ROWS"]), len(others)](
                *(logits, labels, class_columns, weights, averages, row_tables, grad_losses, gradient),
                *(rows, class_columns.numel() - 1, tuple(starts), tuple(others), background_first),
                **tile,
            )
    return gradient


def group_softmax_scores(logits, class_columns, starts, others, background_group, background_first) -> Tensor:
    rows, size = logits.shape[0], class_columns.numel()
    scores = logits.new_empty((rows, size))
    statistics = logits.new_empty((2, len(others), rows), dtype=torch.float64)
    tile, score_tile = _tile(logits, starts), _tile_of(logits, size)
    with launching_on(logits):
        if rows:
            group_softmax_statistics_kernel[triton.cdiv(rows, tile["ROWS"]), len(others)](
                logits, statistics, rows, tuple(starts), tuple(others), **tile
            )
            group_softmax_scores_kernel[triton.cdiv(rows, score_tile["ROWS"]), triton.cdiv(size, score_tile["COLUMNS"])](
                *(logits, class_columns, statistics, scores, rows, size - 1),
                *(tuple(starts), tuple(others), background_group, background_first),
                **score_tile,
            )
    return scores
