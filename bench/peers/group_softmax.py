"""Balanced group softmax computed the published way, one group after the other, and its truth in float64.

Li et al., "Overcoming Classifier Imbalance for Long-tail Object Detection with Balanced Group Softmax", CVPR 2020, with the algorithm
of its authors' code, told in our own words: labels are mapped group by group; where a group has foreground rows (their number is read
by the host), the indices of its others go to the host, numpy draws some of them without replacement, and they go back to become a
mask; then the cross entropy of the group's slice of the logits, weighted, over the host's sum of the weights.
"""
import numpy
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


class PublishedGroupSoftmax:
    """maps [G, C + 1]: the index of each label (0 the background) within each group's slice, 0 its others; the background group
    first, without others. slices: (start, length) of each group's columns."""

    def __init__(self, maps: Tensor, slices: list[tuple[int, int]], others_ratio: float):
        self.maps, self.slices, self.others_ratio = maps, slices, others_ratio

    def __call__(self, logits: Tensor, labels: Tensor) -> list[Tensor]:
        """The groups' losses, 0-d, with a sample of others that numpy's global generator draws."""
        mapped = [of_group[labels] for of_group in self.maps]
        weights = [torch.ones_like(labels, dtype=torch.float32), *map(self._sample, mapped[1:])]
        return self.losses(logits, mapped, weights)

    def losses(self, logits: Tensor, mapped: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        result = []
        for (start, length), targets, weight in zip(self.slices, mapped, weights, strict=True):
            total = max(weight.float().sum().item(), 1.0)
            terms = cross_entropy(logits.narrow(1, start, length), targets, reduction="none")
            result.append((terms * weight).sum() / total)
        return result

    def _sample(self, targets: Tensor) -> Tensor:
        is_foreground = targets > 0
        count = is_foreground.sum().item()
        if count == 0:
            return torch.zeros_like(targets, dtype=torch.float32)
        others = (~is_foreground).nonzero().flatten().cpu().numpy()
        wanted = int(count * self.others_ratio)
        if wanted >= len(others):
            return torch.ones_like(targets, dtype=torch.float32)
        chosen = torch.from_numpy(numpy.random.choice(others, wanted, replace=False)).to(targets.device)
        weight = is_foreground.float()
        weight[chosen] = 1.0
        return weight


def group_softmax_truth(
    logits: Tensor, mapped: list[Tensor], slices: list[tuple[int, int]], weights: Tensor
) -> tuple[Tensor, Tensor]:
    """(sum of the groups' losses, its gradient) in float64; mapped: targets within the slices."""
    logits, weights = logits.detach().double(), weights.double()
    loss, gradient = 0.0, torch.zeros_like(logits)
    for (start, length), targets, weight in zip(slices, mapped, weights, strict=True):
        logs = logits.narrow(1, start, length).log_softmax(1)
        share = weight / weight.sum().clamp(min=1)
        loss = loss - (share * logs.gather(1, targets[:, None])[:, 0]).sum()
        slopes = logs.exp().scatter_add(1, targets[:, None], torch.full_like(logs[:, :1], -1.0).expand(len(logs), 1))
        gradient.narrow(1, start, length).copy_(slopes * share[:, None])
    return loss, gradient
