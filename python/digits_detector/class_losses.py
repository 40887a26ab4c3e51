"""Losses of the class logits against foreground imbalance, as sums over all logits: cross entropy, hard examples only, focal.

Logits [..., C] and labels [...] with C for background; targets are one-hot, so every class is a question of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rsloss_kernels import distributed

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
HARD_PER_POSITIVE = 3


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, one_hot(logits, labels), reduction="sum")


def hard_example_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Online hard example mining: cross entropy of the positives and of three times as many negatives, the worst of all."""
    targets = one_hot(logits, labels)
    errors = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    hardest = (errors * (1 - targets)).flatten().sort(descending=True).values
    is_kept = torch.arange(hardest.numel(), device=logits.device) < HARD_PER_POSITIVE * targets.sum()
    return (errors * targets).sum() + (hardest * is_kept).sum()


def focal_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017."""
    targets = one_hot(logits, labels)
    probability = logits.sigmoid()
    miss = probability + targets - 2 * probability * targets
    alpha = FOCAL_ALPHA * targets + (1 - FOCAL_ALPHA) * (1 - targets)
    return (alpha * miss**FOCAL_GAMMA * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")).sum()


def one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    """Targets of the shape and dtype of `logits`."""
    num_classes = logits.shape[-1]
    return F.one_hot(labels, num_classes + 1)[..., :num_classes].to(logits.dtype)


def over_positives(total: Tensor, is_positive: Tensor, process_group: str | None) -> Tensor:
    """A sum over the number of positives, that of all processes with a group."""
    group = distributed.resolve_group("train_detector.py", process_group)
    count = distributed.sum_over_group(is_positive.sum(), group).clamp(min=1)
    # A process's share, multiplied by their number: the mean over the processes is the loss of the whole batch.
    return total * (distributed.world_size(group) / count)
