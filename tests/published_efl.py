"""Equalized focal loss in the way in which its authors' article prints it: a module that learns the gradients of the logits from hooks.

Told again from the description in words: the caller hangs `collect` on the logits of every level, and passes them flattened. The hooks
fire in backward, the last level first; when all have fired the module adds the sums of the classes to its state. Differs from
`rsloss_kernels.EqualizedFocalLoss` in all that makes it hard to use: hooks, the number of levels, anchor-major channels, a backward
per forward, and a number of classes that counts the background.
"""
import torch
from torch import Tensor, nn


class PublishedEqualizedFocalLoss(nn.Module):
    def __init__(self, num_classes: int, focal_gamma: float = 2.0, focal_alpha: float = 0.25, scale_factor: float = 8.0, fpn_levels: int = 5):
        super().__init__()
        self.num_foreground = num_classes - 1
        self.focal_gamma, self.focal_alpha, self.scale_factor = focal_gamma, focal_alpha, scale_factor
        self.fpn_levels = fpn_levels
        for name, value in (("pos_grad", 0.0), ("neg_grad", 0.0), ("pos_neg", 1.0)):
            self.register_buffer(name, torch.full((self.num_foreground,), value))
        self.collected: list[Tensor] = []
        self.one_hot = self.is_kept = None

    def forward(self, logits: Tensor, labels: Tensor, normalizer: float) -> Tensor:
        """`logits` [B * K, C] and `labels` [B * K]: 0 background, 1..C, -1 ignored."""
        columns = torch.arange(1, self.num_foreground + 1)
        self.one_hot, self.is_kept = (labels[:, None] == columns).to(logits.dtype), labels >= 0
        focus = self.focal_gamma + self.scale_factor * (1 - self.pos_neg)
        p = logits.sigmoid()
        right = torch.where(self.one_hot > 0, p, 1 - p)
        alpha = torch.where(self.one_hot > 0, self.focal_alpha, 1 - self.focal_alpha)
        losses = -alpha * (focus / self.focal_gamma) * (1 - right) ** focus * right.log()
        return losses[self.is_kept].sum() / normalizer

    def collect(self, gradient: Tensor) -> None:
        """Hook of one level [B, A * C, H, W]."""
        batch = len(gradient)
        self.collected.append(gradient.detach().permute(0, 2, 3, 1).reshape(batch, -1, self.num_foreground))
        if len(self.collected) == self.fpn_levels:
            pulls = torch.cat(self.collected[::-1], 1).reshape(-1, self.num_foreground).abs()[self.is_kept]
            self.collected = []
            one_hot = self.one_hot[self.is_kept]
            self.pos_grad += (pulls * one_hot).sum(0)
            self.neg_grad += (pulls * (1 - one_hot)).sum(0)
            self.pos_neg = (self.pos_grad / (self.neg_grad + 1e-10)).clamp(0, 1)
