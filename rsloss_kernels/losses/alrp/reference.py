"""aLRP loss in plain PyTorch, float64 inside: the mathematics on the P positives.

Oksuz et al., "A Ranking-based, Balanced Loss Function Unifying Classification and Localisation in Object Detection", NeurIPS 2020.
README.md beside this file derives the forms used here; the sums come from the shared sweep (losses/ranking).
"""
import torch
from torch import Tensor

from rsloss_kernels.losses.ranking.sweep import Sweep

EPS = 1e-5


def alrp_finalize(
    logits, negatives, ranked, counts, bins, segments, num_segments, delta, gradient_scale
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sweep = Sweep(logits, ranked, counts, bins, num_segments, delta, gradient_scale)
    false_positives, regression = sweep.false_positives, sweep.quality
    rank = sweep.among_positives() + false_positives
    # The step of a positive at itself, which its localisation error takes no part in.
    self_step = 0.5 if delta > 0 else 1.0
    regression_above = sweep.sums_above(regression[None])[0] - self_step * regression
    has_gradient = false_positives > EPS
    error = torch.where(has_gradient, (regression_above + false_positives) / rank, 0.0)
    coefficient = torch.where(has_gradient, error / false_positives, 0.0)

    ranks = torch.where(ranked[3] >= 0, torch.nan, torch.zeros_like(ranked[3]))
    ranks[sweep.is_valid] = rank
    return sweep.loss(false_positives / rank), ranks, sweep.gradients(-error), sweep.lines(coefficient)
