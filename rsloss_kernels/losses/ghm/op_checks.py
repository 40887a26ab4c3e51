"""Checks of the arguments of the GHM operators, for the backends written in Python; the compiled ones check the same in C++."""
import math

import torch
from torch import Tensor

from rsloss_kernels import _checks

MAX_BINS = 256
SMALLEST_MU, LARGEST_MU = 1e-30, 1e30


def check_bins(function: str, bins: int) -> None:
    if not _checks.is_int(bins):
        raise TypeError(f"{function}: bins must be an int, got {type(bins).__name__}")
    if not 1 <= bins <= MAX_BINS:
        raise ValueError(f"{function}: bins must be within 1..{MAX_BINS}, got {bins}")


def _check_number_type(function: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{function}: {name} must be a float, got {type(value).__name__}")


def check_mu(function: str, mu: float) -> None:
    _check_number_type(function, "mu", mu)
    if not SMALLEST_MU <= mu <= LARGEST_MU:
        raise ValueError(f"{function}: mu must be within [{SMALLEST_MU:g}, {LARGEST_MU:g}], got {mu}")


def check_momentum(function: str, momentum: float) -> None:
    _check_number_type(function, "momentum", momentum)
    if not 0 <= momentum < 1:
        raise ValueError(f"{function}: momentum must be within [0, 1), got {momentum}")


def check_state(
    function: str, acc_sum: Tensor | None, num_updates: Tensor | None, pred: Tensor, bins: int, momentum: float
) -> None:
    if acc_sum is None and momentum > 0:
        raise ValueError(f"{function}: acc_sum must be given, momentum {momentum} needs it, at first torch.zeros({bins}), got None")
    if acc_sum is None and num_updates is not None:
        raise ValueError(f"{function}: acc_sum must be given with num_updates, got None")
    dtypes = {"acc_sum": (torch.float32, torch.float64), "num_updates": (torch.int64,)}
    for name, value in (("acc_sum", acc_sum), ("num_updates", num_updates)):
        if value is None:
            continue
        _checks.check_device(function, name, value, pred)
        if value.dtype not in dtypes[name]:
            raise TypeError(f"{function}: {name} must be {' or '.join(map(str, dtypes[name]))}, got {value.dtype}")
        _checks.check_shape(function, name, value, (bins,), "one number per bin")


def index_shape(pred: Tensor, rows: Tensor) -> tuple[int, int]:
    """Classes and places of a level: it is [outer, classes, places], what each row has one of, `rows`, is [outer, places]."""
    if rows.dim() < pred.dim():
        return pred.shape[-1], 1
    return pred.shape[1] // max(rows.shape[1], 1), max(math.prod(pred.shape[2:]), 1)


def _has_rows(value: Tensor, pred: Tensor) -> bool:
    """[...] for [..., C], or [B, A, *spatial] for maps [B, A * C, *spatial] with C above 1."""
    if pred.dim() > 0 and value.shape == pred.shape[:-1]:
        return True
    if pred.dim() < 2 or value.dim() != pred.dim() or value.shape[0] != pred.shape[0] or value.shape[2:] != pred.shape[2:]:
        return False
    rows, elements = value.shape[1], pred.shape[1]
    return elements == 0 if rows == 0 else elements % rows == 0 and elements != rows


def _check_number(op: str, name: str, values: list[Tensor], preds: list[Tensor]) -> None:
    if len(values) != len(preds):
        raise ValueError(f"{op}: {name} must hold as many tensors as preds, {len(preds)}, got {len(values)}")


def _check_levels(op: str, preds: list[Tensor], targets: list[Tensor], weights: list[Tensor], mu: float | None) -> None:
    if not preds:
        raise ValueError(f"{op}: preds must hold at least one tensor, got none")
    _check_number(op, "targets", targets, preds)
    if weights:
        _check_number(op, "weights", weights, preds)
    if mu is not None:
        check_mu(op, mu)
    labels = (torch.int32, torch.int64) if mu is None else ()
    for number, (pred, target) in enumerate(zip(preds, targets, strict=True)):
        _checks.check_dtype(op, "preds", pred, *_checks.LOGIT_TYPES)
        _checks.check_dtype(op, "preds", pred, preds[0].dtype)
        _checks.check_placement(op, "preds", pred, preds[0])
        _checks.check_placement(op, "targets", target, preds[0])
        _checks.check_dtype(op, "targets", target, *_checks.LOGIT_TYPES, *labels)
        rows = None if mu is not None or pred.dim() == 0 else pred.shape[:-1]
        if target.is_floating_point():
            _checks.check_shape(op, "targets", target, pred.shape, "the shape of preds")
        elif rows is None:
            raise ValueError(f"{op}: preds must have a last dimension of classes for class indices, got shape []")
        elif not _has_rows(target, pred):
            maps = ", or [B, A, *spatial] for maps [B, A * C, *spatial]"
            _checks.check_shape(op, "targets", target, rows, f"the shape of preds less the last dimension (class indices){maps}")
        if weights:
            weight = weights[number]
            _checks.check_placement(op, "weights", weight, preds[0])
            _checks.check_dtype(op, "weights", weight, *_checks.LOGIT_TYPES)
            # Of class indices the rows are those of the labels.
            is_index = not target.is_floating_point()
            if rows is None or not (weight.shape == target.shape if is_index else _has_rows(weight, pred)):
                less = "" if rows is None else f" or that less the last dimension, {list(rows)}"
                _checks.check_shape(op, "weights", weight, pred.shape, f"the shape of preds{less}")


def _check_table(op: str, name: str, table: Tensor, pred: Tensor, shape: tuple[int, ...]) -> None:
    _checks.check_placement(op, name, table, pred)
    _checks.check_dtype(op, name, table, torch.float64)
    _checks.check_shape(op, name, table, shape, "shape")


def _check_running(
    op: str, pred: Tensor, acc_sum: Tensor | None, num_updates: Tensor | None, bins: int, momentum: float
) -> None:
    check_momentum(op, momentum)
    check_state(op, acc_sum, num_updates, pred, bins, momentum)
    for name, value in (("acc_sum", acc_sum), ("num_updates", num_updates)):
        if value is not None:
            _checks.check_placement(op, name, value, pred)


def ghm_histogram(preds, targets, weights, bins, mu, background_first) -> None:
    _check_levels("ghm_histogram", preds, targets, weights, mu)
    check_bins("ghm_histogram", bins)


def ghm_finalize(
    preds, targets, weights, histogram, acc_sum, num_updates, bins, mu, background_first, momentum, count_empty_bins, gradient_scale
) -> None:
    op = "ghm_finalize"
    _check_levels(op, preds, targets, weights, mu)
    check_bins(op, bins)
    _check_table(op, "histogram", histogram, preds[0], (2, bins + 1))
    _check_running(op, preds[0], acc_sum, num_updates, bins, momentum)


def ghm_forward(preds, targets, weights, acc_sum, num_updates, bins, mu, background_first, momentum, count_empty_bins) -> None:
    op = "ghm_forward"
    _check_levels(op, preds, targets, weights, mu)
    check_bins(op, bins)
    _check_running(op, preds[0], acc_sum, num_updates, bins, momentum)


def ghm_backward(preds, targets, weights, bin_weights, grad_loss, mu, background_first) -> None:
    op = "ghm_backward"
    _check_levels(op, preds, targets, weights, mu)
    if bin_weights.dim() != 1 or not 1 <= bin_weights.numel() <= MAX_BINS:
        raise ValueError(f"{op}: bin_weights must have shape [bins] with bins within 1..{MAX_BINS}, got {list(bin_weights.shape)}")
    _check_table(op, "bin_weights", bin_weights, preds[0], (bin_weights.numel(),))
    _checks.check_placement(op, "grad_loss", grad_loss, preds[0])
    _checks.check_dtype(op, "grad_loss", grad_loss, *_checks.LOGIT_TYPES)
    _checks.check_shape(op, "grad_loss", grad_loss, (), "no dimensions")
