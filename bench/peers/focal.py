"""The sigmoid focal loss as detectors write it in plain PyTorch: the price everybody already pays for a classification loss.

Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, alpha 0.25, gamma 2, through the stable binary cross entropy.
"""
import functools

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sum over all elements. targets: 0 or 1, the shape and dtype of `logits`."""
    probability = logits.sigmoid()
    entropy = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    miss = (1 - probability) * targets + probability * (1 - targets)
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    return (balance * miss.pow(gamma) * entropy).sum()


@functools.cache
def _compiled():
    return torch.compile(focal_loss, dynamic=True, fullgraph=True)


def compiled_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return _compiled()(logits, targets)
