"""The AP loss's terms as Triton kernels: one pass over the pairs of positives, then the running minimum of their errors.
Formulas: README.md beside this file; everything else: ../ranking/triton_finalize.py.
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
    ranks_of_segment,
    steps_of_run,
)
from rsloss_kernels.losses.triton_common import configuration

# 1 - precision at every positive.
ERROR = OWN


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def precision_kernel(
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
        while start < stop:
            other = start + tl.arange(0, RUN)
            steps += steps_of_run(ranked_ptr, other, stop, centre, begin, end, per_width, IS_STEP, SEGMENTED)
            start += RUN
        # The positive itself counts 1; H(0) = 1/2 but for a hard step.
        among_positives = tl.sum(steps, 1) + (0.0 if IS_STEP else 0.5)
        above = tl.load(terms_ptr + FALSE_POSITIVES * capacity + rank, mask=is_valid, other=0.0)
        error = above / (tl.maximum(among_positives, 1.0) + above)
        tl.store(terms_ptr + ERROR * capacity + rank, error, mask=is_valid)


@triton.jit
def minimum_in_segment(segment, value, next_segment, next_value):
    """Of two neighbouring runs of ranks: the last segment, and the least value of its own."""
    return next_segment, tl.where(segment == next_segment, tl.minimum(value, next_value), next_value)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def interpolation_kernel(
    ranked_ptr,
    slots_ptr,
    sizes_ptr,
    ranges_ptr,
    terms_ptr,
    capacity,
    delta_bits,
    INTERPOLATED: tl.constexpr,
    SEGMENTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The least error among the positives of the segment up to every rank. A minimum is exact in any order."""
    valid = tl.load(sizes_ptr)
    first = tl.program_id(0) * BLOCK
    if first < valid:
        rank = first + tl.arange(0, BLOCK)
        is_valid = rank < valid
        error = tl.load(terms_ptr + ERROR * capacity + rank, mask=is_valid, other=float("inf"))
        if INTERPOLATED:
            begin, _ = ranks_of_segment(ranked_ptr, ranges_ptr, rank, valid, capacity, SEGMENTED)
            begin = tl.where(is_valid, begin, capacity)
            first_begin = tl.min(begin)
            before = tl.full([BLOCK], float("inf"), tl.float64)
            start = first_begin
            while start < first:
                other = start + tl.arange(0, BLOCK)
                before = tl.minimum(
                    before, tl.load(terms_ptr + ERROR * capacity + other, mask=other < first, other=float("inf"))
                )
                start += BLOCK
            # A segment is told by its first rank.
            _, error = tl.associative_scan((begin, error), 0, minimum_in_segment)
            error = tl.where(begin == first_begin, tl.minimum(error, tl.min(before)), error)
        above = tl.load(terms_ptr + FALSE_POSITIVES * capacity + rank, mask=is_valid, other=0.0)
        coefficient = tl.where(above > 0, error / tl.where(above > 0, above, 1.0), 0.0)
        tl.store(terms_ptr + FIRST_VALUE * capacity + rank, error, mask=is_valid)
        tl.store(terms_ptr + COEFFICIENT * capacity + rank, coefficient, mask=is_valid)
        tl.store(terms_ptr + FIRST_GRADIENT * capacity + rank, -error, mask=is_valid)


def average_precision_finalize(
    logits, negatives, ranked, counts, bins, segments, num_segments, delta, gradient_scale, interpolated
):
    def write_terms(grid, tables, options):
        precision_kernel[grid](*tables, **options)
        run = configuration("ranking table", tables.capacity, ranked.device)
        constants = {"INTERPOLATED": interpolated, "SEGMENTED": options["SEGMENTED"]}
        interpolation_kernel[triton.cdiv(tables.capacity, run.block),](*tables, **constants, **run.arguments)

    return finalize(logits, ranked, counts, bins, segments, num_segments, delta, gradient_scale, write_terms)
