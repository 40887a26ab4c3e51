"""Rank & Sort as one broadcast: every positive against every negative that matters, through a P×K matrix.

The plain PyTorch that one writes to get rid of the loop. Eagerly the matrix is written to memory; under `torch.compile` its
sums are fused and it never is, at the price of evaluating it twice.
"""
import functools

import torch
from torch import Tensor

from bench.peers.identity_update import IdentityUpdate, mean, smooth_step, sums_over_positives, weighted_sum

EPS = 1e-10


def broadcast_core(
    positives: Tensor, quality: Tensor, negatives: Tensor, delta: float, fuse: bool = False
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    false = smooth_step(negatives[None, :] - positives[:, None], delta)  # [P, K], row i holds H(s_k - s_i)
    false_positives = false.sum(1)
    rank, sorting_error, given, landed = sums_over_positives(positives, quality, delta, EPS, fuse)
    ranking_error = false_positives / (rank + false_positives)
    is_ranked_below = false_positives > EPS
    coefficient = torch.where(is_ranked_below, ranking_error / false_positives, 0.0)
    of_positives = landed - given - torch.where(is_ranked_below, ranking_error, 0.0)
    return (mean(ranking_error), mean(sorting_error)), of_positives, weighted_sum(coefficient, false, fuse)


def vectorised_rank_sort(logits: Tensor, targets: Tensor, delta: float = 0.5) -> tuple[Tensor, Tensor]:
    """(ranking, sorting) for dense targets of the logits' shape; O(P×K + P×P) memory."""
    return IdentityUpdate.apply(logits, targets, delta, broadcast_core)


@functools.cache
def _compiled_core():
    return torch.compile(functools.partial(broadcast_core, fuse=True), dynamic=True, fullgraph=True)


def compiled_rank_sort(logits: Tensor, targets: Tensor, delta: float = 0.5) -> tuple[Tensor, Tensor]:
    """The same through `torch.compile` with dynamic shapes, as P and K change from step to step."""
    return IdentityUpdate.apply(logits, targets, delta, _compiled_core())
