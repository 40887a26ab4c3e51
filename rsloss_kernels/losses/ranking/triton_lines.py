"""What the Triton passes over elements and over values share: adding to the bins, and the gradient on the line of a bin."""
import triton
import triton.language as tl

from rsloss_kernels.losses.ranking.triton_common import offset_bits
from rsloss_kernels.losses.triton_common import power_of_two


@triton.jit
def add_to_bins(
    bins_ptr, used, counts_ptr, edges_ptr, index, value, count, wanted, exponent, DOUBLE: tl.constexpr, IS_STEP: tl.constexpr
):
    """`count` (int64) negatives of each value that are `wanted` into bin `index` of [2, used + 1], counts and fixed-point sums. Bin 0,
    below every breakpoint, is not to be `wanted`."""
    tl.atomic_add(bins_ptr + index, count, mask=wanted, sem="relaxed")
    if not IS_STEP:
        bits = offset_bits(counts_ptr, DOUBLE)
        left = tl.load(edges_ptr + index - 1, mask=wanted, other=0.0)
        offset = (value.to(tl.float64) - left.to(tl.float64)) * power_of_two(bits - exponent)
        most = power_of_two(bits) - 1
        offset = tl.where(offset > 0, tl.where(offset < most, offset, most), 0.0)
        tl.atomic_add(bins_ptr + used + 1 + index, offset.to(tl.int64) * count, mask=wanted, sem="relaxed")


@triton.jit
def upstream_of(grad_ptr):
    return tl.load(grad_ptr).to(tl.float64)


@triton.jit
def line_gradient(value, index, is_negative, edges_ptr, lines_ptr, counts_ptr, grad_first_ptr, capacity):
    """float64, on the line of the last breakpoint `index` at or below the value, -1 where there is none; 0 of what is no negative. After
    an overflow everything is NaN."""
    on_line = is_negative & (index >= 0)
    edge = tl.load(edges_ptr + index, mask=on_line, other=0.0)
    distance = tl.where(tl.abs(value) < float("inf"), value.to(tl.float64) - edge.to(tl.float64), 0.0)
    slope = tl.load(lines_ptr + 4 * capacity + index, mask=on_line, other=0.0)
    gradient = tl.load(lines_ptr + 2 * capacity + index, mask=on_line, other=0.0) + slope * distance
    upstream = 0.0
    if grad_first_ptr is not None:
        upstream = upstream_of(grad_first_ptr)
    gradient = tl.where(value == value, gradient * upstream, float("nan"))
    return tl.where(is_negative, gradient, 0.0) + tl.where(tl.load(counts_ptr) > capacity, float("nan"), 0.0)
