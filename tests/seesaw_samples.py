"""Seesaw loss as the tests see it: inputs, one way to evaluate it, and its truth, row by row from the paper in numpy."""
import dataclasses
import math

import numpy as np
import torch
from harness import Backend, Evaluation
from rsloss_kernels import seesaw_loss, use_backend
from torch import Tensor

OPERATORS = ("seesaw_forward", "seesaw_backward")
GRADIENT_GATE = 2e-6


@dataclasses.dataclass
class Inputs:
    logits: Tensor  # [N, C + 2]
    labels: Tensor  # [N]
    counts: Tensor  # [C + 1]
    weight: Tensor | None = None
    options: dict = dataclasses.field(default_factory=dict)


def draw(generator: torch.Generator, rows=30, classes=7, spread=2.0, right=0.0, dtype=torch.float32, weight=True, **options) -> Inputs:
    """Half of the rows foreground, a tenth ignored, counts from 0 to thousands; `right` is added to the logit of each row's class."""
    logits = torch.randn((rows, classes + 2), generator=generator, dtype=torch.float64) * spread
    labels = torch.randint(0, classes, (rows,), generator=generator)
    chance = torch.rand(rows, generator=generator)
    logits[torch.arange(rows), labels] += right
    labels = torch.where(chance < 0.4, classes + (chance < 0.05).long(), torch.where(chance > 0.9, -1, labels))
    counts = torch.floor(torch.exp(torch.rand(classes + 1, generator=generator) * 9) - 1)
    drawn = torch.rand(rows, generator=generator) * 2
    return Inputs(logits.to(dtype), labels, counts, torch.where(drawn < 0.2, 0.0, drawn) if weight else None, options)


def evaluate(backend: Backend, inputs: Inputs, upstream: tuple = (1.0, 1.0)) -> Evaluation:
    """Both losses, objectness first, and the gradient of their sum weighted with `upstream`."""
    leaf = inputs.logits.detach().to(backend.device).requires_grad_()
    others = [value if value is None else value.to(backend.device) for value in (inputs.labels, inputs.counts, inputs.weight)]
    with use_backend(backend.name):
        losses = seesaw_loss(leaf, *others, **inputs.options)
    factors = [torch.as_tensor(factor, dtype=torch.float64).to(loss).expand_as(loss) for factor, loss in zip(upstream, losses, strict=True)]
    (gradient,) = torch.autograd.grad(losses, leaf, factors)
    return Evaluation(tuple(loss.detach().cpu() for loss in losses), gradient.cpu())


def truth(inputs: Inputs, upstream: tuple = (1.0, 1.0)) -> tuple[np.ndarray, Tensor]:
    """Losses [2, N] of single rows, weighted, and the gradient for upstream gradients of each row's two losses, in extended precision."""
    p, q, eps = (inputs.options.get(name, default) for name, default in (("p", 0.8), ("q", 2.0), ("eps", 1e-2)))
    logits = inputs.logits.detach().double().numpy().astype(np.longdouble)
    rows, classes = len(logits), logits.shape[1] - 2
    weights = np.ones(rows) if inputs.weight is None else inputs.weight.double().numpy()
    counts = np.maximum(inputs.counts.double().numpy(), 1).astype(np.longdouble)
    losses, gradient = np.zeros((2, rows)), np.zeros(logits.shape)
    for n, (z, label) in enumerate(zip(logits, inputs.labels.tolist(), strict=True)):
        if label < 0 or weights[n] == 0:
            continue
        is_foreground = label < classes
        right, wrong = (classes, classes + 1) if is_foreground else (classes + 1, classes)
        losses[0, n], pulls = _cross_entropy(z[[right, wrong]], 0)
        losses[0, n] *= weights[n]
        gradient[n, [right, wrong]] = pulls * weights[n] * upstream[0]
        if is_foreground:
            balanced = _balanced(z[:classes], label, counts, p, q, eps)
            losses[1, n], slopes = _cross_entropy(balanced, label)
            losses[1, n] *= weights[n]
            gradient[n, :classes] = slopes * weights[n] * upstream[1]
    return losses, torch.from_numpy(gradient)


def _cross_entropy(z: np.ndarray, target: int) -> tuple[float, np.ndarray]:
    """Of the softmax, and its gradient; sums that leave out what must not cancel."""
    if np.isnan(z).any() or (z == math.inf).any() or z[target] == -math.inf:
        return math.nan, np.full(len(z), math.nan)
    largest = int(np.argmax(z))
    exponentials = np.exp(z - z[largest])
    others = np.delete(exponentials, largest).sum()
    slopes = exponentials / (1 + others)
    slopes[target] = -np.delete(exponentials, target).sum() / (1 + others)
    return float((z[largest] - z[target]) + np.log1p(others)), slopes.astype(np.float64)


def _balanced(z: np.ndarray, label: int, counts: np.ndarray, p: float, q: float, eps: float) -> np.ndarray:
    if np.isnan(z).any() or (z == math.inf).any() or z[label] == -math.inf:
        return z
    share = z - z.max()
    share = share - np.log(np.exp(share).sum())
    own = max(share[label], np.log(np.longdouble(eps)) if eps > 0 else -np.inf)
    result = z.copy()
    for j in range(len(z)):
        if j != label:
            result[j] += p * min(0, np.log(counts[j]) - np.log(counts[label]))
            result[j] += q * max(np.longdouble(0), share[j] - own)
    return result
