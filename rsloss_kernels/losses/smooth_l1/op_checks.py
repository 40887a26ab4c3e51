"""Checks of the arguments of the smooth L1 operators, for the backends written in Python; the compiled ones check the same in C++."""
from torch import Tensor

from rsloss_kernels import _checks

SMALLEST_BETA, LARGEST_BETA = 1e-30, 1e30


def is_beta(value: float) -> bool:
    """NaN is none."""
    return value == 0 or SMALLEST_BETA <= value <= LARGEST_BETA


def _check_floating(op: str, name: str, value: Tensor, pred: Tensor) -> None:
    _checks.check_dtype(op, name, value, *_checks.LOGIT_TYPES)
    if value.device != pred.device:
        raise ValueError(f"{op}: {name} must be on the device of pred, {pred.device}, got {value.device}")
    if not value.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got shape {list(value.shape)} with strides {value.stride()}")


def _check_elements(op, pred, target, weight, beta, normalizer, fixed_beta) -> None:
    _check_floating(op, "pred", pred, pred)
    _check_floating(op, "target", target, pred)
    _checks.check_shape(op, "target", target, pred.shape, "the shape of pred")
    if weight is not None:
        _check_floating(op, "weight", weight, pred)
        if pred.dim() < 2 or weight.shape != pred.shape[:-1]:
            rows = f" or that less the last dimension, {list(pred.shape[:-1])}" if pred.dim() >= 2 else ""
            _checks.check_shape(op, "weight", weight, pred.shape, f"the shape of pred{rows}")
    for name, value in (("beta", beta), ("normalizer", normalizer)):
        if value is not None:
            _check_floating(op, name, value, pred)
            _checks.check_shape(op, name, value, (), "no dimensions")
    if not is_beta(fixed_beta):
        raise ValueError(f"{op}: fixed_beta must be 0 or within [{SMALLEST_BETA:g}, {LARGEST_BETA:g}], got {fixed_beta}")


def smooth_l1_forward(pred, target, weight, beta, normalizer, fixed_beta, scale) -> None:
    _check_elements("smooth_l1_forward", pred, target, weight, beta, normalizer, fixed_beta)


def smooth_l1_elements(pred, target, weight, beta, normalizer, fixed_beta, scale) -> None:
    _check_elements("smooth_l1_elements", pred, target, weight, beta, normalizer, fixed_beta)


def smooth_l1_backward(pred, target, weight, beta, normalizer, grad, fixed_beta, scale) -> None:
    op = "smooth_l1_backward"
    _check_elements(op, pred, target, weight, beta, normalizer, fixed_beta)
    _check_floating(op, "grad", grad, pred)
    if grad.dim() > 0:
        _checks.check_shape(op, "grad", grad, pred.shape, "no dimensions or the shape of pred")
