"""The Rank & Sort loss computed the published way: a Python loop over the positives, each against all other elements.

Oksuz et al., "Rank & Sort Loss for Object Detection and Instance Segmentation", ICCV 2021. Told in our own words, with the
numerics of that algorithm: sums in the dtype of the logits, only negatives that can reach the lowest positive, each sorting
error as current minus target. About 25 small tensor operations and two waits for the device per positive: the cost that
`rank_sort_loss` removes.
"""

import torch
from torch import Tensor

EPSILON = 1e-10


class _PublishedRankSort(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, delta: float) -> tuple[Tensor, Tensor]:
        flat_logits, flat_targets = logits.reshape(-1), targets.reshape(-1)
        gradient = torch.zeros_like(flat_logits)
        is_positive = flat_targets > 0
        positives, quality = flat_logits[is_positive], flat_targets[is_positive].to(flat_logits.dtype)  # [P]
        count = positives.numel()
        ctx.shape = logits.shape
        if count == 0:
            ctx.save_for_backward(gradient)
            return flat_logits.new_zeros(()), flat_logits.new_zeros(())

        is_relevant = (flat_targets == 0) & (flat_logits >= positives.min() - delta)
        negatives = flat_logits[is_relevant]  # [K]
        positive_gradient, negative_gradient = torch.zeros_like(positives), torch.zeros_like(negatives)
        ranking_errors, sorting_errors = torch.zeros_like(positives), torch.zeros_like(positives)

        for i in torch.argsort(positives):
            above = _smooth_step(positives - positives[i], delta)  # [P]
            false = _smooth_step(negatives - positives[i], delta)  # [K]
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

        gradient[is_positive] = positive_gradient / count
        gradient[is_relevant] = negative_gradient / count
        ctx.save_for_backward(gradient)
        return ranking_errors.mean(), sorting_errors.mean()

    @staticmethod
    def backward(ctx, grad_ranking: Tensor, grad_sorting: Tensor):
        # As published: one gradient for both errors, scaled by the upstream gradient of the ranking loss alone.
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_ranking).reshape(ctx.shape), None, None


def _smooth_step(difference: Tensor, delta: float) -> Tensor:
    if delta > 0:
        return (difference / (2 * delta) + 0.5).clamp(0, 1)
    return (difference >= 0).to(difference.dtype)


def published_rank_sort(logits: Tensor, targets: Tensor, delta: float = 0.5) -> tuple[Tensor, Tensor]:
    """Ranking and sorting loss, 0-d, in the dtype of `logits`; to be added and differentiated together.

    Args:
        logits: any shape, floating.
        targets: dense, the shape of `logits`: above 0 a positive with that quality, 0 a negative, below 0 ignored.
        delta: half-width of the smoothed step; 0 is a hard step that counts ties.

    Where the published loop raises (no positives), both losses are zeros connected to the graph.
    """
    return _PublishedRankSort.apply(logits, targets, delta)
