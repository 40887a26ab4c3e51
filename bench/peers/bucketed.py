"""Bucketed Rank & Sort: negatives between two neighbouring positives are represented by their mean logit.

Yavuz et al., "Bucketed Ranking-based Losses for Efficient Training of Object Detectors", ECCV 2024. Sorts all elements that
matter; equals Rank & Sort for delta = 0 only (without ties). The sort is stable with positives first, so that a negative with
exactly the logit of a positive falls into the bucket below it on every machine.
"""
import torch
from torch import Tensor

from bench.peers.identity_update import IdentityUpdate, smooth_step, sums_over_positives


def bucketed_core(positives: Tensor, quality: Tensor, negatives: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = positives.numel()
    order = torch.cat([positives, negatives]).sort(descending=True, stable=True).indices
    is_positive = order < count
    # Bucket b holds the negatives that follow exactly b positives; P + 1 buckets, some of them empty.
    bucket = is_positive.cumsum(0)[~is_positive]  # [K], in sorted order
    in_order = order[~is_positive] - count  # [K]
    size = torch.zeros(count + 1, dtype=negatives.dtype, device=negatives.device)
    size.index_add_(0, bucket, torch.ones_like(negatives))
    mean = torch.zeros_like(size).index_add_(0, bucket, negatives[in_order]) / size.clamp(min=1)

    false = smooth_step(mean[None, :] - positives[:, None], delta)  # [P, P + 1]
    false_positives = false @ size
    rank, sorting_error, given, landed = sums_over_positives(positives, quality, delta, 0.0, fuse=False)
    ranking_error = false_positives / (rank + false_positives)
    coefficient = torch.where(false_positives > 0, ranking_error / false_positives, 0.0)
    of_negatives = torch.empty_like(negatives)
    of_negatives[in_order] = (coefficient @ false)[bucket]
    of_positives = landed - given - torch.where(false_positives > 0, ranking_error, 0.0)
    return ranking_error, sorting_error, of_positives, of_negatives


def bucketed_rank_sort(logits: Tensor, targets: Tensor, delta: float = 0.5) -> tuple[Tensor, Tensor]:
    """(ranking, sorting) for dense targets of the logits' shape; O(P×P + N) memory."""
    return IdentityUpdate.apply(logits, targets, delta, bucketed_core)
