"""Bucketed losses: negatives between two neighbouring positives are represented by their mean logit.

Yavuz et al., "Bucketed Ranking-based Losses for Efficient Training of Object Detectors", ECCV 2024. Sorts all elements that
matter; equals Rank & Sort for delta = 0 only (without ties). The sort is stable with positives first, so that a negative with
exactly the logit of a positive falls into the bucket below it on every machine. The published code raises without a negative
that matters, and where a mean is rounded below the lowest positive; here the former count nothing and means are taken in float64.

The bucketed AP loss is the ranking part alone: no interpolated precision, and a positive counts 1/2 in its own rank. So it is
not AP loss in buckets, not even for delta = 0.
"""
import torch
from torch import Tensor

from bench.peers.identity_update import IdentityUpdate, mean, smooth_step, sums_over_positives


def bucketed_rank_sort_loss(logits: Tensor, targets: Tensor, delta: float = 0.5) -> tuple[Tensor, Tensor]:
    """(ranking, sorting) for dense targets of the logits' shape; O(P×P + N) memory."""
    return IdentityUpdate.apply(logits, targets, delta, _rank_sort_core)


def bucketed_average_precision_loss(logits: Tensor, targets: Tensor, delta: float = 1.0) -> Tensor:
    """One loss, 0-d, for dense targets of the logits' shape; every target above 0 is a positive. O(P×P + N) memory."""
    return IdentityUpdate.apply(logits, targets, delta, _average_precision_core)[0]


def _rank_sort_core(positives: Tensor, quality: Tensor, negatives: Tensor, delta: float):
    rank, sorting_error, given, landed = sums_over_positives(positives, quality, delta, 0.0, fuse=False)
    ranking_error, of_positives, of_negatives = _rank_in_buckets(positives, rank, negatives, delta)
    return (mean(ranking_error), mean(sorting_error)), of_positives + landed - given, of_negatives


def _average_precision_core(positives: Tensor, quality: Tensor, negatives: Tensor, delta: float):
    rank = smooth_step(positives[None, :] - positives[:, None], delta).sum(1)
    ranking_error, of_positives, of_negatives = _rank_in_buckets(positives, rank, negatives, delta)
    return (mean(ranking_error),), of_positives, of_negatives


def _rank_in_buckets(positives: Tensor, rank: Tensor, negatives: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Ranking errors [P], and the gradient of the positives [P] and of the negatives [K]."""
    count = positives.numel()
    order = torch.cat([positives, negatives]).sort(descending=True, stable=True).indices
    is_positive = order < count
    # Bucket b holds the negatives that follow exactly b positives; P + 1 buckets, some of them empty.
    bucket = is_positive.cumsum(0)[~is_positive]  # [K], in sorted order
    in_order = order[~is_positive] - count  # [K]
    size = torch.bincount(bucket, minlength=count + 1)
    total = torch.zeros(count + 1, dtype=torch.float64, device=negatives.device)
    total.index_add_(0, bucket, negatives[in_order].double())
    centre = (total / size.clamp(min=1)).to(negatives.dtype)

    false = smooth_step(centre[None, :] - positives[:, None], delta)  # [P, P + 1]
    false_positives = false @ size.to(negatives.dtype)
    ranking_error = false_positives / (rank + false_positives)
    coefficient = torch.where(false_positives > 0, ranking_error / false_positives, 0.0)
    of_negatives = torch.empty_like(negatives)
    of_negatives[in_order] = (coefficient @ false)[bucket]
    return ranking_error, torch.where(false_positives > 0, -ranking_error, 0.0), of_negatives
