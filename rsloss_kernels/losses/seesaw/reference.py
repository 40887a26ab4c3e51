"""Seesaw loss in plain PyTorch, float64 inside.

Wang et al., "Seesaw Loss for Long-Tailed Instance Segmentation", CVPR 2021. README.md beside this file has the forms used here.
"""
import math

import torch
from torch import Tensor

from rsloss_kernels.losses.seesaw.reduction import reduce_rows, spread_gradients


def _read(logits: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights [N]; whether a row is read, whether its class logits are; the class of each row, any where it has none."""
    weights = logits.new_ones(labels.shape, dtype=torch.float64) if weights is None else weights.double()
    is_used = (labels >= 0) & (weights != 0)
    has_class = is_used & (labels < logits.shape[1] - 2)
    return weights, is_used, has_class, torch.where(has_class, labels, 0).long()


def _class_logits(logits: Tensor, has_class: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """float64 [N, C], 0 in rows that are not read or broken, and which rows are broken."""
    z = torch.where(has_class[:, None], logits[:, :-2].double(), 0.0)
    at_target = z.gather(1, target[:, None])[:, 0]
    is_broken = (z.isnan() | (z == math.inf)).any(1) | (at_target == -math.inf)
    return torch.where(is_broken[:, None], 0.0, z), is_broken


def _balanced(z: Tensor, target: Tensor, log_counts: Tensor, threshold: Tensor, p: float, q: float) -> Tensor:
    """`z'` [N, C]."""
    mitigation = p * (log_counts - log_counts[target][:, None]).clamp(max=0)
    compensation = q * (z - threshold[:, None]).clamp(min=0)
    return z + mitigation + compensation


def _objectness(logits: Tensor, is_used: Tensor, has_class: Tensor) -> tuple[Tensor, Tensor]:
    """`x`, NaN in broken rows, and its derivatives by the two logits [N, 2]."""
    signs = torch.where(has_class, -1.0, 1.0)[:, None] * torch.tensor([1.0, -1.0], dtype=torch.float64, device=logits.device)
    z = torch.where(is_used[:, None], logits[:, -2:].double(), 0.0)
    right = torch.where(has_class, z[:, 0], z[:, 1])
    is_broken = (z.isnan() | (z == math.inf)).any(1) | (right == -math.inf)
    x = torch.where(has_class, z[:, 1] - z[:, 0], z[:, 0] - z[:, 1])
    return torch.where(is_broken, math.nan, x), signs


def seesaw_forward(
    logits, labels, weights, log_counts, p, q, eps, reduction, avg_factor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights, is_used, has_class, target = _read(logits, labels, weights)
    z, is_broken = _class_logits(logits, has_class, target)
    at_target = z.gather(1, target[:, None])[:, 0]
    threshold = torch.maximum(at_target, z.logsumexp(1) + (math.log(eps) if eps > 0 else -math.inf))
    balanced = _balanced(z, target, log_counts, threshold, p, q)
    top, largest = balanced.max(1)
    exponentials = torch.exp(balanced - top[:, None]).scatter(1, largest[:, None], 0.0)
    rest = exponentials.sum(1)
    gap = top - at_target
    complement = torch.where(gap == 0, rest, (1 + rest) - torch.exp(-gap)) / (1 + rest)
    classes = torch.where(has_class, weights * (gap + torch.log1p(rest)).masked_fill(is_broken, math.nan), 0.0)
    x, _ = _objectness(logits, is_used, has_class)
    # log1p rather than softplus, whose result is its argument beyond 20.
    objectness = torch.where(is_used, weights * (x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))), 0.0)
    tables = torch.stack([threshold, top, 1 / (1 + rest), complement]).masked_fill(is_broken, math.nan)
    reduced = reduce_rows(torch.stack([objectness, classes]), logits, labels, reduction, avg_factor)
    return *reduced, torch.where(has_class, tables, 0.0)


def seesaw_backward(logits, labels, weights, log_counts, divisors, row_tables, grad_objectness, grad_classes, p, q) -> Tensor:
    weights, is_used, has_class, target = _read(logits, labels, weights)
    z, _ = _class_logits(logits, has_class, target)
    threshold, top, scale, complement = row_tables
    of_objectness, of_classes = weights * spread_gradients(grad_objectness, grad_classes, divisors, logits.shape[0])
    balanced = _balanced(z, target, log_counts, threshold, p, q)
    slopes = torch.exp(balanced - top[:, None]) * scale[:, None]
    slopes = slopes.scatter(1, target[:, None], -complement[:, None]) * of_classes[:, None]
    x, signs = _objectness(logits, is_used, has_class)
    pulls = (torch.sigmoid(x) * of_objectness)[:, None] * signs
    slopes, pulls = torch.where(has_class[:, None], slopes, 0.0), torch.where(is_used[:, None], pulls, 0.0)
    return torch.cat([slopes, pulls], 1).to(logits.dtype)
