"""Seesaw loss computed the published way, and its truth in float64.

Wang et al., "Seesaw Loss for Long-Tailed Instance Segmentation", CVPR 2021, with the algorithm of the code in MMDetection, told in our
own words: the counts are updated class by class among those that occur in the batch; foreground rows are picked out by a mask; one-hot
labels and a tensor for every step of the formula; the cross entropies of the corrected logits and of the objectness. Count ratios
are computed of the picked rows alone [n, C], where the published code makes those of all pairs of classes, C x C, first.
"""
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot


class PublishedSeesaw:
    """counts [C + 1]: samples of each class so far, the background last."""

    def __init__(self, counts: Tensor, p: float = 0.8, q: float = 2.0, eps: float = 1e-2):
        self.counts, self.p, self.q, self.eps = counts.clone(), p, q, eps

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(objectness, classes), means over all rows and over those of the foreground."""
        for label in labels.unique():
            self.counts[label] += (labels == label).sum()
        return self.losses(logits, labels)

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        classes = logits.shape[1] - 2
        is_foreground = labels < classes
        objectness = cross_entropy(logits[:, classes:], (~is_foreground).long())
        if is_foreground.sum() == 0:
            return objectness, logits[:, :classes].sum() * 0
        return objectness, self._classes(logits[is_foreground][:, :classes], labels[is_foreground])

    def _classes(self, logits: Tensor, labels: Tensor) -> Tensor:
        at_labels = one_hot(labels, logits.shape[1])
        factors = torch.ones_like(logits)
        if self.p > 0:
            counts = self.counts[:-1].clamp(min=1).to(logits.dtype)
            ratios = counts[None, :] / counts[labels][:, None]
            is_rarer = (ratios < 1).to(logits.dtype)
            factors = factors * (ratios.pow(self.p) * is_rarer + (1 - is_rarer))
        if self.q > 0:
            shares = logits.detach().softmax(1)
            own = shares[torch.arange(len(labels), device=labels.device), labels]
            ratios = shares / own[:, None].clamp(min=self.eps)
            is_confused = (ratios > 1).to(logits.dtype)
            factors = factors * (ratios.pow(self.q) * is_confused + (1 - is_confused))
        return cross_entropy(logits + factors.log() * (1 - at_labels), labels)


def seesaw_truth(
    logits: Tensor, labels: Tensor, counts: Tensor, p: float = 0.8, q: float = 2.0, eps: float = 1e-2
) -> tuple[Tensor, Tensor, Tensor]:
    """(objectness, classes, gradient of their sum) in float64, from logarithms; `eps` above 0."""
    logits = logits.detach().double()
    classes = logits.shape[1] - 2
    is_foreground = labels < classes
    gradient = torch.zeros_like(logits)

    def entropy(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logs = z.log_softmax(1)
        loss = -logs.gather(1, targets[:, None]).sum() / max(len(z), 1)
        slopes = logs.exp().scatter_add(1, targets[:, None], torch.full_like(logs[:, :1], -1.0))
        return loss, slopes / max(len(z), 1)

    objectness, gradient[:, classes:] = entropy(logits[:, classes:], (~is_foreground).long())
    z, targets = logits[is_foreground, :classes], labels[is_foreground]
    logs, log_counts = z.log_softmax(1), counts[:-1].double().clamp(min=1).log()
    own = logs.gather(1, targets[:, None]).clamp(min=torch.tensor(eps, dtype=torch.float64, device=z.device).log())
    log_factors = p * (log_counts - log_counts[targets][:, None]).clamp(max=0) + q * (logs - own).clamp(min=0)
    of_classes, slopes = entropy(z + log_factors.scatter(1, targets[:, None], 0.0), targets)
    gradient[:, :classes][is_foreground] = slopes
    return objectness, of_classes, gradient
