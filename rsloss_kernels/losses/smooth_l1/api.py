"""Smooth L1 loss: the public function."""
import math
import numbers

import torch
from torch import Tensor

from rsloss_kernels import _backends, _checks, _library
from rsloss_kernels.losses.focal.arguments import REDUCTIONS
from rsloss_kernels.losses.smooth_l1 import op_checks


def smooth_l1_loss(
    pred: Tensor,
    target: Tensor,
    beta: float | Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
) -> Tensor:
    """Smooth L1: `d^2 / (2 beta)` where `|d| < beta`, else `|d| - beta / 2`, with `d = pred - target`.

    Girshick, "Fast R-CNN", ICCV 2015, eq. 3; with a `beta` that changes Zhang et al., "Dynamic R-CNN", ECCV 2020, eq. 5.

    Args:
        pred: any shape; float16, bfloat16, float32 or float64.
        target: the shape of `pred`, any real dtype.
        beta: where the loss turns from square to linear, in the units of `pred`: 0 (`|d|`, with the gradient 0 at 0) or within [1e-30, 1e30].
            A number, or a floating Tensor of one number on the device of `pred`, which is read there: one out of range makes all NaN.
        weight: real or bool, a factor of each element (the shape of `pred`), or of each row (that less the last dimension, or with 1 in
            its place). Elements whose weight is 0 may hold anything.
        reduction: "mean" (over all elements, whatever their weights), "sum" or "none".
        avg_factor: a number or a Tensor of one number that divides, in place of the number of elements in "mean", and in every other
            reduction; a Tensor is read on its device. 0 divides as in floating point: infinity, or NaN where nothing counts.

    Returns:
        "none": the shape and dtype of `pred`; else 0-d, float64 for float64 `pred`, else float32. The mean of nothing is an exact zero,
        connected to the graph.

    Everything but `pred` is detached; `pred`, `target`, `weight` and a Tensor `beta` must not be edited in place before backward, which
    computes all anew. NaN in an element that counts makes the loss and that element's gradient NaN, and no other gradient.

    Raises:
        TypeError, ValueError: wrong types, shapes, devices, ranges; with RSLOSS_DEBUG_CHECKS=1 also a Tensor `beta` out of range.
        RuntimeError: a forced backend that cannot run.
    """
    return evaluate("smooth_l1_loss", pred, target, beta, weight, reduction, avg_factor)


def evaluate(
    function: str, pred: Tensor, target: Tensor, beta: float | Tensor, weight: Tensor | None, reduction: str,
    avg_factor: float | Tensor | None, loss_weight: float = 1.0, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """The loss times `loss_weight`; `eps` is added to `avg_factor`."""
    _checks.check_tensor(function, "pred", pred)
    _checks.check_floating(function, "pred", pred)
    target = _read_values(function, "target", target, pred)
    _checks.check_shape(function, "target", target, pred.shape, "the shape of pred")
    weight = _read_weight(function, weight, pred)
    table, fixed_beta = _read_beta(function, beta, pred)
    _checks.check_choice(function, "reduction", reduction, REDUCTIONS)
    normalizer, scale = _read_divisor(function, reduction, avg_factor, pred, loss_weight, eps)
    operator = "smooth_l1_elements" if reduction == "none" else "smooth_l1_forward"
    backend = _backends.resolve(operator, pred.device.type)
    tensors = target, weight, table, normalizer
    return _library.differentiable(operator, backend, pred.contiguous(), *tensors, fixed_beta, scale)[0]


def _read_values(function: str, name: str, value: Tensor, pred: Tensor) -> Tensor:
    """Floating, contiguous, detached."""
    _checks.check_tensor(function, name, value)
    if value.device != pred.device:
        raise ValueError(f"{function}: {name} must be on the device of pred, {pred.device}, got {value.device}")
    if value.dtype not in _checks.LOGIT_TYPES:
        if value.is_complex():
            raise TypeError(f"{function}: {name} must be real, got {value.dtype}")
        # The narrowest that holds them: wider ones than `pred` cost.
        value = value.to(torch.float16 if value.dtype == torch.bool else torch.float64)
    return (value.detach() if value.requires_grad else value).contiguous()


def _read_weight(function: str, weight: Tensor | None, pred: Tensor) -> Tensor | None:
    if weight is None:
        return None
    _checks.check_tensor(function, "weight", weight)
    shape = weight.shape
    if shape == pred.shape:
        # Not a copy of what was expanded.
        is_expanded = pred.dim() >= 2 and weight.numel() > 0 and weight.layout == torch.strided and weight.stride(-1) == 0
        return _read_values(function, "weight", weight[..., 0] if is_expanded else weight, pred)
    rows = pred.shape[:-1]
    if pred.dim() < 2 or shape not in (rows, (*rows, 1)):
        less = f" or that less the last dimension, {list(rows)}" if pred.dim() >= 2 else ""
        _checks.check_shape(function, "weight", weight, pred.shape, f"the shape of pred{less}")
    return _read_values(function, "weight", weight if shape == rows else weight[..., 0], pred)


def _read_beta(function: str, beta: float | Tensor, pred: Tensor) -> tuple[Tensor | None, float]:
    """`beta` and `fixed_beta` of the operators."""
    if not isinstance(beta, Tensor):
        check_beta(function, "beta", beta)
        # As a tensor, so that a graph serves every number.
        return (_constant(beta, pred), 0.0) if torch.compiler.is_compiling() else (None, float(beta))
    if beta.numel() != 1 or beta.dim() > 1 or not beta.is_floating_point():
        raise ValueError(
            f"{function}: beta must be a number or a floating Tensor of one number, got {beta.dtype} of shape {list(beta.shape)}"
        )
    beta = _read_values(function, "beta", beta, pred)
    beta = beta.reshape(()) if beta.dim() else beta
    if _checks.debug_checks() and not op_checks.is_beta(float(beta)):
        raise ValueError(f"{function}: beta must be 0 or within [1e-30, 1e30], got {float(beta)}")
    return beta, 0.0


def check_beta(function: str, name: str, beta: float) -> None:
    if isinstance(beta, bool) or not isinstance(beta, numbers.Real):
        raise TypeError(f"{function}: {name} must be a number or a Tensor of one number, got {type(beta).__name__}")
    if not op_checks.is_beta(beta):
        raise ValueError(f"{function}: {name} must be 0 or within [1e-30, 1e30], got {beta}")


def _read_divisor(
    function: str, reduction: str, avg_factor: float | Tensor | None, pred: Tensor, loss_weight: float, eps: float
) -> tuple[Tensor | None, float]:
    """`normalizer` and `scale` of the operators."""
    if isinstance(avg_factor, Tensor):
        if avg_factor.numel() != 1 or avg_factor.dim() > 1:
            raise ValueError(f"{function}: avg_factor must be a number or a Tensor of one number, got shape {list(avg_factor.shape)}")
        normalizer = _read_values(function, "avg_factor", avg_factor, pred).reshape(())
        return normalizer.double() + eps if eps else normalizer, loss_weight
    if avg_factor is not None:
        if isinstance(avg_factor, bool) or not isinstance(avg_factor, numbers.Real):
            raise TypeError(f"{function}: avg_factor must be a number or a Tensor of one number, got {type(avg_factor).__name__}")
        divisor = avg_factor + eps
    elif reduction == "mean":
        divisor = max(pred.numel(), 1)
    else:
        return None, loss_weight
    if torch.compiler.is_compiling():
        return _constant(divisor, pred), loss_weight
    return None, loss_weight / divisor if divisor else math.inf


def _constant(value: float, pred: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.float64, device=pred.device) * value
