"""The equalized focal loss and equalization loss v2 computed the published way, and the truth of both and of focal loss in float64.

Li et al., "Equalized Focal Loss for Dense Long-Tailed Object Detection", CVPR 2022, and Tan et al., "Equalization Loss v2", CVPR 2021,
with the algorithms of their authors' code, told in our own words: labels become a one-hot tensor, every step of the formula a tensor of
the logits' size. The first learns its gradients from hooks on the levels in backward, the second computes them once more in forward.
"""
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


class PublishedEqualizedFocal:
    """State float32 [C] as published. Labels 0..C-1, C the background, negative: ignored."""

    def __init__(self, classes: int, gamma: float = 2.0, alpha: float = 0.25, scale_factor: float = 8.0, device: str = "cpu"):
        self.gamma, self.alpha, self.scale_factor = gamma, alpha, scale_factor
        self.pos_grad, self.neg_grad = torch.zeros(classes, device=device), torch.zeros(classes, device=device)
        self.pos_neg = torch.ones(classes, device=device)
        self.one_hot = self.is_kept = None
        self.collected: list[Tensor] = []

    def __call__(self, levels: list[Tensor], labels: Tensor, normalizer: float = 1.0) -> Tensor:
        """levels: maps [B, A * C, H, W] each; labels [B * K], of an image the levels one after the other, in the order h, w, anchor."""
        watched = [level.view_as(level) for level in levels]
        self.collected = []
        for level in watched:
            level.register_hook(lambda gradient: self._collect(gradient, len(levels)))
        logits = self._flat(watched)
        self.is_kept = labels >= 0
        rows, classes = logits.shape
        one_hot = logits.new_zeros(rows, classes + 1)
        one_hot[torch.arange(rows, device=logits.device), labels.clamp(min=0)] = 1
        logits, self.one_hot = logits[self.is_kept], one_hot[self.is_kept][:, :classes]
        focus = (self.gamma + self.scale_factor * (1 - self.pos_neg)).view(1, -1).expand(rows, classes)[self.is_kept]
        weight = focus / self.gamma
        probability = logits.sigmoid()
        right = probability * self.one_hot + (1 - probability) * (1 - self.one_hot)
        losses = -right.log() * (1 - right).pow(focus) * weight
        if self.alpha >= 0:
            losses = (self.alpha * self.one_hot + (1 - self.alpha) * (1 - self.one_hot)) * losses
        return losses.sum() / normalizer

    def _flat(self, levels: list[Tensor]) -> Tensor:
        classes = len(self.pos_neg)
        rows = [level.permute(0, 2, 3, 1).reshape(len(level), -1, classes) for level in levels]
        return torch.cat(rows, 1).reshape(-1, classes)

    def _collect(self, gradient: Tensor, levels: int) -> None:
        """The last level comes first."""
        self.collected.append(gradient.detach())
        if len(self.collected) < levels:
            return
        pull = self._flat(self.collected[::-1]).abs()[self.is_kept]
        self.pos_grad += (pull * self.one_hot).sum(0)
        self.neg_grad += (pull * (1 - self.one_hot)).sum(0)
        self.pos_neg = (self.pos_grad / (self.neg_grad + 1e-10)).clamp(0, 1)


class PublishedEQLv2:
    """State float32 [C] as published. Labels 0..C, C the background, whose column is the last."""

    def __init__(self, classes: int, gamma: float = 12.0, mu: float = 0.8, alpha: float = 4.0, device: str = "cpu"):
        self.gamma, self.mu, self.alpha = gamma, mu, alpha
        self.pos_grad, self.neg_grad = torch.zeros(classes, device=device), torch.zeros(classes, device=device)
        self.pos_neg = torch.full((classes,), 100.0, device=device)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        rows, columns = logits.shape
        target = logits.new_zeros(rows, columns)
        target[torch.arange(rows, device=logits.device), labels] = 1
        negative = torch.cat([self.pos_neg.sub(self.mu).mul(self.gamma).sigmoid(), self.pos_neg.new_ones(1)])
        positive = 1 + self.alpha * (1 - negative)
        negative, positive = (weight.view(1, -1).expand(rows, columns) for weight in (negative, positive))
        weight = positive * target + negative * (1 - target)
        losses = binary_cross_entropy_with_logits(logits, target, reduction="none")
        loss = (losses * weight).sum() / rows
        self._collect(logits.detach(), target, weight)
        return loss

    def _collect(self, logits: Tensor, target: Tensor, weight: Tensor) -> None:
        pull = (logits.sigmoid() - target).abs() * weight
        self.pos_grad += (pull * target).sum(0)[:-1]
        self.neg_grad += (pull * (1 - target)).sum(0)[:-1]
        self.pos_neg = self.pos_grad / (self.neg_grad + 1e-10)


def modulated_truth(logits: Tensor, dense: Tensor, gamma: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, gradient) in float64 of focal loss with an exponent, a weight of positives and one of negatives per class, [C] each.

    dense: 0 or 1, as the logits.
    """
    is_positive = dense > 0
    sign = torch.where(is_positive, -1.0, 1.0).double()
    x = sign * logits.detach().double()
    loss, power = -logsigmoid(-x), (gamma * logsigmoid(x)).exp()
    weighted = torch.where(is_positive, positive, negative) * power
    return (weighted * loss).sum(), sign * weighted * (gamma * (-x).sigmoid() * loss + x.sigmoid())
