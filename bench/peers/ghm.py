"""GHM-C and GHM-R computed the published way, one bin after the other, and their truth in float64.

Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019, with the algorithm of its best known implementation, that
of MMDetection, told in our own words: for every bin a mask over all elements, its count read by the host, and the weight written
through the mask; then the element-wise loss times a tensor of weights. `bins` + 1 waits for the device, and the cost grows with the
number of bins. The number of valid elements multiplies every weight and divides the sum, as published.
"""
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot


class PublishedGHM:
    """State and weights of one loss; `acc_sum` [bins], float32 as published, is None without momentum."""

    def __init__(self, bins: int, momentum: float, last_edge: float):
        self.bins, self.momentum = bins, momentum
        # Bounds of the bins of the gradient norm; the last lies above the largest norm, which thus has a bin.
        self.edges = [k / bins for k in range(bins)] + [last_edge]
        self.acc_sum = torch.zeros(bins) if momentum > 0 else None

    def weigh(self, norm: Tensor, is_valid: Tensor, total: float) -> Tensor:
        """Weights of the elements, in the shape of `norm`: `total` over the bin's density and the number of non-empty bins."""
        weights = torch.zeros_like(norm)
        occupied = 0
        for number in range(self.bins):
            is_inside = (norm >= self.edges[number]) & (norm < self.edges[number + 1]) & is_valid
            count = is_inside.sum().item()
            if count == 0:
                continue
            occupied += 1
            density = count
            if self.momentum > 0:
                self.acc_sum[number] = self.momentum * self.acc_sum[number] + (1 - self.momentum) * count
                density = self.acc_sum[number].item()
            weights[is_inside] = total / density
        return weights / occupied if occupied else weights


class PublishedGHMC(PublishedGHM):
    """The loss, 0-d, of logits [N, C]; targets and weights of that shape, or class indices and weights [N], expanded here."""

    def __init__(self, bins: int = 10, momentum: float = 0.0, background_first: bool = False):
        super().__init__(bins, momentum, 1 + 1e-6)
        self.background_first = background_first

    def __call__(self, logits: Tensor, targets: Tensor, label_weights: Tensor) -> Tensor:
        if targets.dim() != logits.dim():
            targets = one_hot_targets(targets, logits.shape[-1], self.background_first)
            label_weights = label_weights[:, None].expand(logits.shape)
        targets, label_weights = targets.to(logits.dtype), label_weights.to(logits.dtype)
        norm = (logits.sigmoid().detach() - targets).abs()
        is_valid = label_weights > 0
        total = max(is_valid.float().sum().item(), 1.0)
        weights = self.weigh(norm, is_valid, total)
        losses = binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return (losses * weights).sum() / total


class PublishedGHMR(PublishedGHM):
    """The loss, 0-d, of predictions, targets and weights of one shape."""

    def __init__(self, mu: float = 0.02, bins: int = 10, momentum: float = 0.0):
        super().__init__(bins, momentum, 1e3)
        self.mu = mu

    def __call__(self, preds: Tensor, targets: Tensor, label_weights: Tensor) -> Tensor:
        difference = preds - targets
        losses = (difference * difference + self.mu**2).sqrt() - self.mu
        norm = (difference / (self.mu**2 + difference * difference).sqrt()).abs().detach()
        is_valid = label_weights > 0
        total = max(label_weights.float().sum().item(), 1.0)
        return (losses * self.weigh(norm, is_valid, total)).sum() / total


def one_hot_targets(labels: Tensor, classes: int, background_first: bool = False) -> Tensor:
    """[N] -> [N, C]; a label that is no foreground class is a row of zeros."""
    labels = labels - 1 if background_first else labels
    is_foreground = (labels >= 0) & (labels < classes)
    return one_hot(labels.where(is_foreground, classes), classes + 1)[:, :classes]


def ghm_truth(preds: Tensor, targets: Tensor, weights: Tensor | None, bins: int, mu: float | None = None) -> tuple[Tensor, Tensor]:
    """(loss, gradient) in float64 without momentum. `mu` None: GHM-C with dense targets of 0 and 1; else GHM-R.

    Bins are found where they are exact: in the logit, or in the difference.
    """
    preds, targets = preds.detach().double(), targets.double()
    inner = torch.arange(1, bins, dtype=torch.float64, device=preds.device)
    if mu is None:
        side = torch.where(targets > 0, -preds, preds)
        losses, gradient = torch.nn.functional.softplus(side), torch.where(targets > 0, -1.0, 1.0) * side.sigmoid()
        which = torch.bucketize(side, (inner / (bins - inner)).log(), right=True)
    else:
        difference = preds - targets
        root = (difference**2 + mu**2).sqrt()
        losses, gradient = difference**2 / (root + mu), difference / root
        which = torch.bucketize(difference.abs(), mu * inner / ((bins - inner) * (bins + inner)).sqrt(), right=True)
    is_valid = torch.ones_like(preds, dtype=torch.bool) if weights is None else weights > 0
    counts = torch.bincount(which[is_valid], minlength=bins).double()
    occupied = (counts > 0).sum().clamp(min=1)
    of_bins = torch.where(counts > 0, 1 / (counts * occupied), 0.0)
    weight = torch.where(is_valid, of_bins[which], 0.0)
    return (weight * losses).sum(), weight * gradient
