"""The losses written straight from their definitions in float64: every pair compared, nothing shared with the library.

Quadratic in time and memory, and meant to be read next to the papers.
"""
import dataclasses
import math
from collections.abc import Callable

import numpy as np
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


def with_regression_losses(elements: Elements, losses: Tensor) -> Elements:
    """`losses` [P], of the positives in flat order, take the place of the quality (which must be finite all the same)."""
    quality = elements.quality.clone()
    of_positives = quality[elements.is_positive]
    quality[elements.is_positive] = torch.where(of_positives.isfinite(), losses.flatten().double(), torch.nan)
    return dataclasses.replace(elements, quality=quality)


def step(difference: Tensor, delta: float) -> Tensor:
    """H, the smoothed step; of an infinite difference its limit."""
    if delta == 0:
        return (difference >= 0).double()
    return (difference / (2 * delta) + 0.5).clamp(0, 1)


@dataclasses.dataclass(frozen=True)
class Truth:
    losses: tuple[float, ...]
    gradients: tuple[Tensor, ...]  # [n] each, of that loss alone
    rank: Tensor | None = None  # [P], aLRP alone; positives in flat order, NaN for those that are not finite

    def gradient(self, *upstream: float | None) -> Tensor:
        """For these upstream gradients, 1 if none are given. NaN stays NaN whatever the factor."""
        factors = upstream or (1.0,) * len(self.gradients)
        return sum((factor or 0.0) * gradient for factor, gradient in zip(factors, self.gradients, strict=True))


class Pairs:
    """All pairs of a positive with a positive, and with a negative, without the elements whose values are not finite.

    A NaN negative, or a positive whose logit or quality is not finite, makes every loss and its own gradient NaN, and is left out
    of everything else.
    """

    def __init__(self, elements: Elements, delta: float):
        s, y = elements.logits, elements.quality
        self.elements, self.delta = elements, delta
        self.is_broken = (elements.is_negative & s.isnan()) | (elements.is_positive & ~(s.isfinite() & y.isfinite()))
        self.positive = (elements.is_positive & ~self.is_broken).nonzero().squeeze(1)
        negative = elements.is_negative & ~self.is_broken
        self.count = max(self.positive.numel(), 1)
        self.logits, self.quality = s[self.positive], y[self.positive]  # [P]
        self.above = step(self.logits[None, :] - self.logits[:, None], delta)  # [P, P], H(s_j - s_i) at [i, j]
        # Negatives of one value are alike: each value is compared once.
        values, self.value_of, self.multiplicity = s[negative].unique(return_inverse=True, return_counts=True)
        self.negative = negative.nonzero().squeeze(1)
        self.of_negatives = step(values[None, :] - self.logits[:, None], delta)  # [P, values]
        self.false_positives = (self.of_negatives * self.multiplicity).sum(1)

    def losses(self, *errors: Tensor) -> tuple[float, ...]:
        """Means over the positives."""
        return tuple(float("nan") if self.is_broken.any() else float(error.sum() / self.count) for error in errors)

    def gradient(self, of_positives: Tensor, share: Tensor | None = None) -> Tensor:
        """[n], from those of the positives, and the coefficients of a negative's steps."""
        gradient = torch.zeros_like(self.elements.logits)
        gradient[self.positive] = of_positives / self.count
        if share is not None:
            gradient[self.negative] = (share[:, None] * self.of_negatives).sum(0)[self.value_of] / self.count
        gradient[self.is_broken] = torch.nan
        return gradient


def quotient(numerator: Tensor, denominator: Tensor, eps: float = 0.0) -> Tensor:
    """0 where the denominator is at most `eps`."""
    return torch.where(denominator > eps, numerator / denominator, 0.0)


