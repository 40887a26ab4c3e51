"""What the peers share: the step, the sums over positives, and the autograd shell around a core.

A core maps (positives [P], quality [P], negatives [K], delta) to (outputs, gradient of the positives [P], gradient of the
negatives [K]): a tuple of what the loss returns, and gradients not yet divided by P. The shell picks the positives and the
negatives that can reach the lowest of them, and puts the gradients back. Positives are targets above 0, or (AP and aLRP as
published) of exactly 1; what lies between is then ignored. Where the published code raises (no positives), losses are zeros
connected to the graph.
"""
from collections.abc import Callable

import torch
from torch import Tensor


def smooth_step(difference: Tensor, delta: float) -> Tensor:
    if delta > 0:
        return (difference / (2 * delta) + 0.5).clamp(0, 1)
    return (difference >= 0).to(difference.dtype)


def weighted_sum(weights: Tensor, matrix: Tensor, fuse: bool) -> Tensor:
    """`weights @ matrix`. As a product and a sum a compiler can fuse it, so that the matrix is never written to memory."""
    return (weights[:, None] * matrix).sum(0) if fuse else weights @ matrix


def sums_over_positives(
    positives: Tensor, quality: Tensor, delta: float, eps: float, fuse: bool, rows: slice = slice(None)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums over positives of the positives `rows`, through [rows, P] matrices (Eq. 6 to 8).

    Returns rank among positives [rows], sorting error [rows], what each gives off [rows], what lands on every positive [P].
    """
    above = smooth_step(positives[None, :] - positives[rows, None], delta)  # [rows, P], row i holds H(s_j - s_i)
    ideal = above * (quality[None, :] >= quality[rows, None])
    misplaced = above - ideal
    rank = above.sum(1)
    current = (above * (1 - quality)).sum(1) / rank
    target = (ideal * (1 - quality)).sum(1) / ideal.sum(1)
    sorting_error = current - target
    worse = misplaced.sum(1)
    given = torch.where(worse > eps, sorting_error, 0.0)
    shared = torch.where(worse > eps, sorting_error / worse, 0.0)
    return rank, sorting_error, given, weighted_sum(shared, misplaced, fuse)


def mean(errors: Tensor) -> Tensor:
    """Over the positives; 0 without any."""
    return errors.sum() / max(errors.numel(), 1)


class IdentityUpdate(torch.autograd.Function):
    """Outputs of a core; its gradient is scaled by the upstream gradient of the first one alone, as published."""

    @staticmethod
    def forward(
        ctx, logits: Tensor, targets: Tensor, delta: float, core: Callable, only_ones: bool = False
    ) -> tuple[Tensor, ...]:
        flat, flat_targets = logits.reshape(-1), targets.reshape(-1)
        gradient = torch.zeros_like(flat)
        is_positive = flat_targets == 1 if only_ones else flat_targets > 0
        positives, quality = flat[is_positive], flat_targets[is_positive].to(flat.dtype)
        count = positives.numel()
        lowest = positives.min() - delta if count else torch.inf
        is_relevant = (flat_targets == 0) & (flat >= lowest)
        outputs, of_positives, of_negatives = core(positives, quality, flat[is_relevant], delta)
        gradient[is_positive] = of_positives / max(count, 1)
        gradient[is_relevant] = of_negatives / max(count, 1)
        ctx.save_for_backward(gradient.reshape(logits.shape))
        return outputs

    @staticmethod
    def backward(ctx, grad_first: Tensor, *_):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_first, None, None, None, None
