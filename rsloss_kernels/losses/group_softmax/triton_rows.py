"""One row of logits in one group in Triton: its label, the sum of its exponentials, its terms. Float64 inside.

Formulas: README.md beside this file. A tuple of the layout is a constant of a kernel: nothing of it is copied to the device.
"""
import triton
import triton.language as tl

from rsloss_kernels.losses.triton_common import exp_of_minus


@triton.jit
def pick(VALUES: tl.constexpr, index):
    """VALUES[index]."""
    result = index * 0
    for k in tl.static_range(len(VALUES)):
        result = tl.where(index == k, VALUES[k], result)
    return result


@triton.jit
def column_of_label(labels_ptr, class_columns_ptr, row, is_row, num_classes, BACKGROUND_FIRST: tl.constexpr):
    """The column of each row's label, and whether the row is not ignored."""
    label = tl.load(labels_ptr + row, mask=is_row, other=-1)
    is_used = label >= 0
    if BACKGROUND_FIRST:
        label = tl.where(label == 0, num_classes, label - 1)
    label = tl.where(is_used & (label < num_classes), label, num_classes).to(tl.int32)
    return tl.load(class_columns_ptr + label), is_used


@triton.jit
def sum_row(logits_ptr, row, is_used, start, end, has_others, NUM_COLUMNS: tl.constexpr, COLUMNS: tl.constexpr):
    """The largest logit of each row in a group, the sum `r` of the other exponentials, and whether any logit is NaN or +inf."""
    lane = tl.arange(0, COLUMNS)[None, :]
    rows_ptr = logits_ptr + (row.to(tl.int64) * NUM_COLUMNS)[:, None]
    # Without a column the others have the logit 0.
    nothing = row * 0.0
    largest = nothing.to(tl.float64) + tl.where(has_others, float("-inf"), 0.0)
    num_bad = row * 0
    column = start
    while column < end:
        inside = is_used[:, None] & (lane < end - column)
        value = tl.load(rows_ptr + column + lane, mask=inside, other=float("-inf")).to(tl.float64)
        is_bad = (value != value) | (value == float("inf"))
        num_bad += tl.sum(is_bad.to(tl.int32), 1)
        largest = tl.maximum(largest, tl.max(tl.where(is_bad, float("-inf"), value), 1))
        column += COLUMNS
    is_bad = (num_bad > 0) | (largest == float("-inf"))
    largest = tl.where(is_bad, 0.0, largest)
    ties = tl.where(has_others | (largest != 0), 0, 1)
    below = tl.where(has_others | (largest == 0), 0.0, exp_of_minus(largest))
    column = start
    while column < end:
        inside = is_used[:, None] & (lane < end - column)
        value = tl.load(rows_ptr + column + lane, mask=inside, other=float("-inf")).to(tl.float64)
        top = largest[:, None]
        ties += tl.sum((value == top).to(tl.int32), 1)
        below += tl.sum(tl.where(value < top, exp_of_minus(top - value), 0.0), 1)
        column += COLUMNS
    return largest, below + (ties - 1), is_bad


@triton.jit
def order_of_key(key):
    """Orders float32 keys as integers, NaN last."""
    bits = key.to(tl.int32, bitcast=True).to(tl.int64)
    order = tl.where(bits < 0, -1 - bits, bits + (1 << 31))
    order = tl.where(key == 0, 1 << 31, order)
    return tl.where(key == key, order, (1 << 32) - 1)
