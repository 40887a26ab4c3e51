"""Rank & Sort's terms as Triton kernels: two passes over the pairs of positives. Formulas: README.md beside this file;
everything else: ../ranking/triton_finalize.py.
"""
import triton
import triton.language as tl

from rsloss_kernels.losses.ranking.triton_common import PLAIN_INTEGERS
from rsloss_kernels.losses.ranking.triton_finalize import (
    COEFFICIENT,
    FALSE_POSITIVES,
    FIRST_GRADIENT,
    FIRST_VALUE,
    OWN,
    SECOND_GRADIENT,
    SECOND_VALUE,
    finalize,
    inverse_width,
    load_tile,
    steps_of_run,
    window_step,
)

EPS = tl.constexpr(1e-10)
# The share of a sorting error per unit of H that a worse positive takes; 0 means that nothing is shared out.
WEIGHT = OWN


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def rank_sort_terms_kernel(
    ranked_ptr,
    slots_ptr,
    sizes_ptr,
    ranges_ptr,
    terms_ptr,
    capacity,
    delta_bits,
    IS_STEP: tl.constexpr,
    SEGMENTED: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
):
    valid = tl.load(sizes_ptr)
    first = tl.program_id(0) * TILE
    if first < valid:
        per_width = inverse_width(delta_bits, IS_STEP)
        rank, is_valid, centre, begin, end, start, stop = load_tile(
            ranked_ptr, slots_ptr, ranges_ptr, first, valid, capacity, TILE, SEGMENTED
        )
        quality = tl.load(ranked_ptr + capacity + rank, mask=is_valid, other=0.0)[:, None]
        worse = tl.zeros([TILE, RUN], tl.float64)
        better = tl.zeros([TILE, RUN], tl.float64)
        worse_deficit = tl.zeros([TILE, RUN], tl.float64)
        better_excess = tl.zeros([TILE, RUN], tl.float64)
        while start < stop:
            other = start + tl.arange(0, RUN)
            h = steps_of_run(ranked_ptr, other, stop, centre, begin, end, per_width, IS_STEP, SEGMENTED)
            gap = tl.load(ranked_ptr + capacity + other, mask=other < stop, other=0.0)[None, :] - quality
            is_worse = gap < 0
            worse += tl.where(is_worse, h, 0.0)
            better += tl.where(is_worse, 0.0, h)
            worse_deficit -= tl.where(is_worse, h * gap, 0.0)
            better_excess += tl.where(is_worse, 0.0, h * gap)
            start += RUN

        worse_sum = tl.sum(worse, 1)
        better_sum = tl.maximum(tl.sum(better, 1), 0.5)
        among_positives = worse_sum + better_sum
        above = tl.load(terms_ptr + FALSE_POSITIVES * capacity + rank, mask=is_valid, other=0.0)
        ranking_error = above / (among_positives + above)
        spread = tl.sum(worse_deficit, 1) * better_sum + tl.sum(better_excess, 1) * worse_sum
        sorting_error = spread / (better_sum * among_positives)
        is_ranked_below, is_sorted_below = above > EPS, worse_sum > EPS
        coefficient = tl.where(is_ranked_below, 1.0 / (among_positives + above), 0.0)
        weight = tl.where(is_sorted_below, sorting_error / tl.where(is_sorted_below, worse_sum, 1.0), 0.0)
        tl.store(terms_ptr + FIRST_VALUE * capacity + rank, ranking_error, mask=is_valid)
        tl.store(terms_ptr + SECOND_VALUE * capacity + rank, sorting_error, mask=is_valid)
        tl.store(terms_ptr + COEFFICIENT * capacity + rank, coefficient, mask=is_valid)
        tl.store(terms_ptr + WEIGHT * capacity + rank, weight, mask=is_valid)
        of_ranking = tl.where(is_ranked_below, -ranking_error, 0.0)
        tl.store(terms_ptr + FIRST_GRADIENT * capacity + rank, of_ranking, mask=is_valid)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def pull_kernel(
    ranked_ptr,
    slots_ptr,
    sizes_ptr,
    ranges_ptr,
    terms_ptr,
    capacity,
    delta_bits,
    IS_STEP: tl.constexpr,
    SEGMENTED: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
):
    """The sorting gradient: a positive's own error, and what it takes of those that it is worse than but above."""
    valid = tl.load(sizes_ptr)
    first = tl.program_id(0) * TILE
    if first < valid:
        per_width = inverse_width(delta_bits, IS_STEP)
        rank, is_valid, centre, begin, end, _, _ = load_tile(
            ranked_ptr, slots_ptr, ranges_ptr, first, valid, capacity, TILE, SEGMENTED
        )
        centre = centre[:, None]
        quality = tl.load(ranked_ptr + capacity + rank, mask=is_valid, other=0.0)[:, None]
        # Positives of the last one's segment whose window starts above its window lie above it too.
        last = tl.minimum(first + TILE, valid) - 1
        stop = tl.load(slots_ptr + capacity + last) - last
        pull = tl.zeros([TILE, RUN], tl.float64)
        start = tl.min(tl.where(is_valid, begin, valid))
        while start < stop:
            other = start + tl.arange(0, RUN)
            is_other = other < stop
            other_centre = tl.load(ranked_ptr + other, mask=is_other, other=0.0)[None, :]
            other_quality = tl.load(ranked_ptr + capacity + other, mask=is_other, other=0.0)[None, :]
            weight = tl.load(terms_ptr + WEIGHT * capacity + other, mask=is_other, other=0.0)[None, :]
            takes = other_quality > quality
            if SEGMENTED:
                takes = takes & (other[None, :] >= begin[:, None]) & (other[None, :] < end[:, None])
            pull += tl.where(takes, weight * window_step(centre - other_centre, per_width, IS_STEP), 0.0)
            start += RUN
        sorting_error = tl.load(terms_ptr + SECOND_VALUE * capacity + rank, mask=is_valid, other=0.0)
        is_sorted_below = tl.load(terms_ptr + WEIGHT * capacity + rank, mask=is_valid, other=0.0) > 0
        of_sorting = tl.where(is_sorted_below, -sorting_error, 0.0) + tl.sum(pull, 1)
        tl.store(terms_ptr + SECOND_GRADIENT * capacity + rank, of_sorting, mask=is_valid)


def rank_sort_finalize(
    logits, negatives, ranked, counts, bins, segments, num_segments, delta, gradient_scale, upstream_parity
):
    def write_terms(grid, tables, options):
        rank_sort_terms_kernel[grid](*tables, **options)
        pull_kernel[grid](*tables, **options)

    return finalize(
        logits, ranked, counts, bins, segments, num_segments, delta, gradient_scale, write_terms, num_losses=2
    )
