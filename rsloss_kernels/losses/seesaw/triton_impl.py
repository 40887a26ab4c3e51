"""Seesaw loss as Triton kernels: CUDA tensors, and CPU tensors under TRITON_INTERPRET=1.

One launch forward and one back, each over blocks of rows. Forward goes over the class logits of a row four times (largest logit and sum
of exponentials, of the logits and of the balanced ones), backward once. Everything is float64 inside. Formulas and layouts: README.md
beside this file.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsloss_kernels.losses.group_softmax.triton_rows import sum_row
from rsloss_kernels.losses.seesaw.reduction import reduce_rows, spread_gradients
from rsloss_kernels.losses.triton_common import (
    configuration,
    exp_of_minus,
    float_bits,
    float_of,
    launching_on,
    log1p_of,
    log1p_of_fraction,
    reciprocal,
    rounded_to,
)

PLAIN_INTEGERS = ("rows", "p_bits", "q_bits", "log_eps_bits")


@triton.jit
def read_labels(labels_ptr, weights_ptr, row, rows, NUM_CLASSES: tl.constexpr):
    """Label and weight of each row, whether it is read, and whether its class logits are; a label that is no class is 0."""
    is_row = row < rows
    label = tl.load(labels_ptr + row, mask=is_row, other=-1)
    is_used = label >= 0
    weight = is_used.to(tl.float64)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row, mask=is_row, other=0.0).to(tl.float64)
        is_used = is_used & (weight != 0)
    has_class = is_used & (label < NUM_CLASSES)
    return tl.where(has_class, label, 0).to(tl.int32), weight, is_used, has_class


@triton.jit
def balance(value, log_count, log_count_of_label, threshold, p, q):
    """`z'`, of a logit that is not NaN or +inf."""
    mitigation = p * tl.minimum(log_count - log_count_of_label, 0.0)
    return value + mitigation + tl.where(value > threshold, q * (value - threshold), 0.0)


@triton.jit
def objectness(logits_ptr, row, is_used, is_background, NUM_CLASSES: tl.constexpr):
    """The loss of each row and its derivative by the logit of the background, NaN where the row is broken."""
    base_ptr = logits_ptr + row.to(tl.int64) * (NUM_CLASSES + 2) + NUM_CLASSES
    of_foreground = tl.load(base_ptr, mask=is_used, other=0.0).to(tl.float64)
    of_background = tl.load(base_ptr + 1, mask=is_used, other=0.0).to(tl.float64)
    right = tl.where(is_background, of_background, of_foreground)
    wrong = tl.where(is_background, of_foreground, of_background)
    is_sound = (of_foreground < float("inf")) & (of_background < float("inf")) & (right > float("-inf"))
    x = tl.where(is_sound, wrong, 0.0) - tl.where(is_sound, right, 0.0)
    small = exp_of_minus(tl.abs(x))
    loss = tl.where(x > 0, x, 0.0) + log1p_of_fraction(small)
    slope = tl.where(x > 0, 1.0, small) * reciprocal(1.0 + small)
    slope = tl.where(is_background, -slope, slope)
    return tl.where(is_sound, loss, float("nan")), tl.where(is_sound, slope, float("nan"))


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def seesaw_forward_kernel(
    logits_ptr,
    labels_ptr,
    weights_ptr,
    log_counts_ptr,
    losses_ptr,  # [2, rows]
    tables_ptr,  # [4, rows]
    rows,
    p_bits,
    q_bits,
    log_eps_bits,
    NUM_CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    label, weight, is_used, has_class = read_labels(labels_ptr, weights_ptr, row, rows, NUM_CLASSES)
    of_objectness, _ = objectness(logits_ptr, row, is_used, ~has_class, NUM_CLASSES)
    tl.store(losses_ptr + row, tl.where(is_used, weight * of_objectness, 0.0), mask=is_row)

    p, q = float_of(p_bits), float_of(q_bits)
    first, end = rows * 0, rows * 0 + NUM_CLASSES
    largest, rest, is_broken = sum_row(logits_ptr, row, has_class, first, end, end > 0, NUM_CLASSES + 2, COLUMNS)
    row_ptr = logits_ptr + row.to(tl.int64) * (NUM_CLASSES + 2)
    at_label = tl.load(row_ptr + label, mask=has_class, other=0.0).to(tl.float64)
    is_broken = is_broken | (at_label == float("-inf"))
    at_label = tl.where(is_broken, 0.0, at_label)
    is_read = has_class & ~is_broken
    count_of_label = tl.load(log_counts_ptr + label)[:, None]
    log_sum = largest + log1p_of(tl.where(is_read, rest, 0.0))
    threshold = tl.maximum(at_label, log_sum + float_of(log_eps_bits))

    lane = tl.arange(0, COLUMNS)[None, :]
    top = at_label
    column = first
    while column < end:
        is_class = lane < end - column
        value = tl.load(row_ptr[:, None] + column + lane, mask=is_read[:, None] & is_class, other=float("-inf")).to(tl.float64)
        count = tl.load(log_counts_ptr + column + lane, mask=is_class, other=0.0)
        balanced = balance(value, count, count_of_label, threshold[:, None], p, q)
        top = tl.maximum(top, tl.max(balanced, 1))
        column += COLUMNS
    ties = row * 0
    below = top * 0.0
    column = first
    while column < end:
        is_class = lane < end - column
        value = tl.load(row_ptr[:, None] + column + lane, mask=is_read[:, None] & is_class, other=float("-inf")).to(tl.float64)
        count = tl.load(log_counts_ptr + column + lane, mask=is_class, other=0.0)
        balanced = balance(value, count, count_of_label, threshold[:, None], p, q)
        ties += tl.sum((balanced == top[:, None]).to(tl.int32), 1)
        below += tl.sum(tl.where(balanced < top[:, None], exp_of_minus(top[:, None] - balanced), 0.0), 1)
        column += COLUMNS
    rest = tl.where(is_read, below + (ties - 1), 0.0)
    gap = top - at_label
    scale = 1.0 / (1.0 + rest)
    complement = tl.where(gap == 0, rest, (1.0 + rest) - exp_of_minus(gap)) * scale
    loss = weight * tl.where(is_broken, float("nan"), gap + log1p_of(rest))
    tl.store(losses_ptr + rows.to(tl.int64) + row, tl.where(has_class, loss, 0.0), mask=is_row)
    for k in tl.static_range(4):
        value = threshold if k == 0 else (top if k == 1 else (scale if k == 2 else complement))
        value = tl.where(has_class, tl.where(is_broken, float("nan"), value), 0.0)
        tl.store(tables_ptr + k * rows.to(tl.int64) + row, value, mask=is_row)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def seesaw_backward_kernel(
    logits_ptr,
    labels_ptr,
    weights_ptr,
    log_counts_ptr,
    tables_ptr,  # [4, rows]
    grad_losses_ptr,  # [2, rows]
    gradient_ptr,
    rows,
    p_bits,
    q_bits,
    NUM_CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    label, weight, is_used, has_class = read_labels(labels_ptr, weights_ptr, row, rows, NUM_CLASSES)
    element: tl.constexpr = gradient_ptr.dtype.element_ty
    place = row.to(tl.int64) * (NUM_CLASSES + 2)
    _, pull = objectness(logits_ptr, row, is_used, ~has_class, NUM_CLASSES)
    pull *= weight * tl.load(grad_losses_ptr + row, mask=is_row, other=0.0).to(tl.float64)
    pull = tl.where(is_used, pull, 0.0)
    tl.store(gradient_ptr + place + NUM_CLASSES, rounded_to(-pull, element), mask=is_row)
    tl.store(gradient_ptr + place + NUM_CLASSES + 1, rounded_to(pull, element), mask=is_row)

    p, q = float_of(p_bits), float_of(q_bits)
    table_ptr = tables_ptr + row
    wide = rows.to(tl.int64)
    factor = weight * tl.load(grad_losses_ptr + wide + row, mask=is_row, other=0.0).to(tl.float64)
    threshold = tl.load(table_ptr, mask=is_row, other=0.0)[:, None]
    top = tl.load(table_ptr + wide, mask=is_row, other=0.0)[:, None]
    scale = (factor * tl.load(table_ptr + 2 * wide, mask=is_row, other=0.0))[:, None]
    at_label = (-factor * tl.load(table_ptr + 3 * wide, mask=is_row, other=0.0))[:, None]
    count_of_label = tl.load(log_counts_ptr + label)[:, None]
    lane = tl.arange(0, COLUMNS)[None, :]
    column = rows * 0
    while column < NUM_CLASSES:
        is_class = lane < NUM_CLASSES - column
        inside = is_row[:, None] & is_class
        value = tl.load(logits_ptr + place[:, None] + column + lane, mask=inside & has_class[:, None], other=0.0).to(tl.float64)
        count = tl.load(log_counts_ptr + column + lane, mask=is_class, other=0.0)
        balanced = balance(value, count, count_of_label, threshold, p, q)
        slope = tl.where(column + lane == label[:, None], at_label, exp_of_minus(top - balanced) * scale)
        slope = tl.where(has_class[:, None], slope, 0.0)
        tl.store(gradient_ptr + place[:, None] + column + lane, rounded_to(slope, element), mask=inside)
        column += COLUMNS


def seesaw_forward(
    logits, labels, weights, log_counts, p, q, eps, reduction, avg_factor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, classes = logits.shape[0], log_counts.numel()
    losses, tables = log_counts.new_empty((2, rows)), log_counts.new_empty((4, rows))
    log_eps = math.log(eps) if eps > 0 else -math.inf
    with launching_on(logits):
        if rows:
            run = configuration("seesaw", logits.numel(), logits.device)
            tile = run.tile(rows, classes)
            seesaw_forward_kernel[triton.cdiv(rows, tile["ROWS"]),](
                *(logits, labels, weights, log_counts, losses, tables, rows),
                *(float_bits(p), float_bits(q), float_bits(log_eps), classes),
                **tile,
                **run.options,
            )
    return *reduce_rows(losses, logits, labels, reduction, avg_factor), tables


def seesaw_backward(logits, labels, weights, log_counts, divisors, row_tables, grad_objectness, grad_classes, p, q) -> Tensor:
    rows, classes = logits.shape[0], log_counts.numel()
    grad_losses = spread_gradients(grad_objectness, grad_classes, divisors, rows)
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    with launching_on(logits):
        if rows:
            run = configuration("seesaw", logits.numel(), logits.device)
            tile = run.tile(rows, classes)
            seesaw_backward_kernel[triton.cdiv(rows, tile["ROWS"]),](
                *(logits, labels, weights, log_counts, row_tables, grad_losses, gradient, rows),
                *(float_bits(p), float_bits(q), classes),
                **tile,
                **run.options,
            )
    return gradient
