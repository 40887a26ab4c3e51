"""The losses written straight from their definitions in float64: every pair compared, nothing shared with the library.

Quadratic in time and memory, and meant to be read next to the papers.
"""
import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Elements:
    """Flat elements of a ranking loss, in float64."""

    logits: Tensor  # [n]
    quality: Tensor  # [n], of positives
    is_positive: Tensor  # [n]
    is_negative: Tensor  # [n]


def read_dense(logits: Tensor, targets: Tensor) -> Elements:
    """Above 0 (or NaN) a positive with that quality, 0 a negative, below 0 ignored."""
    flat = targets.flatten().double()
    return Elements(logits.flatten().double(), flat, ~(flat <= 0), flat == 0)


def read_labels(logits: Tensor, labels: Tensor, quality: Tensor | None, background: str = "last") -> Elements:
    """One row per label, classes 0..C-1 (or 1..C with background first); a negative label ignores its row."""
    num_classes = logits.shape[-1]
    columns = torch.arange(num_classes) + (1 if background == "first" else 0)
    is_positive = labels.flatten()[:, None] == columns  # [A, C]
    is_kept = (labels.flatten() >= 0)[:, None].expand_as(is_positive)
    rows = torch.ones(labels.numel(), dtype=torch.float64) if quality is None else quality.flatten().double()
    is_positive = is_positive & is_kept
    return Elements(
        logits.flatten().double(),
        rows[:, None].expand_as(is_positive).flatten(),
        is_positive.flatten(),
        (is_kept & ~is_positive).flatten(),
    )


def read(logits: Tensor, targets: Tensor, quality: Tensor | None = None, background: str = "last") -> Elements:
    if targets.dtype.is_floating_point:
        return read_dense(logits, targets)
    return read_labels(logits, targets, quality, background)


def step(difference: Tensor, delta: float) -> Tensor:
    """H, the smoothed step; of an infinite difference its limit."""
    if delta == 0:
        return (difference >= 0).double()
    return (difference / (2 * delta) + 0.5).clamp(0, 1)


@dataclasses.dataclass(frozen=True)
class RankSort:
    ranking: float
    sorting: float
    ranking_gradient: Tensor  # [n], of the ranking loss alone
    sorting_gradient: Tensor  # [n], of the sorting loss alone

    def gradient(self, ranking: float | None = 1.0, sorting: float | None = 1.0) -> Tensor:
        """For these upstream gradients. NaN stays NaN whatever the factor."""
        return (ranking or 0.0) * self.ranking_gradient + (sorting or 0.0) * self.sorting_gradient

    @property
    def losses(self) -> tuple[float, float]:
        return self.ranking, self.sorting


def rank_sort(elements: Elements, delta: float, eps: float = 1e-10) -> RankSort:
    """Rank & Sort loss (ICCV 2021, Eq. 3-8) and its identity update, with the library's rule for values that are not finite.

    A NaN negative, or a positive whose logit or quality is not finite, makes both losses and its own gradient NaN, and is left out
    of everything else.
    """
    s, y = elements.logits, elements.quality
    is_broken = (elements.is_negative & s.isnan()) | (elements.is_positive & ~(s.isfinite() & y.isfinite()))
    positive = (elements.is_positive & ~is_broken).nonzero().squeeze(1)
    negative = (elements.is_negative & ~is_broken).nonzero().squeeze(1)
    count = max(positive.numel(), 1)
    sp, yp = s[positive], y[positive]

    above = step(sp[None, :] - sp[:, None], delta)  # [P, P], H(s_j - s_i) at [i, j]
    of_negatives = step(s[negative][None, :] - sp[:, None], delta)  # [P, N]
    rank_among_positives = above.sum(1)
    false_positives = of_negatives.sum(1)
    ranking_error = false_positives / (rank_among_positives + false_positives)

    is_no_worse = yp[None, :] >= yp[:, None]
    better, worse = above * is_no_worse, above * ~is_no_worse
    # Current minus target sorting error, over a common denominator: sums of products of non-negative numbers do not cancel.
    excess = (better * (yp[None, :] - yp[:, None])).sum(1)
    deficit = (worse * (yp[:, None] - yp[None, :])).sum(1)
    sorting_error = (deficit * better.sum(1) + excess * worse.sum(1)) / (better.sum(1) * rank_among_positives)

    ranking_gradient, sorting_gradient = torch.zeros_like(s), torch.zeros_like(s)
    is_wrong = false_positives > eps
    share = torch.where(is_wrong, ranking_error / false_positives, 0.0)
    ranking_gradient[positive] = torch.where(is_wrong, -ranking_error, 0.0) / count
    ranking_gradient[negative] = (share[:, None] * of_negatives).sum(0) / count
    is_unsorted = worse.sum(1) > eps
    share = torch.where(is_unsorted, sorting_error / worse.sum(1), 0.0)
    sorting_gradient[positive] = (torch.where(is_unsorted, -sorting_error, 0.0) + (share[:, None] * worse).sum(0)) / count
    ranking_gradient[is_broken] = sorting_gradient[is_broken] = torch.nan

    ranking, sorting = float(ranking_error.sum() / count), float(sorting_error.sum() / count)
    if is_broken.any():
        ranking = sorting = float("nan")
    return RankSort(ranking, sorting, ranking_gradient, sorting_gradient)
