"""The ranking losses computed the published way: a Python loop over the positives, each against all other elements.

Oksuz et al., "Rank & Sort Loss for Object Detection and Instance Segmentation", ICCV 2021; Chen et al., "Towards Accurate
One-Stage Object Detection with AP-Loss", CVPR 2019; Oksuz et al., "A Ranking-based, Balanced Loss Function Unifying
Classification and Localisation in Object Detection", NeurIPS 2020. Told in our own words, with the numerics of those
algorithms: sums in the dtype of the logits, only negatives that can reach the lowest positive. 10 to 25 small tensor operations
and one or two waits for the device per positive: the cost that this library removes.

All take targets of the logits' shape: 0 a negative, below 0 ignored. What they return is in the dtype of `logits`.
"""
import functools

import torch
from torch import Tensor

from bench.peers.identity_update import IdentityUpdate, mean, smooth_step

EPSILON = 1e-10
ALRP_EPSILON = 1e-5


def published_rank_sort(logits: Tensor, targets: Tensor, delta: float = 0.5) -> tuple[Tensor, Tensor]:
    """Ranking and sorting loss, 0-d; to be added and differentiated together. targets above 0: positives with that quality."""
    return IdentityUpdate.apply(logits, targets, delta, _rank_sort_loop)


def published_average_precision(logits: Tensor, targets: Tensor, delta: float = 1.0) -> Tensor:
    """AP loss, 0-d. Only targets of exactly 1 are positives. `delta` = 0, a division by zero as published, is a hard step."""
    return IdentityUpdate.apply(logits, targets, delta, _average_precision_loop, True)[0]


def published_alrp(
    logits: Tensor, targets: Tensor, regression_losses: Tensor, delta: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Classification loss, 0-d, rank [P], and order [P]: the positives by ascending logit. Positives as for AP, in flat order.

    Args:
        regression_losses: [P], of the positives in flat order.
    """
    core = functools.partial(_alrp_loop, regression_losses=regression_losses.detach().to(logits.dtype))
    loss, rank, order = IdentityUpdate.apply(logits, targets, delta, core, True)
    return loss, rank.detach(), order


def published_alrp_regression(regression_losses: Tensor, rank: Tensor, order: Tensor) -> Tensor:
    """The localisation part: with the best score first, the mean of the running sums of the losses over their ranks."""
    best_first = order.flip(0)
    return mean(regression_losses[best_first].cumsum(0) / rank[best_first])


def _rank_sort_loop(positives: Tensor, quality: Tensor, negatives: Tensor, delta: float):
    positive_gradient, negative_gradient = torch.zeros_like(positives), torch.zeros_like(negatives)
    ranking_errors, sorting_errors = torch.zeros_like(positives), torch.zeros_like(positives)
    for i in torch.argsort(positives):
        above = smooth_step(positives - positives[i], delta)  # [P]
        false = smooth_step(negatives - positives[i], delta)  # [K]
        rank_among_positives, false_positives = above.sum(), false.sum()
        ranking_errors[i] = false_positives / (rank_among_positives + false_positives)

        belongs_above = quality >= quality[i]
        current = (above * (1 - quality)).sum() / rank_among_positives
        ideal = above * belongs_above
        target = (ideal * (1 - quality)).sum() / ideal.sum()
        sorting_errors[i] = current - target

        if false_positives > EPSILON:
            positive_gradient[i] -= ranking_errors[i]
            negative_gradient += false * (ranking_errors[i] / false_positives)
        misplaced = above * ~belongs_above
        total_misplaced = misplaced.sum()
        if total_misplaced > EPSILON:
            positive_gradient[i] -= sorting_errors[i]
            positive_gradient += misplaced * (sorting_errors[i] / total_misplaced)
    return (mean(ranking_errors), mean(sorting_errors)), positive_gradient, negative_gradient


def _average_precision_loop(positives: Tensor, quality: Tensor, negatives: Tensor, delta: float):
    positive_gradient, negative_gradient = torch.zeros_like(positives), torch.zeros_like(negatives)
    missed = torch.zeros_like(positives)  # 1 - interpolated precision
    best = positives.new_zeros(())
    for i in torch.argsort(positives):
        above, false = _others_above(positives, negatives, i, delta)
        rank_among_positives = 1 + above.sum()
        rank = rank_among_positives + false.sum()
        precision = rank_among_positives / rank
        share = 1 / rank
        if best <= precision:
            best = precision
        else:
            share = share * (1 - best) / (1 - precision)
        missed[i] = 1 - best
        positive_gradient[i] = -missed[i]
        negative_gradient += false * share
    return (mean(missed),), positive_gradient, negative_gradient


def _alrp_loop(positives: Tensor, quality: Tensor, negatives: Tensor, delta: float, regression_losses: Tensor):
    positive_gradient, negative_gradient = torch.zeros_like(positives), torch.zeros_like(negatives)
    rank, missed = torch.zeros_like(positives), torch.zeros_like(positives)
    order = torch.argsort(positives)
    for i in order:
        above, false = _others_above(positives, negatives, i, delta)
        false_positives = false.sum()
        rank[i] = 1 + above.sum() + false_positives
        missed[i] = false_positives / rank[i]
        if false_positives > ALRP_EPSILON:
            error = ((above * regression_losses).sum() + false_positives) / rank[i]
            positive_gradient[i] = -error
            negative_gradient += false * (error / false_positives)
    return (mean(missed), rank, order), positive_gradient, negative_gradient


def _others_above(positives: Tensor, negatives: Tensor, i: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """H of the positives [P], 0 for positive i itself, and of the negatives [K]."""
    above = smooth_step(positives - positives[i], delta)
    above[i] = 0
    return above, smooth_step(negatives - positives[i], delta)
