"""The truth that accuracy is measured against: every pair, float64, in pieces that stay in the cache.

Dense targets, above 0 a positive, with the library's definition of delta = 0: a step that counts ties. At least one positive.
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.peers.identity_update import smooth_step, sums_over_positives

# Elements at a time: what stays in a core's cache, or fills a GPU.
PIECE = {"cpu": 1 << 15, "cuda": 1 << 22}
EPS = 1e-10
ALRP_EPS = 1e-5


class _Problem:
    """The positives, the negatives that can reach the lowest of them, and the sums over pairs of the two."""

    def __init__(self, logits: Tensor, targets: Tensor, delta: float):
        self.logits, self.delta, self.piece = logits.detach().double(), delta, PIECE[logits.device.type]
        flat_targets = targets.double().reshape(-1)
        flat = self.logits.reshape(-1)
        self.is_positive = flat_targets > 0
        self.positives, self.quality = flat[self.is_positive], flat_targets[self.is_positive]
        self.is_relevant = (flat_targets == 0) & (flat >= self.positives.min() - delta)
        # H(s_k - s_i) = clamp(s_k / (2 delta) + (1/2 - s_i / (2 delta)), 0, 1): one addition for a pair.
        self.scaled, self.shifts = flat[self.is_relevant], -self.positives
        if delta > 0:
            self.scaled, self.shifts = self.scaled / (2 * delta), 0.5 + self.shifts / (2 * delta)
        self.shifts = self.shifts.tolist()
        self.false_positives = torch.zeros_like(self.positives)
        for piece in self.scaled.split(self.piece):
            for i, shift in enumerate(self.shifts):
                self.false_positives[i] += self._step(piece, shift).sum()

    def _step(self, piece: Tensor, shift: float) -> Tensor:
        if self.delta == 0:
            return (piece >= -shift).double()
        return (piece + shift).clamp_(0, 1)

    def rows(self) -> Iterator[slice]:
        at_once = max(1, 8 * self.piece // self.positives.numel())
        for start in range(0, self.positives.numel(), at_once):
            yield slice(start, start + at_once)

    def weighted_above(self, weights: Tensor) -> Tensor:
        """For every positive i the sum over the positives of H(s_j - s_i) w_j, itself included."""
        parts = [
            smooth_step(self.positives[None, :] - self.positives[rows, None], self.delta) @ weights for rows in self.rows()
        ]
        return torch.cat(parts)

    def ranks_counting_oneself(self) -> Tensor:
        return self.weighted_above(torch.ones_like(self.positives)) + (0.5 if self.delta > 0 else 0.0)

    def gradient(self, of_positives: Tensor, coefficient: Tensor) -> Tensor:
        """Of the logits; a negative gets the sum over the positives of c_i H(s_k - s_i). Everything over P."""
        of_negatives = torch.zeros_like(self.scaled)
        pairs = list(zip(self.shifts, coefficient.tolist(), strict=True))
        for piece, result in zip(self.scaled.split(self.piece), of_negatives.split(self.piece), strict=True):
            for shift, value in pairs:
                result.add_(self._step(piece, shift), alpha=value)
        gradient = torch.zeros_like(self.logits).reshape(-1)
        gradient[self.is_positive] = of_positives / self.positives.numel()
        gradient[self.is_relevant] = of_negatives / self.positives.numel()
        return gradient.reshape(self.logits.shape)


def brute_force_rank_sort(logits: Tensor, targets: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(ranking, sorting, gradient of their sum) in float64."""
    problem = _Problem(logits, targets, delta)
    ranks, errors, of_positives = [], [], torch.zeros_like(problem.positives)
    for rows in problem.rows():
        rank, error, given, landed = sums_over_positives(problem.positives, problem.quality, delta, EPS, False, rows)
        ranks.append(rank)
        errors.append(error)
        of_positives += landed
        of_positives[rows] -= given
    ranking_error = problem.false_positives / (torch.cat(ranks) + problem.false_positives)
    is_wrong = problem.false_positives > EPS
    of_positives -= torch.where(is_wrong, ranking_error, 0.0)
    coefficient = torch.where(is_wrong, ranking_error / problem.false_positives, 0.0)
    return ranking_error.mean(), torch.cat(errors).mean(), problem.gradient(of_positives, coefficient)


def brute_force_average_precision(logits: Tensor, targets: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """(loss, gradient) in float64, interpolated."""
    problem = _Problem(logits, targets, delta)
    error = problem.false_positives / (problem.ranks_counting_oneself() + problem.false_positives)
    ascending = problem.positives.argsort()
    interpolated = torch.empty_like(error)
    interpolated[ascending] = error[ascending].cummin(0).values
    coefficient = torch.where(problem.false_positives > 0, interpolated / problem.false_positives, 0.0)
    return interpolated.mean(), problem.gradient(-interpolated, coefficient)


def brute_force_alrp(
    logits: Tensor, targets: Tensor, regression_losses: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(classification loss, rank [P], gradient) in float64; `regression_losses` [P] of the positives in flat order."""
    problem = _Problem(logits, targets, delta)
    losses = regression_losses.double()
    rank = problem.ranks_counting_oneself() + problem.false_positives
    localisation = problem.weighted_above(losses) - losses * (0.5 if delta > 0 else 1.0)
    is_wrong = problem.false_positives > ALRP_EPS
    error = torch.where(is_wrong, (localisation + problem.false_positives) / rank, 0.0)
    coefficient = torch.where(is_wrong, error / problem.false_positives, 0.0)
    return (problem.false_positives / rank).mean(), rank, problem.gradient(-error, coefficient)
