"""Rank & Sort loss in plain PyTorch, float64 inside: the mathematics on the P positives.

Equation numbers refer to Oksuz et al., "Rank & Sort Loss for Object Detection and Instance Segmentation", ICCV 2021. The sums over
negatives come from the shared sweep (losses/ranking); the sums over positives are dominance sums in (logit, quality), done level by
level over the bits of the quality's rank: O(P log^2 P), no P×P matrix. README.md beside this file derives the forms used here.
"""
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from rsloss_kernels.losses.ranking import reference as ranking
from rsloss_kernels.losses.ranking.op import GRADIENT_ROWS

EPS = 1e-10


def rank_sort_finalize(
    logits, negatives, ranked, counts, bins, segments, num_segments, delta, gradient_scale, upstream_parity
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = ranking.arithmetic_type(logits[0].dtype)
    capacity = ranked.shape[1]
    is_valid = ranked[0].isfinite()
    centre, quality = ranked[0, is_valid], ranked[1, is_valid]
    num_positives = max(centre.numel(), 1)
    windows = Windows(centre, delta, dtype)

    false_positives = ranking.false_positives(bins, centre, delta, dtype, ranking.count_elements(logits))
    worse, worse_deficit, better, better_excess = compare_qualities(windows, quality)
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
    sorting_gradient = torch.where(is_sorted_below, -sorting_error, 0.0) + pull_of_better(windows, quality, weight)

    scale = gradient_scale / num_positives
    gradients = torch.zeros((GRADIENT_ROWS, capacity), dtype=torch.float64, device=ranked.device)
    gradients[0] = ranked[3]
    gradients[1:] = torch.where(ranked[3] >= 0, torch.nan, 0.0)
    gradients[1, is_valid], gradients[2, is_valid] = ranking_gradient * scale, sorting_gradient * scale
    lines = ranking.gradient_lines(centre, coefficient * scale, delta, dtype, capacity)

    losses = torch.stack([ranking_error.sum(), sorting_error.sum()]) / num_positives
    is_broken = (counts[0] > capacity) | (bins[0, 0] > 0) | ((ranked[3] >= 0) & ~is_valid).any()
    losses = torch.where(is_broken, torch.nan, losses).to(dtype)
    return losses[0].clone(), losses[1].clone(), gradients, lines


class Windows:
    """For every positive, ascending by logit, the ranks of those inside its window: `lo <= s_j < hi`."""

    def __init__(self, centre: Tensor, delta: float, dtype: torch.dtype):
        self.centre = centre  # [V]
        self.delta = delta
        lo, hi = ranking.breakpoints(centre, delta, dtype)
        self.lower = torch.searchsorted(centre, lo)  # [V]
        self.upper = torch.searchsorted(centre, hi)  # [V]
        # The first rank that H(s_i - s_j) does not count in full, seen from j.
        self.full_end = self.lower if delta > 0 else torch.searchsorted(centre, centre, right=True)
        _, lo_slot, hi_slot = ranking.merge_breakpoints(lo, hi)
        edges = torch.zeros(2 * centre.numel(), dtype=torch.float64, device=centre.device)
        edges[lo_slot], edges[hi_slot] = centre, centre
        self.offset = centre - ranking.clusters(lo_slot, hi_slot, edges)[lo_slot] if centre.numel() else centre

    def steps(self, sign: int, values: Tensor, member: Tensor, of: Tensor, node: Tensor) -> Tensor:
        """Sums of `values_j H(sign (s_j - s_i))` over the members j in the node of i, for every positive i in `of`.

        sign: +1 or -1. values: [rows, V]. member, of: ranks. node: [V]. Returns [rows, len(of)].
        """
        size = self.centre.numel()
        keys, order = (node[member] * size + member).sort()
        member = member[order]
        prefix = pad(values[:, member].cumsum(1), (1, 0))
        moment = pad((values[:, member] * self.offset[member]).cumsum(1), (1, 0))
        first_key = node[of] * size
        lower = torch.searchsorted(keys, first_key + self.lower[of])
        upper = torch.searchsorted(keys, first_key + self.upper[of])
        if sign > 0:
            full = prefix[:, torch.searchsorted(keys, first_key + size)] - prefix[:, upper]
        else:
            full_end = torch.searchsorted(keys, first_key + self.full_end[of])
            full = prefix[:, full_end] - prefix[:, torch.searchsorted(keys, first_key)]
        if self.delta == 0:
            return full
        inside = prefix[:, upper] - prefix[:, lower]
        distance = moment[:, upper] - moment[:, lower] - inside * self.offset[of]
        return full + 0.5 * inside + sign * distance / (2 * self.delta)


def compare_qualities(windows: Windows, quality: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the positives j above i, weighted by H(s_j - s_i), split by quality.

    Returns [V] each: `worse` = sum of H over y_j < y_i; `worse_deficit` = sum of H (y_i - y_j) over the same; `better` = sum of H
    over y_j >= y_i (i itself included); `better_excess` = sum of H (y_j - y_i) over the same.
    """
    everyone = torch.arange(quality.numel(), device=quality.device)
    rows = torch.stack([torch.ones_like(quality), quality])
    total = windows.steps(+1, rows, everyone, everyone, torch.zeros_like(everyone))
    below = torch.zeros_like(rows)
    for lower_half, upper_half, node in _dominance_levels(quality):
        below[:, upper_half] += windows.steps(+1, rows, lower_half, upper_half, node)
    worse = below[0].clamp(min=0)
    better = (total[0] - worse).clamp(min=0.5)
    worse_deficit = (quality * worse - below[1]).clamp(min=0)
    better_excess = (total[1] - below[1] - quality * better).clamp(min=0)
    return worse, worse_deficit, better, better_excess


def pull_of_better(windows: Windows, quality: Tensor, weight: Tensor) -> Tensor:
    """Sum over the positives i with y_i > y_j of `weight_i H(s_j - s_i)`, for every positive j. [V]"""
    pull = torch.zeros_like(weight)
    for lower_half, upper_half, node in _dominance_levels(quality):
        pull[lower_half] += windows.steps(-1, weight[None], upper_half, lower_half, node)[0]
    return pull


def _dominance_levels(quality: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Splits all pairs with y_j < y_i by the highest bit in which the dense ranks of the qualities differ.

    Yields (ranks with that bit 0, ranks with that bit 1, node): j of the first and i of the second in one node make a pair.
    """
    distinct, dense_rank = quality.unique(return_inverse=True)
    for bit in range((distinct.numel() - 1).bit_length() if distinct.numel() else 0):
        is_upper = (dense_rank >> bit) & 1 == 1
        yield (~is_upper).nonzero().squeeze(1), is_upper.nonzero().squeeze(1), dense_rank >> (bit + 1)
