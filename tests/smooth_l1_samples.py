"""Smooth L1 loss as the tests see it: inputs, one way to evaluate it, and its truth from the definition in numpy's longest type."""
import dataclasses
import math

import numpy as np
import torch
from harness import Backend, Evaluation
from rsloss_kernels import smooth_l1_loss, use_backend
from torch import Tensor

OPERATORS = ("smooth_l1_forward", "smooth_l1_elements", "smooth_l1_backward")
GRADIENT_GATE = 2e-6
LONG = np.longdouble


@dataclasses.dataclass
class Inputs:
    pred: Tensor
    target: Tensor
    beta: float | Tensor = 1.0
    weight: Tensor | None = None
    options: dict = dataclasses.field(default_factory=dict)  # reduction, avg_factor


def draw(
    generator: torch.Generator,
    shape=(60, 4),
    beta: float | Tensor = 0.5,
    weight: str | None = None,
    scale=1.0,
    dtype=torch.float32,
    target_dtype=None,
    weight_dtype=torch.float32,
    **options,
) -> Inputs:
    """Differences on both sides of beta, a tenth of them 0; `weight` "element" or "row", a third of them 0."""
    pred, target = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    pred, target = pred.to(dtype), target.to(target_dtype or dtype)
    is_equal = torch.rand(shape, generator=generator) < 0.1
    target = torch.where(is_equal, pred.to(target.dtype), target)
    rows = shape if weight == "element" else shape[:-1]
    weights = (torch.rand(rows, generator=generator) * 1.5 - 0.5).clamp(min=0).to(weight_dtype) if weight else None
    return Inputs(pred, target, beta, weights, options)


def evaluate(backend: Backend, inputs: Inputs, upstream: float | Tensor = 1.0, loss=smooth_l1_loss) -> Evaluation:
    leaf = inputs.pred.detach().to(backend.device).requires_grad_()
    moved = [value.to(backend.device) if isinstance(value, Tensor) else value for value in (inputs.target, inputs.beta, inputs.weight)]
    options = {name: value.to(backend.device) if isinstance(value, Tensor) else value for name, value in inputs.options.items()}
    with use_backend(backend.name):
        value = loss(leaf, *moved, **options)
    upstream = torch.as_tensor(upstream, dtype=torch.float64).to(value).expand_as(value)
    (gradient,) = torch.autograd.grad(value, leaf, upstream)
    return Evaluation((value.detach().cpu(),), gradient.cpu())


def truth(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Losses and slopes of single elements, weighted and divided, in the shape of `pred`; 0 where the weight is."""
    pred, target = (value.detach().double().numpy().astype(LONG) for value in (inputs.pred, inputs.target))
    weight = np.ones(pred.shape) if inputs.weight is None else inputs.weight.double().numpy()
    if weight.ndim < pred.ndim:
        weight = np.broadcast_to(weight[..., None], pred.shape)
    beta = LONG(float(inputs.beta))
    beta = LONG(0) if beta < 1e-30 else beta
    avg_factor, reduction = inputs.options.get("avg_factor"), inputs.options.get("reduction", "mean")
    divisor = float(avg_factor) if avg_factor is not None else max(pred.size, 1) if reduction == "mean" else 1
    with np.errstate(all="ignore"):
        d = pred - target
        distance = np.abs(d)
        is_near = distance < beta
        losses = np.where(is_near, d * d / (2 * beta), distance - beta / 2)
        slopes = np.where(is_near, d / beta, np.where(np.isnan(d), d, np.sign(d)))
        factor = np.where(weight == 0, LONG(0), weight.astype(LONG))
        return tuple(np.where(weight == 0, LONG(0), factor * value) / LONG(divisor) for value in (losses, slopes))


def total(losses: np.ndarray) -> float:
    is_usual = np.abs(losses).max(initial=0) < 1e290
    return math.fsum(float(value) for value in losses.flat) if is_usual else float(losses.sum())
