"""GHM-C and GHM-R in plain PyTorch: bins and losses in float64, gradients of targets 0 and 1 in the dtype of the logits.

Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019. README.md beside this file has the forms used here and
every tensor that passes between the operators.
"""
import math

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from rsloss_kernels.losses.ghm.op_checks import index_shape

# Sums of float64 that are added up apart: among many equal numbers the errors of one long sum do not average out.
LANES = 64
# In units of mu: from here on sqrt(d^2 + mu^2) is |d| to the last bit.
FARTHEST = 1e9


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
    """The bin of each element by its gradient norm, int32; `pred` and `target` are float64. Of NaN: any."""
    of_norm, of_argument = bin_edges(bins, mu, pred)
    if mu is not None:
        return _bucketize((pred - target).abs(), of_argument)
    is_binary = (target == 0) | (target == 1)
    by_logit = _bucketize(torch.where(target == 1, -pred, pred), of_argument)
    small = torch.exp(-pred.abs())
    norm = (small / (1 + small) - torch.where(pred > 0, 1 - target, target)).abs()
    return torch.where(is_binary, by_logit, _bucketize(norm, of_norm))


def _bucketize(values: Tensor, edges: Tensor) -> Tensor:
    return torch.bucketize(values, edges, right=True, out_int32=True)


def element_losses(pred: Tensor, target: Tensor, mu: float | None) -> Tensor:
    """`l` of each element; autograd can differentiate it, at infinite elements too."""
    if mu is not None:
        d = pred - target
        finite = torch.where(d.isinf(), 0.0, d)
        # hypot neither overflows nor underflows; the quotient first, for the same reason.
        length = finite.abs()
        loss = length * (length / (torch.hypot(finite, torch.full_like(d, mu)) + mu))
        return torch.where(d.isinf(), d.abs(), loss)
    slope = (torch.where(pred > 0, 1 - target, -target) + 0 * target).detach()  # NaN of an infinite target
    linear = torch.where(slope == 0, 0.0, slope * pred)
    # Not `abs`, whose derivative at 0 is 0: the linear part takes 0 for negative.
    return linear + torch.log1p(torch.exp(torch.where(pred > 0, -pred, pred)))


def soft_gradients(pred: Tensor, target: Tensor) -> Tensor:
    """`dl/dz` of eq. 4."""
    # 1 - sigma(z) and 1 - t in place of sigma(z) and t where z is above 0: what is subtracted is no larger than it must be.
    small = torch.exp(-pred.abs())
    norm = small / (1 + small) - torch.where(pred > 0, 1 - target, target)
    return torch.where(pred > 0, -norm, norm)


def as_dense(target: Tensor, pred: Tensor, background_first: bool) -> Tensor:
    """float64, in the shape of `pred`: a label that is no foreground class is a row of zeros."""
    if target.is_floating_point():
        return target.double()
    return _is_label(target, pred, background_first).double()


def _is_label(target: Tensor, pred: Tensor, background_first: bool) -> Tensor:
    """Class indices -> where the target is 1, in the shape of `pred`."""
    classes, places = index_shape(pred, target)
    column = torch.arange(classes, device=target.device) + int(background_first)
    return (target.reshape(-1, 1, places) == column[:, None]).reshape(pred.shape)


def valid_elements(pred: Tensor, weights: Tensor | None) -> Tensor:
    """Where the weight is above 0; `weights` has the shape of `pred`, or is one per row."""
    if weights is None:
        return torch.ones_like(pred, dtype=torch.bool)
    if weights.shape == pred.shape:
        return weights > 0
    classes, places = index_shape(pred, weights)
    return (weights > 0).reshape(-1, 1, places).repeat(1, classes, 1).view(pred.shape)


class _Hard:
    """Classification with targets 0 and 1 alone: `u` is the logit, negated where the target is 1, in the dtype of the logits."""

    def __init__(self, pred: Tensor, is_one: Tensor):
        self.u, self.is_one = torch.where(is_one, -pred, pred), is_one
        wide = self.u.to(torch.promote_types(self.u.dtype, torch.float32))
        # Not `sigmoid`, which rounds differently at the end of a tensor: processes would differ.
        small = wide.abs().neg_().exp_()
        self.sigma = torch.where(wide > 0, 1.0, small).div_(1 + small)
        self.is_nan = self.u.isnan()

    def bin_of(self, bins: int) -> Tensor:
        return _bin_near(self.sigma, self.u, bin_edges(bins, None, self.u)[1])

    def losses(self) -> Tensor:
        return softplus(self.u.double(), threshold=40)  # beyond it exp(-u) is below the last bit of u

    def gradients(self) -> Tensor:
        return torch.where(self.is_one, -self.sigma, self.sigma)