def rank_sort(elements: Elements, delta: float, eps: float = 1e-10) -> Truth:
    """Rank & Sort (ICCV 2021, Eq. 3-8) and its identity update: the ranking and the sorting loss."""
    pairs = Pairs(elements, delta)
    y, above, false_positives = pairs.quality, pairs.above, pairs.false_positives
    rank_among_positives = above.sum(1)
    ranking_error = false_positives / (rank_among_positives + false_positives)

    is_no_worse = y[None, :] >= y[:, None]
    better, worse = above * is_no_worse, above * ~is_no_worse
    # Current minus target sorting error, over a common denominator: sums of products of non-negative numbers do not cancel.
    excess = (better * (y[None, :] - y[:, None])).sum(1)
    deficit = (worse * (y[:, None] - y[None, :])).sum(1)
    sorting_error = (deficit * better.sum(1) + excess * worse.sum(1)) / (better.sum(1) * rank_among_positives)

    ranking_gradient = pairs.gradient(
        torch.where(false_positives > eps, -ranking_error, 0.0), quotient(ranking_error, false_positives, eps)
    )
    share = quotient(sorting_error, worse.sum(1), eps)
    moved = torch.where(worse.sum(1) > eps, -sorting_error, 0.0) + (share[:, None] * worse).sum(0)
    return Truth(pairs.losses(ranking_error, sorting_error), (ranking_gradient, pairs.gradient(moved)))


def rank_above(pairs: Pairs) -> Tensor:
    """Among the positives, the self term counting 1."""
    return pairs.above.sum(1) + (0.5 if pairs.delta > 0 else 0.0)


def average_precision(elements: Elements, delta: float, interpolated: bool = True) -> Truth:
    """AP loss (TPAMI 2020): one minus the precision at each positive, interpolated with the best at this or a lower score."""
    pairs = Pairs(elements, delta)
    error = pairs.false_positives / (rank_above(pairs) + pairs.false_positives)
    if interpolated and error.numel():
        is_at_or_below = pairs.logits[None, :] <= pairs.logits[:, None]
        error = torch.where(is_at_or_below, error[None, :], torch.inf).amin(1)
    return Truth(pairs.losses(error), (pairs.gradient(-error, quotient(error, pairs.false_positives)),))


def alrp(elements: Elements, delta: float, eps: float = 1e-5) -> Truth:
    """The classification part of aLRP (NeurIPS 2020); the quality of a positive is its regression loss."""
    pairs = Pairs(elements, delta)
    rank = rank_above(pairs) + pairs.false_positives
    others = pairs.above.clone().fill_diagonal_(0.0)
    is_wrong = pairs.false_positives > eps
    error = torch.where(is_wrong, ((others * pairs.quality).sum(1) + pairs.false_positives) / rank, 0.0)
    gradient = pairs.gradient(-error, quotient(error, pairs.false_positives, eps))
    of_all = torch.full_like(elements.logits, torch.nan)
    of_all[pairs.positive] = rank
    return Truth(pairs.losses(pairs.false_positives / rank), (gradient,), of_all[elements.is_positive])


def alrp_regression(losses: Tensor, rank: Tensor, order: Tensor) -> tuple[float, Tensor]:
    """The regression part of aLRP and its gradient; `order` is ascending by score."""
    if losses.numel() == 0:
        return 0.0, torch.zeros_like(losses, dtype=torch.float64)
    descending = order.flip(0)
    losses, inverse_rank = losses.double()[descending], 1 / rank.double()[descending]
    gradient = torch.empty_like(losses)
    gradient[descending] = inverse_rank.flip(0).cumsum(0).flip(0) / losses.numel()
    return float((losses.cumsum(0) * inverse_rank).mean()), gradient


def segmented(oracle: Callable[..., Truth], elements: Elements, ids: Tensor, num_segments: int, *arguments) -> Truth:
    """A loop over segments of an oracle; the mean over the segments that hold a finite positive.

    `ids`: [n], of every element; one outside of `0..num_segments-1` makes the element ignored.
    """
    parts, used = [], 0
    gradients: list[Tensor] = []
    for number in range(num_segments):
        index = (ids == number).nonzero().squeeze(1)
        part = Elements(*(getattr(elements, field.name)[index] for field in dataclasses.fields(Elements)))
        truth = oracle(part, *arguments)
        used += int((part.is_positive & part.logits.isfinite() & part.quality.isfinite()).any())
        parts.append(truth.losses)
        gradients = gradients or [torch.zeros_like(elements.logits) for _ in truth.gradients]
        for whole, own in zip(gradients, truth.gradients, strict=True):
            whole[index] = own
    used = max(used, 1)
    return Truth(tuple(sum(values) / used for values in zip(*parts, strict=True)), tuple(whole / used for whole in gradients))


@dataclasses.dataclass(frozen=True)
class HarmonizedTruth:
    losses: tuple[float]
    own_gradient: Tensor  # float64, the shape of the logits
    acc_sum: Tensor  # float64 [bins], after the call
    num_updates: Tensor  # int64 [bins], after the call
    counts: Tensor  # int64 [bins]
    weights: Tensor  # float64 [bins]

    def gradient(self, *upstream: float) -> Tensor:
        return self.own_gradient * (upstream or (1.0,))[0]


