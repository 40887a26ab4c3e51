"""AP loss in plain PyTorch, float64 inside: the mathematics on the P positives.

Chen et al., "Towards Accurate One-Stage Object Detection with AP-Loss", CVPR 2019. README.md beside this file derives the forms
used here; the sums come from the shared sweep (losses/ranking).
"""
import torch
from torch import Tensor

from rsloss_kernels.losses.ranking.sweep import Sweep, running


def average_precision_finalize(
    logits, negatives, ranked, counts, bins, segments, num_segments, delta, gradient_scale, interpolated
) -> tuple[Tensor, Tensor, Tensor]:
    sweep = Sweep(logits, ranked, counts, bins, num_segments, delta, gradient_scale)
    false_positives = sweep.false_positives
    # 1 - precision, and the best precision at this or a lower score.
    error = false_positives / (sweep.among_positives() + false_positives)
    if interpolated:
        error = running(error, sweep.first, torch.minimum)
    coefficient = torch.where(false_positives > 0, error / false_positives, 0.0)
    return sweep.loss(error), sweep.gradients(-error), sweep.lines(coefficient)