class _Soft:
    """Classification with any targets, in float64."""

    def __init__(self, pred: Tensor, target: Tensor):
        self.pred, self.target = pred.double(), target.double()
        self.is_nan = (self.pred + 0 * self.target).isnan()  # an infinite target is as NaN

    def bin_of(self, bins: int) -> Tensor:
        return bin_of(self.pred, self.target, bins, None)

    def losses(self) -> Tensor:
        return element_losses(self.pred, self.target, None)

    def gradients(self) -> Tensor:
        return soft_gradients(self.pred, self.target)


class _Offsets:
    """Regression, in float64."""

    def __init__(self, pred: Tensor, target: Tensor, mu: float):
        self.mu, self.d = mu, pred.double() - target
        self.near = self.d.clamp(-FARTHEST * mu, FARTHEST * mu)
        self.root = (self.near * self.near).add_(mu * mu).sqrt_()
        self.is_nan = self.d.isnan()

    def bin_of(self, bins: int) -> Tensor:
        return _bin_near(self.gradients().abs_(), self.d.abs(), bin_edges(bins, self.mu, self.d)[1])

    def losses(self) -> Tensor:
        # One of the two parts is there for elements that are far.
        return (self.near / (self.root + self.mu)).mul_(self.near).add_((self.d - self.near).abs_())

    def gradients(self) -> Tensor:
        return self.near / self.root


def _bin_near(norm: Tensor, position: Tensor, edges: Tensor) -> Tensor:
    """The number of edges that are at or below `position`, int32, where `norm` is right to 1e-4 of itself: one comparison."""
    bins = len(edges) + 1
    lowest = (norm * (bins * (1 - 2**-10))).int().clamp_(0, bins - 1)  # NaN is any integer
    return lowest + (position >= _look_up(pad(edges, (0, 1), value=torch.nan), lowest))  # nothing is above the last bin


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]`, which is slower."""
    return table.index_select(0, index.flatten()).view(index.shape)


def _levels(preds, targets, weights, mu, background_first):
    """(elements, which are valid, which of those hold NaN) of each level."""
    valid = [valid_elements(pred, weights[number] if weights else None) for number, pred in enumerate(preds)]
    if mu is not None:
        levels = (_Offsets(pred, target, mu) for pred, target in zip(preds, targets, strict=True))
    else:
        levels = _classified(preds, targets, valid, background_first)
    for elements, is_valid in zip(levels, valid, strict=True):
        yield elements, is_valid, is_valid & elements.is_nan


def _classified(preds, targets, valid, background_first):
    """Soft targets anywhere make all levels soft: an element's last bit does not depend on what shares its level."""
    ones = [
        target == 1 if target.is_floating_point() else _is_label(target, pred, background_first)
        for pred, target in zip(preds, targets, strict=True)
    ]
    is_hard = all(
        not target.is_floating_point() or bool((is_one | (target == 0) | ~is_valid).all())
        for target, is_one, is_valid in zip(targets, ones, valid, strict=True)
    )
    for pred, target, is_one in zip(preds, targets, ones, strict=True):
        yield _Hard(pred, is_one) if is_hard or not target.is_floating_point() else _Soft(pred, target)


def ghm_histogram(preds, targets, weights, bins, mu, background_first) -> Tensor:
    histogram = torch.zeros((2, bins + 1), dtype=torch.float64, device=preds[0].device)
    for elements, is_valid, is_nan in _levels(preds, targets, weights, mu, background_first):
        # What is not counted has a bin of its own, behind the others.
        place = torch.where(is_valid & ~is_nan, elements.bin_of(bins), bins).flatten()
        lanes = torch.arange(LANES, dtype=torch.int32, device=place.device) * (bins + 1)
        place = place + lanes.repeat(-(-place.numel() // LANES))[: place.numel()]
        for row, losses in enumerate((None, elements.losses().flatten())):
            sums = torch.bincount(place, losses, minlength=LANES * (bins + 1)).view(LANES, bins + 1).sum(0)
            histogram[row, :bins] += sums[:bins]
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
    factors = bin_weights * grad_loss.double()
    gradients = []
    levels = _levels(preds, targets, weights, mu, background_first)
    for level, (elements, is_valid, is_nan) in zip(preds, levels, strict=True):
        gradient = elements.gradients()
        gradient = gradient * _look_up(factors.to(gradient.dtype), elements.bin_of(factors.numel()))
        # NaN is the element's alone, whatever the factor of its bin.
        gradients.append(torch.where(is_valid, torch.where(is_nan, torch.nan, gradient), 0.0).to(level.dtype))
    return gradients
