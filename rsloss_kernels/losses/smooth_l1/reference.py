"""Smooth L1 loss in plain PyTorch, float64 inside.

Girshick, "Fast R-CNN", ICCV 2015, eq. 3. README.md beside this file has the forms used here.
"""
import torch
from torch import Tensor
from torch.nn.functional import pad

from rsloss_kernels.losses.smooth_l1.op_checks import LARGEST_BETA, SMALLEST_BETA

# Sums that are added up apart, so that their order does not depend on the number of threads.
LANES = 64


def _difference(pred: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """`d`, 0 where an element does not count, and the weights; both float64 in the shape of `pred`."""
    d = pred.double() - target.double()
    if weight is None:
        return d, torch.ones_like(d)
    weight = weight.double()
    if weight.dim() < d.dim():
        weight = weight[..., None]
    weight = weight.expand(d.shape)
    return torch.where(weight == 0, 0.0, d), weight


def _beta_of(beta: Tensor | None, fixed_beta: float, like: Tensor) -> Tensor:
    """0-d float64; NaN where it is out of range."""
    beta = like.new_full((), fixed_beta, dtype=torch.float64) if beta is None else beta.double()
    return torch.where((beta >= 0) & (beta <= LARGEST_BETA), torch.where(beta < SMALLEST_BETA, 0.0, beta), torch.nan)


def _factor(normalizer: Tensor | None, scale: float, like: Tensor) -> Tensor:
    return like.new_full((), scale, dtype=torch.float64) if normalizer is None else scale / normalizer.double()


def _losses(pred, target, weight, beta, fixed_beta) -> Tensor:
    """`w l` of each element."""
    d, weight = _difference(pred, target, weight)
    beta, distance = _beta_of(beta, fixed_beta, d), d.abs()
    losses = torch.where(distance < beta, distance * (0.5 * distance / beta), distance - 0.5 * beta)
    return torch.where(weight == 0, 0.0, weight * losses)


def smooth_l1_forward(pred, target, weight, beta, normalizer, fixed_beta, scale) -> list[Tensor]:
    losses = _losses(pred, target, weight, beta, fixed_beta).flatten()
    total = pad(losses, (0, -losses.numel() % LANES)).view(-1, LANES).sum(0).sum()
    loss_type = torch.float64 if pred.dtype == torch.float64 else torch.float32
    return [(total * _factor(normalizer, scale, total)).to(loss_type)]


def smooth_l1_elements(pred, target, weight, beta, normalizer, fixed_beta, scale) -> list[Tensor]:
    losses = _losses(pred, target, weight, beta, fixed_beta)
    scaled = losses * _factor(normalizer, scale, losses)
    return [torch.where(_counts(weight, losses), scaled, 0.0).to(pred.dtype)]


def smooth_l1_backward(pred, target, weight, beta, normalizer, grad, fixed_beta, scale) -> Tensor:
    d, weights = _difference(pred, target, weight)
    beta = _beta_of(beta, fixed_beta, d)
    # `sign` of NaN is 0; of what is out of range too.
    slopes = torch.where(d.abs() < beta, d / beta, torch.where((d + beta).isnan(), torch.nan, d.sign()))
    gradient = weights * slopes * (_factor(normalizer, scale, d) * grad.double())
    return torch.where(_counts(weight, d), gradient, 0.0).to(pred.dtype)


def _counts(weight: Tensor | None, like: Tensor) -> Tensor:
    """Which elements count, whatever else they are multiplied by."""
    if weight is None:
        return like.new_ones((), dtype=torch.bool)
    return (weight if weight.dim() == like.dim() else weight[..., None]) != 0
