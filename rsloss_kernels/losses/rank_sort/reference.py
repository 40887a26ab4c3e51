"""Rank & Sort loss in plain PyTorch, float64 inside: the mathematics on the P positives.

Equation numbers refer to Oksuz et al., "Rank & Sort Loss for Object Detection and Instance Segmentation", ICCV 2021. The sums over
negatives come from the shared sweep (losses/ranking); the sums over positives are dominance sums in (logit, quality), done level by
level over the bits of the quality's rank: O(P log^2 P), no P×P matrix. README.md beside this file derives the forms used here.
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from rsloss_kernels.losses.ranking.sweep import Sweep

EPS = 1e-10


def rank_sort_finalize(
    logits, negatives, ranked, counts, bins, segments, num_segments, delta, gradient_scale, upstream_parity
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sweep = Sweep(logits, ranked, counts, bins, num_segments, delta, gradient_scale)
    false_positives = sweep.false_positives
    worse, worse_deficit, better, better_excess = compare_qualities(sweep)
    rank_among_positives = worse + better
    # Eq. 3: ranking error l_R(i) = N_FP(i) / rank(i), target 0.
    ranking_error = false_positives / (rank_among_positives + false_positives)
    # Eq. 6 minus Eq. 7, sorting error l_S(i) - l*_S(i), rearranged so that nothing cancels.
    sorting_error = (worse_deficit * better + better_excess * worse) / (better * rank_among_positives)

    # Eq. 4 and 8, identity update: an error is taken from the positive and shared among those that caused it.
    is_ranked_below, is_sorted_below = false_positives > EPS, worse > EPS
    coefficient = torch.where(is_ranked_below, ranking_error / false_positives, 0.0)
    weight = torch.where(is_sorted_below, sorting_error / worse, 0.0)
    ranking_gradient = torch.where(is_ranked_below, -ranking_error, 0.0)
    sorting_gradient = torch.where(is_sorted_below, -sorting_error, 0.0) + pull_of_better(sweep, weight)

    gradients = sweep.gradients(ranking_gradient, sorting_gradient)
    return sweep.loss(ranking_error), sweep.loss(sorting_error), gradients, sweep.lines(coefficient)


def compare_qualities(sweep: Sweep) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the positives j above i, weighted by H(s_j - s_i), split by quality.

    Returns [V] each: `worse` = sum of H over y_j < y_i; `worse_deficit` = sum of H (y_i - y_j) over the same; `better` = sum of H
    over y_j >= y_i (i itself included); `better_excess` = sum of H (y_j - y_i) over the same.
    """
    quality = sweep.quality
    rows = torch.stack([torch.ones_like(quality), quality])
    total = sweep.sums_above(rows)
    below = torch.zeros_like(rows)
    for lower_half, upper_half, node in _dominance_levels(sweep):
        below[:, upper_half] += sweep.sums_in_nodes(+1, rows, lower_half, upper_half, node)
    worse = below[0].clamp(min=0)
    better = (total[0] - worse).clamp(min=0.5)
    worse_deficit = (quality * worse - below[1]).clamp(min=0)
    better_excess = (total[1] - below[1] - quality * better).clamp(min=0)
    return worse, worse_deficit, better, better_excess


def pull_of_better(sweep: Sweep, weight: Tensor) -> Tensor:
    """Sum over the positives i with y_i > y_j of `weight_i H(s_j - s_i)`, for every positive j. [V]"""
    pull = torch.zeros_like(weight)
    for lower_half, upper_half, node in _dominance_levels(sweep):
        pull[lower_half] += sweep.sums_in_nodes(-1, weight[None], upper_half, lower_half, node)[0]
    return pull


def _dominance_levels(sweep: Sweep) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Splits all pairs with y_j < y_i of one segment by the highest bit in which the dense ranks of the qualities differ.

    Yields (ranks with that bit 0, ranks with that bit 1, node): j of the first and i of the second in one node make a pair.
    """
    distinct, dense_rank = sweep.quality.unique(return_inverse=True)
    segment_node = torch.zeros_like(dense_rank)
    if sweep.segment is not None:
        # Dense ranks start at 0 in every segment.
        first_key = sweep.segment * distinct.numel()
        keys, dense_rank = (first_key + dense_rank).unique(return_inverse=True)
        dense_rank = dense_rank - torch.searchsorted(keys, first_key)
        segment_node = sweep.segment
    most = int(dense_rank.max()) if dense_rank.numel() else 0
    for bit in range(most.bit_length()):
        is_upper = (dense_rank >> bit) & 1 == 1
        node = segment_node * (most + 1) + (dense_rank >> (bit + 1))
        yield (~is_upper).nonzero().squeeze(1), is_upper.nonzero().squeeze(1), node
