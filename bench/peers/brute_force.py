"""The truth that accuracy is measured against: every pair, float64, in pieces that stay in the cache."""
import torch
from torch import Tensor

from bench.peers.identity_update import sums_over_positives

# Elements at a time: what stays in a core's cache, or fills a GPU.
PIECE = {"cpu": 1 << 15, "cuda": 1 << 22}
EPS = 1e-10


def brute_force_rank_sort(logits: Tensor, targets: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(ranking, sorting, gradient of their sum) in float64 for dense targets and at least one positive; delta above 0."""
    flat, flat_targets = logits.detach().double().reshape(-1), targets.double().reshape(-1)
    is_positive = flat_targets > 0
    positives, quality = flat[is_positive], flat_targets[is_positive]
    is_relevant = (flat_targets == 0) & (flat >= positives.min() - delta)
    negatives = flat[is_relevant]
    rank, sorting_error, of_positives = _over_positives(positives, quality, delta)

    # H(s_k - s_i) = clamp(s_k / (2 delta) + (1/2 - s_i / (2 delta)), 0, 1)
    scaled, shift = negatives / (2 * delta), 0.5 - positives / (2 * delta)
    false_positives = torch.zeros_like(positives)
    for piece in scaled.split(PIECE[flat.device.type]):
        for i, offset in enumerate(shift.tolist()):
            false_positives[i] += (piece + offset).clamp_(0, 1).sum()
    ranking_error = false_positives / (rank + false_positives)
    is_ranked_below = false_positives > EPS
    coefficient = torch.where(is_ranked_below, ranking_error / false_positives, 0.0).tolist()
    of_negatives = torch.zeros_like(negatives)
    for piece, result in zip(scaled.split(PIECE[flat.device.type]), of_negatives.split(PIECE[flat.device.type]), strict=True):
        for offset, value in zip(shift.tolist(), coefficient, strict=True):
            result.add_((piece + offset).clamp_(0, 1), alpha=value)

    gradient = torch.zeros_like(flat)
    gradient[is_positive] = (of_positives - torch.where(is_ranked_below, ranking_error, 0.0)) / positives.numel()
    gradient[is_relevant] = of_negatives / positives.numel()
    return ranking_error.mean(), sorting_error.mean(), gradient.reshape(logits.shape)


def _over_positives(positives: Tensor, quality: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    ranks, errors, gradient = [], [], torch.zeros_like(positives)
    rows_at_once = max(1, 8 * PIECE[positives.device.type] // positives.numel())
    for start in range(0, positives.numel(), rows_at_once):
        rows = slice(start, start + rows_at_once)
        rank, error, given, landed = sums_over_positives(positives, quality, delta, EPS, False, rows)
        ranks.append(rank)
        errors.append(error)
        gradient += landed
        gradient[rows] -= given
    return torch.cat(ranks), torch.cat(errors), gradient