def ghm(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    mu: float | None = None,
    bins: int = 10,
    momentum: float = 0.0,
    acc_sum: Tensor | None = None,
    num_updates: Tensor | None = None,
    empty_bins: str = "skip",
    background: str = "last",
) -> HarmonizedTruth:
    """GHM-C (`mu` None) and GHM-R (AAAI 2019), bin by bin from the gradient norm, in numpy."""
    z, t = pred.detach().double().numpy(), (target.detach().double() if target.is_floating_point() else target).numpy()
    if mu is None and not target.dtype.is_floating_point and target.shape == pred.shape[:-1]:
        columns = np.arange(z.shape[-1]) + (background == "first")
        t = t[..., None] == columns
    t = t.astype(np.float64)
    is_valid = np.ones(z.shape, bool)
    if weight is not None:
        rows = weight.detach().double().numpy()
        is_valid = np.broadcast_to(rows if rows.shape == z.shape else rows[..., None], z.shape) > 0
    with np.errstate(all="ignore"):
        losses, slopes, norms = _harmonized_elements(z, t, mu)
    is_nan = is_valid & np.isnan(norms)
    is_counted = is_valid & ~is_nan

    before = np.zeros(bins) if acc_sum is None else acc_sum.double().numpy()
    after = before.copy()
    updates = np.zeros(bins, np.int64) if num_updates is None else num_updates.numpy().copy()
    members = [
        is_counted & (norms >= b / bins) & ((norms < (b + 1) / bins) if b + 1 < bins else True) for b in range(bins)
    ]
    counts = np.array([member.sum() for member in members], dtype=np.int64)
    in_use = bins if empty_bins == "count" else max((counts > 0).sum(), 1)
    total, weights, gradient = 0.0, np.zeros(bins), np.zeros(z.shape)
    for b, member in enumerate(members):
        density = counts[b]
        if momentum > 0:
            if counts[b] > 0 or empty_bins == "count":
                after[b] = momentum * before[b] + (1 - momentum) * counts[b]
                updates[b] += 1
            if num_updates is not None and updates[b] > 0:
                density = after[b] / (1 - momentum ** float(updates[b]))
            else:
                density = after[b]
        else:
            after[b] = counts[b]
        if counts[b] > 0:
            weights[b] = 1 / (density * in_use)
            total += float(weights[b] * total_of(losses[member]))
            gradient[member] = weights[b] * slopes[member]
    gradient[is_nan] = np.nan
    if is_nan.any():
        total = np.nan
    if not np.isfinite(total) or not counts.any():
        after = before if acc_sum is not None else counts.astype(np.float64)
        updates = np.zeros(bins, np.int64) if num_updates is None else num_updates.numpy()
    as_tensors = (torch.from_numpy(np.asarray(value)) for value in (gradient, after, updates, counts, weights))
    return HarmonizedTruth((float(total),), *as_tensors)


def total_of(losses: np.ndarray) -> float | np.longdouble:
    """Of losses that are not NaN, without a rounding that shows; it may be more than float64 holds."""
    return math.fsum(losses) if np.abs(losses).max(initial=0) < 1e290 else losses.astype(np.longdouble).sum()


def _harmonized_elements(z: np.ndarray, t: np.ndarray, mu: float | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, its derivative and the gradient norm of each element; of what is infinite the limits."""
    if mu is not None:
        d = z - t
        size = np.hypot(d, mu)
        losses = np.where(np.isinf(d), np.inf, np.abs(d) * (np.abs(d) / (size + mu)))
        slopes = np.where(np.isinf(d), np.sign(d), d / size)
        return np.where(np.isnan(d), np.nan, losses), slopes, np.abs(slopes)
    # Both terms of the cross entropy and of its derivative have one sign: nothing cancels.
    of_one = np.where(t == 0, 0.0, t * np.logaddexp(0, -z))
    of_zero = np.where(t == 1, 0.0, (1 - t) * np.logaddexp(0, z))
    slopes = (1 - t) * np.exp(-np.logaddexp(0, -z)) - t * np.exp(-np.logaddexp(0, z))
    return of_one + of_zero, slopes, np.abs(slopes)
