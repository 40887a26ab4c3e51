"""GHM-C and GHM-R in plain PyTorch, float64 inside.

Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019. README.md beside this file has the forms used here and
every tensor that passes between the operators.
"""
import math

import torch
from torch import Tensor

# Sums of float64 that are added up apart: among many equal numbers the errors of one long sum do not average out.
LANES = 64


def bin_edges(bins: int, mu: float | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """The inner edges of the bins, float64 [bins - 1]: of the gradient norm, and of what decides for most elements: of `u` for
    GHM-C with a target of 0 or 1, of `|d|` for GHM-R."""
    k = torch.arange(1, bins, dtype=torch.float64, device=like.device)
    if mu is not None:
        return k / bins, (mu * k) / _edge_roots(bins, k)
    # log(k / (bins - k)) without cancellation near 0.
    is_upper = 2 * k > bins
    near, far = torch.where(is_upper, bins - k, k), (2 * k - bins).abs()
    return k / bins, torch.where(is_upper, 1.0, -1.0) * torch.log1p(far / near)


def _edge_roots(bins: int, k: Tensor) -> Tensor:
    """sqrt((bins - k) (bins + k)) to the nearest, which PyTorch's root on a CPU is not in one case of a hundred."""
    if k.is_cuda:
        return ((bins - k) * (bins + k)).sqrt()
    return torch.tensor([math.sqrt((bins - i) * (bins + i)) for i in range(1, bins)], dtype=torch.float64, device=k.device)


def bin_of(pred: Tensor, target: Tensor, bins: int, mu: float | None) -> Tensor:
    """The bin of each element by its gradient norm, int64; `pred` and `target` are float64. Of NaN: any."""
    of_norm, of_argument = bin_edges(bins, mu, pred)
    if mu is not None:
        return torch.bucketize((pred - target).abs(), of_argument, right=True)
    is_binary = (target == 0) | (target == 1)
    by_logit = torch.bucketize(torch.where(target == 1, -pred, pred), of_argument, right=True)
    small = torch.exp(-pred.abs())
    norm = (small / (1 + small) - torch.where(pred > 0, 1 - target, target)).abs()
    return torch.where(is_binary, by_logit, torch.bucketize(norm, of_norm, right=True))


def element_losses(pred: Tensor, target: Tensor, mu: float | None) -> Tensor:
    """`l` of each element; autograd can differentiate it, at infinite elements too."""
    if mu is not None:
        d = pred - target
        finite = torch.where(d.isinf(), 0.0, d)
        # hypot neither overflows nor underflows; the quotient first, for the same reason.
        length = finite.abs()
        loss = length * (length / (torch.hypot(finite, torch.full_like(d, mu)) + mu))
        return torch.where(d.isinf(), d.abs(), loss)
    slope = torch.where(pred > 0, 1 - target, -target).detach()
    linear = torch.where(slope == 0, 0.0, slope * pred)
    # Not `abs`, whose derivative at 0 is 0: the linear part takes 0 for negative.
    return linear + torch.log1p(torch.exp(torch.where(pred > 0, -pred, pred)))


def element_gradients(pred: Tensor, target: Tensor, mu: float | None) -> Tensor:
    """`dl/dz` of eq. 4, `dl/dd` of eq. 12."""
    if mu is not None:
        d = pred - target
        return torch.where(d.isinf(), d.sign(), d / torch.hypot(d, torch.full_like(d, mu)))
    # 1 - sigma(z) and 1 - t in place of sigma(z) and t where z is above 0: what is subtracted is no larger than it must be.
    small = torch.exp(-pred.abs())
    norm = small / (1 + small) - torch.where(pred > 0, 1 - target, target)
    return torch.where(pred > 0, -norm, norm)


def as_dense(target: Tensor, pred: Tensor, background_first: bool) -> Tensor:
    """float64, in the shape of `pred`: a label that is no foreground class is a row of zeros."""
    if target.is_floating_point():
        return target.double()
    columns = torch.arange(pred.shape[-1], device=target.device) + int(background_first)
    return (target[..., None] == columns).double()


def valid_elements(pred: Tensor, weights: Tensor | None) -> Tensor:
    """Where the weight is above 0; `weights` has the shape of `pred`, or that less the last dimension."""
    if weights is None:
        return torch.ones_like(pred, dtype=torch.bool)
    return (weights if weights.dim() == pred.dim() else weights[..., None]).expand(pred.shape) > 0


def _levels(preds, targets, weights, background_first):
    """(pred, target, which are valid, which of those hold NaN) of each level, pred and target float64."""
    for number, pred in enumerate(preds):
        is_valid = valid_elements(pred, weights[number] if weights else None)
        target = as_dense(targets[number], pred, background_first)
        pred = pred.double()
        yield pred, target, is_valid, is_valid & (pred - target).isnan()


def ghm_histogram(preds, targets, weights, bins, mu, background_first) -> Tensor:
    histogram = torch.zeros((2, bins + 1), dtype=torch.float64, device=preds[0].device)
    for pred, target, is_valid, is_nan in _levels(preds, targets, weights, background_first):
        is_binned = is_valid & ~is_nan
        pred, target = pred[is_binned], target[is_binned]
        bin_index = bin_of(pred, target, bins, mu)
        histogram[0, :bins] += torch.bincount(bin_index, minlength=bins)
        place = bin_index * LANES + torch.arange(len(bin_index), device=pred.device) % LANES
        losses = torch.bincount(place, element_losses(pred, target, mu), minlength=bins * LANES)
        histogram[1, :bins] += losses.view(bins, LANES).sum(-1)
        histogram[0, bins] += is_nan.sum()
    return histogram


def ghm_finalize(
    preds, targets, weights, histogram, acc_sum, num_updates, bins, mu, background_first, momentum, count_empty_bins, gradient_scale
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts, sums = histogram[:, :bins]
    is_filled = counts > 0
    is_whole = histogram[0, bins] == 0  # no NaN among the valid elements
    before = counts if acc_sum is None else acc_sum.double()

    # Eq. 10; without momentum the density is that of this batch alone.
    density = accumulated = counts
    updates = histogram.new_zeros((0,), dtype=torch.int64) if num_updates is None else num_updates
    if momentum > 0:
        changes = torch.ones_like(is_filled) if count_empty_bins else is_filled
        density = accumulated = torch.where(changes, momentum * before + (1 - momentum) * counts, before)
        if num_updates is not None:
            updates = num_updates + changes
            density = accumulated / -torch.expm1(updates.double() * math.log(momentum))

    num_bins = bins if count_empty_bins else is_filled.sum()
    bin_weights = torch.where(is_filled, 1 / (density * num_bins), 0.0)  # eq. 8, without the number of elements
    loss = torch.where(is_filled, bin_weights * sums, 0.0).sum()
    loss = torch.where(is_whole, loss, torch.nan)

    is_kept = is_filled.any() & loss.isfinite()
    accumulated = torch.where(is_kept, accumulated, before)
    if num_updates is not None:
        updates = torch.where(is_kept, updates, num_updates)
    state_type = torch.float64 if acc_sum is None else acc_sum.dtype
    loss_type = torch.float64 if preds[0].dtype == torch.float64 else torch.float32
    return loss.to(loss_type), accumulated.to(state_type, copy=True), updates, bin_weights * gradient_scale


def ghm_backward(preds, targets, weights, bin_weights, grad_loss, mu, background_first) -> list[Tensor]:
    gradients = []
    levels = _levels(preds, targets, weights, background_first)
    for level, (pred, target, is_valid, is_nan) in zip(preds, levels, strict=True):
        weight = bin_weights[bin_of(pred, target, bin_weights.numel(), mu)]
        gradient = element_gradients(pred, target, mu) * weight * grad_loss.double()
        gradient = torch.where(is_nan, torch.nan, gradient)
        gradients.append(torch.where(is_valid, gradient, 0.0).to(level.dtype))
    return gradients
