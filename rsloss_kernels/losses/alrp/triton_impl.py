"""The aLRP loss's terms as a Triton kernel: one pass over the pairs of positives. Formulas: README.md beside this file;
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
    finalize,
    inverse_width,
    load_tile,
    steps_of_run,
)

EPS = tl.constexpr(1e-5)
# The rank of every positive among all elements.
RANK = OWN


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def alrp_terms_kernel(
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
        steps = tl.zeros([TILE, RUN], tl.float64)
        localisation = tl.zeros([TILE, RUN], tl.float64)
        while start < stop:
            other = start + tl.arange(0, RUN)
            h = steps_of_run(ranked_ptr, other, stop, centre, begin, end, per_width, IS_STEP, SEGMENTED)
            regression_loss = tl.load(ranked_ptr + capacity + other, mask=other < stop, other=0.0)[None, :]
            steps += h
            localisation += tl.where(other[None, :] == rank[:, None], 0.0, h * regression_loss)
            start += RUN
        # The positive itself counts 1; H(0) = 1/2 but for a hard step.
        among_positives = tl.maximum(tl.sum(steps, 1) + (0.0 if IS_STEP else 0.5), 1.0)
        above = tl.load(terms_ptr + FALSE_POSITIVES * capacity + rank, mask=is_valid, other=0.0)
        rank_among_all = among_positives + above
        is_ranked_below = above > EPS
        error = tl.where(is_ranked_below, (tl.sum(localisation, 1) + above) / rank_among_all, 0.0)
        coefficient = error / tl.where(is_ranked_below, above, 1.0)
        tl.store(terms_ptr + RANK * capacity + rank, rank_among_all, mask=is_valid)
        tl.store(terms_ptr + FIRST_VALUE * capacity + rank, above / rank_among_all, mask=is_valid)
        tl.store(terms_ptr + COEFFICIENT * capacity + rank, coefficient, mask=is_valid)
        tl.store(terms_ptr + FIRST_GRADIENT * capacity + rank, -error, mask=is_valid)


def alrp_finalize(logits, negatives, ranked, counts, bins, segments, num_segments, delta, gradient_scale):
    def write_terms(grid, tables, options):
        alrp_terms_kernel[grid](*tables, **options)

    return finalize(
        logits, ranked, counts, bins, segments, num_segments, delta, gradient_scale, write_terms, has_statistic=True
    )
